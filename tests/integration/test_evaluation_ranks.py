"""Several processes evaluate as one: the same files to the last bit, one voice, one end."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dihal.cli import run_command
from dihal.config import EvalConfig
from dihal.config.cli import dump
from dihal.controls import Identity
from dihal.evaluation.run import evaluate
from tests import jobs
from tests.integration.test_ranks import numbers
from tests.unit.evaluation.kit import make_run

MAY_DIFFER = (".evaluation_seconds", ".tokens_per_second", ".provenance", ".command", ".config.out")
"""Between two evaluations of the same thing: clocks, who called and when, where it went."""


# -- what happens to the states of the identity row in a process, and where


def _nan(states: torch.Tensor) -> torch.Tensor:
    return states * float("nan")


def _killed(states: torch.Tensor) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    return states


def _broken(states: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("a defect")


_FAULTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"nan": _nan, "killed": _killed, "broken": _broken}


def _work(file: str, environment: dict[str, str], log: str, fault: str) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    if fault:
        states = Identity.states
        Identity.states = lambda *args, **rest: _FAULTS[fault](states(*args, **rest))  # type: ignore[method-assign]
    sys.exit(run_command("evaluate", ["--config", file]))


def run(config: EvalConfig, ranks: int, *, faults: dict[int, str] | None = None) -> list[int | None]:
    """`dihal evaluate` in so many processes, as torchrun starts them; their exit codes. Each has a log of its own."""
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.parent / f"{out.name}.yaml"
    file.write_text(dump(config))
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(jobs.free_port()), "WORLD_SIZE": str(ranks)}
    common |= {"DIHAL_CACHE": os.environ["DIHAL_CACHE"], "HF_HUB_OFFLINE": "1"}
    processes = []
    for rank in range(ranks):
        own = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        given = (str(file), own, log_of(config, rank), (faults or {}).get(rank, ""))
        processes.append(jobs._CONTEXT.Process(target=_work, args=given))
        processes[-1].start()
    return jobs.finish(processes, 60)


def log_of(config: EvalConfig, rank: int) -> str:
    return f"{config.out}.{rank}.log"


def said(config: EvalConfig, rank: int) -> str:
    return Path(log_of(config, rank)).read_text()


def results(folder: str | Path) -> Iterator[tuple[str, Any]]:
    """Every number and word of the result files that says what was found."""
    for path in sorted(Path(folder).glob("*.json")):
        for name, value in numbers(json.loads(path.read_text()), path.name):
            if not any(part in name for part in MAY_DIFFER):
                yield name, value


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, session_cache: Path) -> EvalConfig:
    """Documents of several windows that go on from batch to batch; batches and samples that no rank count divides."""
    root = tmp_path_factory.mktemp("evaluation-ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIHAL_CACHE", str(session_cache))
        make_run(root, "bridge", steps=20)
        config = EvalConfig(
            checkpoints=(str(root / "bridge"),), windows_per_document=None, tokens=1_000, batch_size=3, steps=(1, 2),
            samples=7, prompt_tokens=8, new_tokens=6, bootstrap=50, out=str(root / "one"),
        )  # fmt: skip
        evaluate(config)
    return config


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_files_are_those_of_one_process(config: EvalConfig, tmp_path: Path, ranks: int) -> None:
    shared = dataclasses.replace(config, out=str(tmp_path / "out"))
    assert run(shared, ranks) == [0] * ranks, said(shared, 0)
    one, several = list(results(config.out)), list(results(shared.out))
    assert len(one) > 1_000
    assert any(name.startswith("bridge.json.per_document.2.state_variance") for name, _ in one)
    assert any(name.startswith("bridge.json.text.2") for name, _ in one)
    assert several == one
    assert (Path(shared.out) / "leaderboard.html").is_file()
    log = said(shared, 0)
    assert "Leaderboard" in log
    assert all(log.count(f"{path.stem}: written") == 1 for path in Path(shared.out).glob("*.json"))
    assert [said(shared, rank) for rank in range(1, ranks)] == [""] * (ranks - 1)


def test_finished_rows_are_kept_on_all_processes(config: EvalConfig, tmp_path: Path) -> None:
    """One process goes on with what two began: they decide alike what is still to be measured."""
    begun = dataclasses.replace(config, out=str(tmp_path / "out"), samples=0, leaderboard=False)
    evaluate(begun)
    before = list(results(begun.out))
    (tmp_path / "out" / "bridge.json").unlink()
    kept = {path.name: path.stat().st_mtime_ns for path in Path(begun.out).glob("*.json")}
    assert run(begun, 2) == [0, 0], said(begun, 0)
    assert list(results(begun.out)) == before
    assert {name: (Path(begun.out) / name).stat().st_mtime_ns for name in kept} == kept
    assert "already measured, kept" in said(begun, 0)
    assert not (tmp_path / "out" / "leaderboard.html").exists()


def test_bad_input_is_told_once_whichever_process_found_it(config: EvalConfig, tmp_path: Path) -> None:
    for name, changes, message in (
        ("options", {"steps": (0,)}, "steps must name"),
        ("rows", {"reference": "backbon"}, "Did you mean 'backbone'"),
        ("folder", {}, "cannot write to the output folder"),
    ):
        wrong = dataclasses.replace(config, out=str(tmp_path / name), **changes)
        if name == "folder":
            Path(wrong.out).write_text("")
        assert run(wrong, 2) == [2, 0], said(wrong, 0)
        assert said(wrong, 0).count("error:") == 1
        assert message in said(wrong, 0)
        assert said(wrong, 1) == ""
        assert not Path(wrong.out).is_dir(), "nothing is left behind"
    ill = dataclasses.replace(config, out=str(tmp_path / "nan"), samples=0)
    assert run(ill, 2, faults={1: "nan"}) == [2, 0], "the first has the last word"
    assert "row 'identity@2', 0 steps: " in said(ill, 0)
    assert "states are NaN or infinite" in said(ill, 0)
    assert said(ill, 1) == ""


@pytest.mark.parametrize("fault", ["killed", "broken"])
def test_a_process_that_dies_ends_the_others(config: EvalConfig, tmp_path: Path, fault: str) -> None:
    ill = dataclasses.replace(config, out=str(tmp_path / "out"), samples=0)
    codes = run(ill, 2, faults={1: fault})
    assert codes[1] == (-signal.SIGKILL if fault == "killed" else 1)
    assert codes[0] not in (0, None), "it does not wait for a process that is gone"
    assert ("a defect" in said(ill, 1)) == (fault == "broken")
    assert not list(tmp_path.glob("out/*.json"))
