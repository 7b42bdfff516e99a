"""Runs in processes of their own: signals from outside, two ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dihal.checkpoint import list_checkpoints, load_checkpoint
from dihal.config import TrainConfig
from dihal.config.convert import to_dict
from dihal.training.logs import read_records
from dihal.training.run import train
from tests.unit.training.conftest import Make, resumed
from tests.unit.training.test_run import same_tensors, stream

WORKER = """
import json, os, pathlib, sys, torch
(pathlib.Path(sys.argv[0]).parent / f"pid-{os.environ.get('RANK', 0)}").write_text(str(os.getpid()))
torch.set_num_threads(1)
from dihal.config import TrainConfig
from dihal.config.convert import from_dict
from dihal.errors import UsageError
from dihal.training.run import train
try:
    train(from_dict(TrainConfig, json.load(open(sys.argv[1]))))
except UsageError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""
ROOT = Path(__file__).parents[3]


def start(config: TrainConfig, folder: Path, *launcher: str) -> subprocess.Popen[str]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "worker.py").write_text(WORKER)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    command = [sys.executable, *launcher, str(folder / "worker.py"), str(folder / "config.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def wait_for_step(config: TrainConfig, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        records = read_records(Path(config.out) / "metrics.jsonl")
        if records and records[-1]["step"] >= step:
            return
        if process.poll() is not None:
            pytest.fail(f"ended early: {process.communicate()[1]}")
        time.sleep(0.02)
    process.kill()
    pytest.fail("no progress")


def test_stopped_and_resumed_equals_uninterrupted(make: Make, tmp_path: Path) -> None:
    whole = make(steps=60, out=tmp_path / "whole", **{"log.every": 5, "trainer.validate_batches": 0})
    process = start(whole, tmp_path / "job")
    wait_for_step(whole, 10, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    stopped = load_checkpoint(whole.out).state["step"]
    assert 10 <= stopped < 60
    again = start(resumed(whole), tmp_path / "job2")
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    straight = make(steps=60, out=tmp_path / "straight", **{"log.every": 5, "trainer.validate_batches": 0})
    other = start(straight, tmp_path / "job3")
    _, errors = other.communicate(timeout=120)
    assert other.returncode == 0, errors
    assert stream(whole.out) == stream(straight.out)
    assert same_tensors(whole.out, straight.out)


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def test_two_processes_equal_one(make: Make, tmp_path: Path) -> None:
    """The same global batch on two ranks: the same samples, times and noise, so the same losses."""
    suffix = {"method.objective.kl": 0.5, "trainer.save_every": 4}
    one = make(steps=8, out=tmp_path / "one", **suffix)
    train(one)
    two = make(
        steps=8,
        out=tmp_path / "two",
        **suffix,
        **{"data.batch_size": 1, "trainer.accumulate": 2, "trainer.devices": 2},
    )
    process = start(two, tmp_path / "job", *TORCHRUN)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert [path.name for path in list_checkpoints(two.out)] == ["step-00000004", "step-00000008"]
    left, right = stream(one.out), stream(two.out)
    assert [row[:3] for row in left] == [row[:3] for row in right]
    for a, b in zip(left, right, strict=True):
        assert b[3] == pytest.approx(a[3], rel=1e-5)
        assert b[6] == pytest.approx(a[6], rel=1e-4)
    assert load_checkpoint(two.out).state["tokens"] == load_checkpoint(one.out).state["tokens"]


def test_one_rank_signalled_stops_both(make: Make, tmp_path: Path) -> None:
    config = make(steps=1_000_000, **{"data.batch_size": 2, "trainer.devices": 2})
    process = start(config, tmp_path / "job", *TORCHRUN)
    wait_for_step(config, 3, process)
    os.kill(int((tmp_path / "job" / "pid-1").read_text()), signal.SIGTERM)
    process.communicate(timeout=100)
    assert process.returncode != 0
    state = load_checkpoint(config.out).state
    assert state["step"] >= 3
    assert not list((Path(config.out) / "checkpoints").glob(".*"))
