from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dihal.errors import UsageError
from dihal.sweep.report import SweepReport
from dihal.sweep.table import beside_markdown, build_table, to_markdown, verdict
from tests.unit.sweep import kit

LAYERS = 8
LOSS = np.array([9.0, 0.8, 0.5, 0.2, 0.3, 0.4, 0.6, 0.7])


@pytest.fixture(scope="module")
def report() -> SweepReport:
    predictors = [
        kit.predictor("score/rms", -LOSS, group="score", spread=0.05),
        kit.predictor("depth", np.arange(LAYERS), group="trivial", sign=-1.0),
        kit.predictor("probe", LOSS, group="states"),
        kit.predictor("intrinsic_dimension", np.full(LAYERS, np.nan), group="states"),
    ]
    return kit.report(predictors, [kit.truth("kl", LOSS, spread=0.02), kit.truth("nll", LOSS[::-1] + 3)])


def test_numbers(report: SweepReport) -> None:
    rows = report.relations["kl"]
    assert report.best_split() == 3  # split 0 is not asked, however good or bad
    assert report.best_split("nll") == 4
    assert rows["score/rms"].spearman.value == pytest.approx(1)
    assert rows["score/rms"].regret.value == 0
    assert rows["depth"].choice == 1
    assert rows["depth"].regret.value == pytest.approx(0.6)
    assert rows["probe"].opposite_regret == 0
    assert rows["intrinsic_dimension"].spearman.value is None
    assert report.truths["kl"]["random_regret"]["value"] == pytest.approx(LOSS[1:].mean() - 0.2)
    assert 0.9 < report.truths["kl"]["best_probability"] <= 1
    assert report.ranking[0] == "score/rms"
    assert report.ranking[-1] == "intrinsic_dimension"


def test_it_comes_back_from_its_file(report: SweepReport, tmp_path: Path) -> None:
    folder = report.save(tmp_path / "sweep")
    assert SweepReport.load(folder) == SweepReport.load(folder / "sweep.json")
    again = SweepReport.load(folder)
    assert again.to_dict() == json.loads((folder / "sweep.json").read_text())
    assert again.relations["kl"]["depth"] == report.relations["kl"]["depth"]
    assert {path.name for path in folder.iterdir()} == {
        "sweep.json", "sweep.md", "predictors.md", "sweep-replace.png", "sweep-replace.svg",
    }  # fmt: skip
    svg = (folder / "sweep-replace.svg").read_text()
    assert "the score/rms" in svg
    assert "KL" in svg
    again.save(tmp_path / "again")
    for name in ("sweep-replace.png", "sweep-replace.svg", "sweep.md", "sweep.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name


def test_what_is_no_record(tmp_path: Path, report: SweepReport) -> None:
    with pytest.raises(UsageError, match="not a sweep record"):
        SweepReport.from_dict({"schema": "dihal.scores/1"})
    with pytest.raises(UsageError, match="damaged"):
        SweepReport.from_dict({"schema": "dihal.sweep/1"})
    with pytest.raises(UsageError, match="no file"):
        SweepReport.load(tmp_path / "nothing.json")


def test_sentences(report: SweepReport) -> None:
    text = "\n".join(verdict(report))
    assert "least at split 3: 0.2000" in text
    assert "Predictors that choose the best split: the score/rms" in text
    assert "selects split 3 and costs 0 " in text
    assert "selects split" in "\n".join(verdict(report, "nll"))


@pytest.mark.parametrize("width", [None, 80, 200])
def test_terminal_table(report: SweepReport, width: int | None) -> None:
    console = Console(width=width or 220, record=True, file=io.StringIO())
    console.print(build_table(report, width))
    text = console.export_text()
    assert all(report.predictors[name]["label"] in text for name in report.predictors)
    assert ("Kendall" in text) == (width != 80)
    assert "n/a" in text
    assert "regret, nats" in text


def test_markdown_tables_are_whole(report: SweepReport) -> None:
    other = kit.report(
        [kit.predictor("depth", np.arange(5), sign=-1.0), kit.predictor("viv", np.arange(5) ** 2)],
        [kit.truth("text_nll", np.array([9.0, 4, 3, 2, 1]))],
        regime="generate",
    )
    for text in (to_markdown(report), to_markdown(other), beside_markdown([report, other]), beside_markdown([report])):
        lines = [line for line in text.splitlines() if line.startswith("|")]
        tables: list[list[int]] = [[]]
        for line, following in zip(text.splitlines(), [*text.splitlines()[1:], ""]):
            if line.startswith("|"):
                tables[-1].append(line.count("|"))
                if not following.startswith("|"):
                    tables.append([])
        assert lines
        assert all(len(set(table)) <= 1 for table in tables)
    both = beside_markdown([report, other])
    assert "generate: TEXT_NLL" in both
    assert "replace: KL" in both
    row = next(line for line in both.splitlines() if line.startswith("| the depth"))
    assert "-1.00" in row, "the deepest is the best under generate"
    assert next(line for line in both.splitlines() if line.startswith("| the viv")).startswith("| the viv |  |  |  |")


def test_a_figure_of_few_splits_without_the_control(tmp_path: Path) -> None:
    few = kit.report(
        [kit.predictor("depth", np.arange(9), sign=-1.0)], [kit.truth("text_nll", LOSS[[1, 3, 5]])],
        splits=[2, 5, 8], regime="generate",
    )  # fmt: skip
    few.save(tmp_path)
    assert (tmp_path / "sweep-generate.png").stat().st_size > 10_000
    assert "never selected" not in (tmp_path / "sweep-generate.svg").read_text()
