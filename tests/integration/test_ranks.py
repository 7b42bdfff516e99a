"""Several processes are one run: the same samples, noise and losses; they stop, skip and end together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dihal.checkpoint import list_checkpoints, load_checkpoint
from dihal.config import BackboneConfig, DataConfig, ScoreConfig, ScoreRunConfig, TrainConfig
from dihal.training.logs import read_records
from tests import jobs

STEPS = 100
FOREVER = 1_000_000


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.prepare(tmp_path_factory.mktemp("ranks"))


def whole(folder: Path, prepared: Path, ranks: int) -> TrainConfig:
    changes = {"method.objective.kl": 0.5, "method.denoiser.self_conditioning": 0.5, "trainer.save_every": 50}
    config = jobs.configuration(prepared, folder / f"ranks-{ranks}", steps=STEPS, **changes)
    if ranks > 1:
        data, trainer = (
            replace(config.data, batch_size=1),
            replace(config.trainer, accumulate=jobs.BATCH // ranks, devices=ranks),
        )
        config = replace(config, data=data, trainer=trainer)
    assert jobs.finish(jobs.start(config, ("record_draws", (str(folder / f"draws-{ranks}"),)))) == [0] * ranks
    return config


def test_two_ranks_are_one(prepared: Path, tmp_path: Path) -> None:
    one, two = whole(tmp_path, prepared, 1), whole(tmp_path, prepared, 2)
    drawn = jobs.draws(tmp_path / "draws-1", 1)
    assert jobs.draws(tmp_path / "draws-2", 2) == drawn
    assert {step for step, *_ in drawn} == {str(step) for step in range(STEPS)}
    assert {purpose for _, purpose, *_ in drawn} >= {"sample", "noise", "time/shift"}
    left, right = jobs.losses(one.out), jobs.losses(two.out)
    assert len(left) == len(right) == STEPS
    for a, b in zip(left, right, strict=True):
        assert a[:2] == b[:2]
        assert b[2] == pytest.approx(a[2], rel=1e-3)
    assert [p.name for p in list_checkpoints(two.out)] == ["step-00000050", "step-00000100"]
    states = [load_checkpoint(config.out).state for config in (one, two)]
    assert states[0]["tokens"] == states[1]["tokens"]
    assert [state["flops"].pop("preparation") for state in states][1] > 0  # every process measures by itself
    assert states[0]["flops"] == states[1]["flops"]


@pytest.mark.parametrize(
    ("number", "to"), [(signal.SIGTERM, (0, 1)), (signal.SIGTERM, (1,)), (signal.SIGUSR1, (0,))], ids=str
)
def test_a_signal_stops_all_ranks(prepared: Path, tmp_path: Path, number: signal.Signals, to: tuple[int, ...]) -> None:
    config = jobs.over_ranks(jobs.configuration(prepared, tmp_path / "run", steps=FOREVER), 2)
    ranks = jobs.start(config)
    seen = jobs.wait_for_step(config, 3, ranks)
    for rank in to:
        assert ranks[rank].pid
        os.kill(ranks[rank].pid, number)
    assert jobs.finish(ranks) == [143, 143]
    assert load_checkpoint(config.out).state["step"] >= seen
    assert not list((Path(config.out) / "checkpoints").glob(".*"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_dead_rank_ends_the_job(prepared: Path, tmp_path: Path, rank: int) -> None:
    config = jobs.over_ranks(jobs.configuration(prepared, tmp_path / "run", steps=FOREVER), 2)
    ranks = jobs.start(config)
    jobs.wait_for_step(config, 3, ranks)
    started = time.monotonic()
    ranks[rank].kill()
    codes = jobs.finish(ranks, 60)
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] not in (0, None), f"after {time.monotonic() - started:.0f} s"


def test_a_loss_that_is_not_finite_on_one_rank_moves_nothing_on_any(prepared: Path, tmp_path: Path) -> None:
    """Steps 4 and 5 are the last: what every rank holds at the end is what it held before them."""
    changes = {"trainer.save_every": 1, "trainer.keep": 9}
    config = jobs.over_ranks(jobs.configuration(prepared, tmp_path / "run", steps=5, **changes), 2)
    hooks = (("poison", (1, 3, 4)), ("write_final", (str(tmp_path / "final"),)))
    assert jobs.finish(jobs.start(config, *hooks)) == [0, 0]
    before = load_checkpoint(Path(config.out) / "checkpoints" / "step-00000003")
    for rank in (0, 1):
        groups = torch.load(f"{tmp_path / 'final'}.{rank}", weights_only=True)
        assert sorted(groups) == ["ema", "model", "optimizer"]
        for name, tensors in groups.items():
            saved = before.tensors(name)
            assert tensors.keys() == saved.keys()
            assert all(torch.equal(tensors[key], saved[key]) for key in saved), f"{name} on rank {rank}"
    found = [r for r in read_records(Path(config.out) / "metrics.jsonl") if r["kind"] == "skipped"]
    assert [(r["step"], r["reason"], r["skipped"]) for r in found] == [(4, "nonfinite", 1), (5, "nonfinite", 2)]
    # Rank 1 has the second half of the global batch.
    assert [r["sample_ids"] for r in found] == [[14, 15], [18, 19]]


def test_too_many_in_a_row_end_all_ranks_with_their_own_status(prepared: Path, tmp_path: Path) -> None:
    config = jobs.configuration(prepared, tmp_path / "run", steps=FOREVER, **{"trainer.max_nonfinite": 3})
    config = jobs.over_ranks(config, 2)
    assert jobs.finish(jobs.start(config, ("poison", (1, 1, 4, 5, 6)))) == [3, 3]
    assert load_checkpoint(config.out).state["step"] == 7
    assert "3 steps in a row were not finite" in (tmp_path / "run.log").read_text()


def test_a_save_that_fails_ends_all_ranks(prepared: Path, tmp_path: Path) -> None:
    """A file stands where the folder of checkpoints should be."""
    config = jobs.configuration(prepared, tmp_path / "run", steps=FOREVER, **{"trainer.save_every": 2})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("")
    assert jobs.finish(jobs.start(jobs.over_ranks(config, 2))) == [2, 2]
    assert "cannot" in (tmp_path / "run.log").read_text()


def test_the_first_process_starts_the_others_and_has_the_last_word(prepared: Path, tmp_path: Path) -> None:
    """`python train.py trainer.devices=2`: its status is that of the run, whatever Lightning thinks of the others."""
    import subprocess
    import sys

    from dihal.config.cli import dump

    config = replace(jobs.configuration(prepared, tmp_path / "run", steps=FOREVER), resume=False)
    config = jobs.over_ranks(config, 2)
    (tmp_path / "run.yaml").write_text(dump(config))
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["MASTER_PORT"] = str(jobs.free_port())
    process = subprocess.Popen(
        [sys.executable, str(root / "train.py"), "--config", str(tmp_path / "run.yaml")],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    deadline = time.monotonic() + 200
    while not read_records(tmp_path / "run" / "metrics.jsonl") and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = (Path("/proc") / str(process.pid) / "task" / str(process.pid) / "children").read_text().split()
    os.kill(int(children[0]), signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert load_checkpoint(config.out).state["step"] > 0


def test_shards_are_one_bridge(prepared: Path, tmp_path: Path) -> None:
    """FSDP2 on two ranks: the losses of DDP; a checkpoint goes on under either strategy."""
    changes = {
        "method.objective.kl": 0.5,
        "method.lora.rank": 2,
        "trainer.accumulate": 2,
        "trainer.save_every": 6,
        "trainer.validate_batches": 1,
    }
    replicated = jobs.configuration(prepared, tmp_path / "ddp", steps=2 * 12, **changes)
    replicated = jobs.over_ranks(replicated, 2)
    sharded = replace(replicated, out=str(tmp_path / "fsdp"), trainer=replace(replicated.trainer, strategy="fsdp"))
    for config in (replicated, sharded):
        assert jobs.finish(jobs.start(config)) == [0, 0], Path(f"{config.out}.log").read_text()
    left, right = jobs.losses(replicated.out), jobs.losses(sharded.out)
    assert len(left) == len(right) == 12
    for a, b in zip(left, right, strict=True):
        assert b[2] == pytest.approx(a[2], rel=1e-5)
        assert b[3] == pytest.approx(a[3], rel=1e-4)
    one, two = (
        [r for r in read_records(Path(config.out) / "metrics.jsonl") if r["kind"] == "validation"][-1]
        for config in (replicated, sharded)
    )
    assert two["ema_loss"] == pytest.approx(one["ema_loss"], rel=1e-5)
    assert one["ema_loss"] != one["loss"]
    # Whole tensors, as under DDP: the second half of one run continues the other.
    checkpoints = [load_checkpoint(config.out) for config in (replicated, sharded)]
    assert checkpoints[0].names == checkpoints[1].names
    for name in checkpoints[0].names:
        whole_tensors = [checkpoint.tensors(name) for checkpoint in checkpoints]
        assert whole_tensors[0].keys() == whole_tensors[1].keys()
        for key, value in whole_tensors[0].items():
            torch.testing.assert_close(whole_tensors[1][key], value, rtol=1e-3, atol=1e-5)
    for before, after in ((replicated, sharded), (sharded, replicated)):
        crossed = replace(after, out=str(tmp_path / f"from-{Path(before.out).name}"), resume=True)
        shutil.copytree(Path(before.out) / "checkpoints", Path(crossed.out) / "checkpoints")
        shutil.rmtree(list_checkpoints(crossed.out)[-1])
        shutil.copy(Path(before.out) / "metrics.jsonl", crossed.out)
        assert jobs.finish(jobs.start(crossed)) == [0, 0], Path(f"{crossed.out}.log").read_text()
        assert [row[0] for row in jobs.losses(crossed.out)] == list(range(1, 13))
        for a, b in zip(left, jobs.losses(crossed.out), strict=True):
            assert b[2] == pytest.approx(a[2], rel=1e-4)


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a report with its place in it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield name, value
        return
    for key, item in items:
        yield from numbers(item, f"{name}.{key}")


def test_a_score_is_that_of_one_process(prepared: Path, tmp_path: Path) -> None:
    """More chunks than processes, a pilot of several, windows of unequal length, sinks, intervals."""
    reports = []
    for ranks in (1, 2, 3):
        config = ScoreRunConfig(
            backbone=BackboneConfig(id=str(prepared / "backbone"), device="cpu"),
            data=DataConfig(source=str(prepared / "text.jsonl"), validation_fraction=0.2),
            score=ScoreConfig(
                tokens=5_000, sequence_length=150, batch_tokens=400, anchors=40, neighbours=8, pool=600, bootstrap=20,
                norm_factor=1.5,
            ),
            out=str(tmp_path / f"score-{ranks}"),
        )  # fmt: skip
        assert jobs.finish(jobs.start_scoring(config, ranks)) == [0] * ranks, Path(f"{config.out}.log").read_text()
        report = json.loads((tmp_path / f"score-{ranks}" / "scores.json").read_text())
        del report["provenance"]
        reports.append(dict(numbers(report)))
    one = reports[0]
    assert any(value for name, value in one.items() if "dropped_norm" in name)
    for other in reports[1:]:
        assert one.keys() == other.keys()
        for name, value in one.items():
            if isinstance(value, float):
                # What the neighbours say is identical; sums are equal to 1e-12, and so is what follows from them
                # but for differences of nearly equal numbers (z-scores) and square roots of small ones (spectra).
                tight = any(part in name for part in ("mean_eigenvalue", "largest_eigenvalue", "log_trace", "norm"))
                assert other[name] == pytest.approx(value, rel=1e-12 if tight else 1e-9, abs=1e-12), name
            else:
                assert other[name] == value, name
