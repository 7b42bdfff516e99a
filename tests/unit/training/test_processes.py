"""Two ranks under torchrun. What they compute, and what kills and signals do: tests/integration."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dihal.checkpoint import load_checkpoint
from dihal.config import TrainConfig
from dihal.config.convert import to_dict
from dihal.training.logs import read_records
from tests.unit.training.conftest import Make

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


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


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
