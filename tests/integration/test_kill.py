"""Runs that end in the middle and go on as if nothing had happened. More of the same: benchmarks/robustness.py."""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dihal.checkpoint import has_checkpoint, load_checkpoint
from dihal.config import TrainConfig
from tests import jobs

STEPS, EVERY = 24, 5


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.prepare(tmp_path_factory.mktemp("kill"))


@pytest.fixture(scope="module")
def uninterrupted(prepared: Path) -> TrainConfig:
    changes = {"trainer.save_every": EVERY, "method.denoiser.dropout": 0.1, "trainer.skip_spike": 4.0}
    config = jobs.configuration(prepared, prepared / "uninterrupted", steps=STEPS, **changes)
    assert jobs.finish(jobs.start(config)) == [0]
    return config


def saved(config: TrainConfig) -> int:
    """Step a resumed run would go on from."""
    return load_checkpoint(config.out).state["step"] if has_checkpoint(config.out) else 0


def goes_on(config: TrainConfig) -> None:
    assert jobs.finish(jobs.start(replace(config, resume=True))) == [0]


@pytest.mark.parametrize("step", sorted(random.Random(0).sample(range(EVERY, STEPS), 3)))
def test_killed_at_a_step(uninterrupted: TrainConfig, tmp_path: Path, step: int) -> None:
    cut = replace(uninterrupted, out=str(tmp_path / "cut"))
    assert jobs.finish(jobs.start(cut, ("kill_at", (step,)))) == [-signal.SIGKILL]
    assert load_checkpoint(cut.out).state["step"] >= step - EVERY
    goes_on(cut)
    assert jobs.losses(cut.out) == jobs.losses(uninterrupted.out)
    assert jobs.same(cut.out, uninterrupted.out)


def test_stopped_by_a_signal(uninterrupted: TrainConfig, tmp_path: Path) -> None:
    cut = replace(uninterrupted, out=str(tmp_path / "cut"))
    process = jobs.start(cut)
    seen = jobs.wait_for_step(cut, 7, process)
    assert process[0].pid
    os.kill(process[0].pid, signal.SIGTERM)
    assert jobs.finish(process) == [143]
    assert load_checkpoint(cut.out).state["step"] >= seen
    goes_on(cut)
    assert jobs.losses(cut.out) == jobs.losses(uninterrupted.out)
    assert jobs.same(cut.out, uninterrupted.out)


def test_killed_again_and_again_around_saves(prepared: Path, tmp_path: Path) -> None:
    """Every resume works. What was lost is at most an interval and what ran beside a save, which waits for the one before.

    That the latter is nothing where a save is fast is for benchmarks/robustness.py to show: it is a matter of time.
    """
    interval, generator = 2, random.Random(1)
    config = jobs.configuration(prepared, tmp_path / "run", steps=1_000_000, **{"trainer.save_every": interval})
    for kill in range(6):
        process = jobs.start(replace(config, resume=has_checkpoint(config.out)))
        jobs.wait_for_step(config, saved(config) + interval, process)
        time.sleep(generator.uniform(0.0, 0.3))
        process[0].kill()
        jobs.finish(process)
        recorded = jobs.losses(config.out)[-1][0]
        assert recorded - saved(config) <= 2 * interval, f"kill {kill}"
    before = saved(config)
    process = jobs.start(replace(config, resume=has_checkpoint(config.out)))
    # The second copy has waited for the first one.
    jobs.wait_for_step(config, before + 2 * interval + 1, process)
    process[0].kill()
    jobs.finish(process)
    assert saved(config) >= before + interval


def test_a_rank_without_its_parent_ends(tmp_path: Path) -> None:
    orphan = jobs.leave_an_orphan(tmp_path / "pid")
    deadline = time.monotonic() + 60
    while (Path("/proc") / str(orphan)).exists() and state(orphan) != "Z":
        assert time.monotonic() < deadline, "it still waits"
        time.sleep(0.05)


def state(process: int) -> str:
    """Letter of a process's state; Z: it has ended, and nobody has asked."""
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"
