"""The whole job on a tiny backbone: score, train, evaluate, rank, generate."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dihal.checkpoint import load_checkpoint
from dihal.evaluation.result import Result, read_result
from tests.integration.conftest import BLOCKS, STEP, Dihal

ROOT = Path(__file__).parents[2]


def metric(result: Result, name: str, steps: int = 0) -> float:
    value = result.metrics[str(steps)][name].value
    assert value is not None
    return value


@pytest.fixture(scope="module")
def job(root: Path, tmp_path_factory: pytest.TempPathFactory, session_cache: Path) -> Path:
    """score -> train at the selected split -> evaluate with its leaderboard."""
    from dihal.cli import run_command

    folder = tmp_path_factory.mktemp("job")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIHAL_CACHE", str(session_cache))
        for command, words in (
            ("score", ["--out", folder / "score"]),
            ("train", ["--method.split_from", folder / "score", "--budget.tokens", 80 * STEP, "--out", folder / "bridge"]),
            ("evaluate", [
                "--checkpoints", folder / "bridge", "--samples", 3, "--prompt_tokens", 6, "--new_tokens", 6,
                "--out", folder / "results",
            ]),
        ):  # fmt: skip
            assert run_command(command, ["--config", str(root / f"{command}.yaml"), *map(str, words)]) == 0, command
    return folder


@pytest.fixture(scope="module")
def results(job: Path) -> dict[str, Result]:
    return {result.name: result for result in map(read_result, (job / "results").glob("*.json"))}


def test_the_score_selects_the_split_that_is_trained(job: Path) -> None:
    scores = json.loads((job / "score" / "scores.json").read_text())
    assert scores["selected_split"] in range(1, BLOCKS)
    assert load_checkpoint(job / "bridge").manifest["split"] == scores["selected_split"]
    for suffix in ("png", "svg"):
        assert (job / "score" / f"scores.{suffix}").stat().st_size > 1000


def test_the_table_means_something(results: dict[str, Result]) -> None:
    split = results["bridge"].split
    assert set(results) == {
        "backbone", "unigram", "bigram", "trigram", "real-text", "bridge",
        f"identity@{split}", f"embedding@{split}", f"mean-state@{split}", f"untrained@{split}",
        f"oracle@{split}", f"shuffled@{split}", f"random-suffix@{split}",
    }  # fmt: skip
    for bound in (results["backbone"], results[f"identity@{split}"]):
        assert metric(bound, "kl") == 0
        assert metric(bound, "agreement") == 1
    trained = metric(results["bridge"], "kl", 1)
    assert 0 < trained < 0.9 * metric(results[f"untrained@{split}"], "kl", 1)
    assert trained < 0.9 * metric(results[f"mean-state@{split}"], "kl")
    assert set(results["bridge"].text) == {"1", "2"}


def test_the_leaderboard_is_whole_and_self_contained(job: Path, results: dict[str, Result]) -> None:
    folder = job / "results"
    rows = list(csv.DictReader((folder / "leaderboard.csv").read_text().splitlines()))
    assert len(rows) >= 6
    assert any("bridge" in row.values() for row in rows)
    html = (folder / "leaderboard.html").read_text()
    assert all(name in html for name in results)
    assert "<svg" in html
    without_names = html.replace("http://www.w3.org/2000/svg", "").replace("http://www.w3.org/1999/xlink", "")
    for external in (r"https?://", r"""(?:src|href)\s*=\s*["'](?!#|data:)""", r"@import", r"url\((?!#)", r"<link\b"):
        assert not re.search(external, without_names), external
    for name in ("leaderboard.md", "leaderboard.png", "leaderboard.svg"):
        assert (folder / name).stat().st_size > 100


def test_leaderboard_command(job: Path, dihal: Dihal, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dihal("leaderboard", "--results", job / "results", "--sort_by", "nll", "--out", tmp_path / "board") == 0
    assert "backbone" in capsys.readouterr().out
    assert (tmp_path / "board" / "leaderboard.html").read_text().startswith("<!")


def test_generate_command(job: Path, dihal: Dihal, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--checkpoint", job / "bridge", "--prompt", "the state", "--new_tokens", 6, "--compare")
    assert dihal("generate", *words) == 0
    first = capsys.readouterr().out
    assert "hybrid, split" in first
    assert "backbone" in first
    assert dihal("generate", *words) == 0
    assert capsys.readouterr().out == first


def test_dry_run_writes_nothing(dihal: Dihal, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dihal("train", "--method.split", 1, "--out", tmp_path / "run", "--dry-run") == 0
    assert "trainable parameters" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


LAUNCHERS = [
    ("train.py", ["--config", "{root}/train.yaml", "method.split=1", f"budget.tokens={2 * STEP}"], "metrics.csv"),
    ("evaluate.py", ["--config", "{root}/evaluate.yaml", "--checkpoints", "{run}"], "leaderboard.html"),
]


@pytest.mark.parametrize(("script", "words", "made"), LAUNCHERS, ids=[case[0] for case in LAUNCHERS])
def test_launcher(script: str, words: list[str], made: str, root: Path, run: Path, tmp_path: Path) -> None:
    """In a process and a folder of its own, as a user starts it."""
    command = [sys.executable, str(ROOT / script), *(word.format(root=root, run=run) for word in words), "--out", "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / made).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
