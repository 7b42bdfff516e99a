"""The README's tables from small files made by hand."""

from __future__ import annotations

import dataclasses
import importlib.util
import types
from pathlib import Path

import numpy as np
import pytest

from dihal.errors import UsageError
from dihal.evaluation.frontier.board import build_board
from dihal.evaluation.frontier.result import FrontierRow, write_row
from dihal.evaluation.result import read_result, write_result
from dihal.io import ensure_dir, write_json
from dihal.sweep.report import FILE_NAME
from tests.unit.evaluation.frontier_kit import bounds, line, make_row, train_config
from tests.unit.evaluation.kit import make_result
from tests.unit.sweep import kit as sweep_kit

FRONTIER = "<!-- frontier: results/frontier/*.json at 3.2 3.5 -->\n{}<!-- end frontier -->"
STEPS = "<!-- steps: results/steps/split*/*.json -->\n{}<!-- end steps -->"
SWEEP = "<!-- sweep: results/sweep*/sweep.json -->\n{}<!-- end sweep -->"


@pytest.fixture(scope="module")
def readme() -> types.ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "readme.py"
    spec = importlib.util.spec_from_file_location("readme_tables", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(text: str) -> list[dict[str, str]]:
    """A Markdown table between marks, by heading."""
    lines = [[cell.strip() for cell in found.strip("|").split(" | ")] for found in text.splitlines() if found[0] == "|"]
    assert lines, "no table"
    assert len({len(cells) for cells in [lines[0], *lines[2:]]}) == 1
    return [dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]]


@pytest.mark.parametrize("marks", [FRONTIER, STEPS, SWEEP])
def test_a_table_without_files_is_left_out(readme, tmp_path, marks):
    text = f"before\n{marks.format('')}\nafter\n"
    assert readme.filled(text, tmp_path) == text
    old = "before\n" + marks.format("| an old table |\n") + "\nafter\n"
    assert readme.filled(old, tmp_path) == text, "a table whose files are gone is kept"


def test_text_without_marks_stays_as_it_is(readme, tmp_path):
    assert readme.filled("# DiHAL\n<!-- a remark -->\n", tmp_path) == "# DiHAL\n<!-- a remark -->\n"


def test_an_unknown_kind_is_told(readme, tmp_path):
    with pytest.raises(SystemExit, match="no table 'sweeps'"):
        readme.filled("<!-- sweeps: a.json -->\n<!-- end sweeps -->", tmp_path)


def test_named_results_must_exist(readme, tmp_path):
    with pytest.raises(UsageError, match="gone"):
        readme.filled("<!-- results: gone.json -->\n<!-- end results -->", tmp_path)


# -- frontier


def write_rows(root: Path, *rows: FrontierRow) -> None:
    folder = ensure_dir(root / "results" / "frontier")
    for row in [*bounds(), *rows]:
        write_row(folder / f"{row.name.replace(' ', '-')}.json", row)


def frontier_rows(readme: types.ModuleType, root: Path) -> dict[str, dict[str, str]]:
    text = readme.filled(FRONTIER.format("| old |\n"), root)
    assert readme.filled(text, root) == text
    return {row["row"]: row for row in rows_of(text)}


def test_the_frontier_table_shows_rows_at_equal_entropy_with_their_cost(readme, tmp_path):
    single = make_row("latent own", line(4.0), noise=0.5, writing={"readout": "own"})
    write_rows(tmp_path, single, make_row("bigram", line(6.0), kind="control"))
    found = frontier_rows(readme, tmp_path)
    assert list(found) == ["real text", "backbone", "latent own", "bigram"]
    row = found["latent own"]
    (curve,) = build_board([(Path("a"), single)], entropies=[3.2, 3.5], span=(3.0, 4.0)).curves
    nll = curve.matched[1].nll
    assert row["NLL @ 3.50"] == f"4.50 [{nll.low:.2f}, {nll.high:.2f}]"
    assert nll.low < 4.5 < nll.high
    assert row["NLL @ 3.20"].startswith("4.20 [")
    assert row["agreement @ 3.50"].startswith("0.20 [")
    assert (row["NFE"], row["GFLOP/token"], row["training tokens"]) == ("16", "3", "100M")
    assert row["training seeds"] == "1 (0)"
    assert (found["backbone"]["training seeds"], found["backbone"]["training tokens"]) == ("-", "-")


def test_the_best_reading_of_each_method_is_of_fewer_passes_than_tokens(readme, tmp_path):
    def row(label: str, nll: float, nfe: int) -> FrontierRow:
        found = make_row(f"latent {label}", line(nll), writing={"readout": label})
        points = [dataclasses.replace(point, nfe=nfe) for point in found.points]
        return dataclasses.replace(found, points=points, config={"variants": [f"{label}: readout={label}"]})

    few = bounds()[0].comparable.new_tokens - 1
    write_rows(tmp_path, row("own", 4.5, few), row("fused", 4.2, few), row("suffix", 4.0, few + 1))
    text = readme.filled("<!-- best: results/frontier/*.json at 3.5 -->\n<!-- end best -->", tmp_path)
    (found,) = rows_of(text)
    assert found == {
        "trained": "latent",
        "least NLL @ 3.50": "4.70 [4.70, 4.70]",
        "read by (passes)": f"fused ({few})",
        "rows": "2",
    }


def test_seeds_stand_in_one_row_and_steps_are_those_of_the_largest_area(readme, tmp_path):
    rows = [make_row(f"hidden-{n}", line(4.0 + n), steps=(16,), train=train_config(n)) for n in (0, 1)]
    worse = [make_row(f"hidden-{n}", line(5.0 + n), steps=(64,), train=train_config(n)) for n in (0, 1)]
    both = [
        dataclasses.replace(one, points=[*one.points, *other.points], planned=4)
        for one, other in zip(rows, worse, strict=True)
    ]
    write_rows(tmp_path, *both)
    found = frontier_rows(readme, tmp_path)
    assert list(found) == ["real text", "backbone", "hidden-{0, 1}"]
    row = found["hidden-{0, 1}"]
    assert row["steps (largest area)"] == "16"
    assert row["NLL @ 3.50"] == "5.00 (4.50 to 5.50)"
    assert row["training seeds"] == "2 (0, 1)"
    assert row["GFLOP/token"] == "3"


def test_unlike_rows_are_refused(readme, tmp_path):
    other = make_row("latent own", line(4.0))
    other = dataclasses.replace(other, comparable=dataclasses.replace(other.comparable, scorer="x"))
    write_rows(tmp_path, other)
    with pytest.raises(UsageError, match="scorer is"):
        frontier_rows(readme, tmp_path)


# -- steps


def write_results(root: Path, *, budget: str = "steps") -> None:
    made = {
        "split10": [
            make_result("bridge10", {1: 0.12, 16: 0.09}, split=10, seed=1, parameters=10**6, budget="steps"),
            make_result("regression10", {1: 0.11}, split=10, seed=2, parameters=10**6, budget="steps"),
        ],
        "split3": [
            make_result("bridge3", {1: 0.03, 2: 0.031, 16: 0.035}, split=3, seed=3, parameters=10**6, budget="steps"),
            make_result("regression3", {1: 0.02}, split=3, seed=4, parameters=10**6, budget=budget),
            make_result("backbone", {0: 0.0}, kind="bound", split=None),
        ],
    }
    for folder, results in made.items():
        for result in results:
            if result.name.startswith("regression"):
                result = dataclasses.replace(result, method="regression")
            write_result(ensure_dir(root / "results" / "steps" / folder) / f"{result.name}.json", result)


def test_kl_over_steps_by_split(readme, tmp_path):
    write_results(tmp_path)
    text = readme.filled(STEPS.format(""), tmp_path)
    rows = rows_of(text)
    assert [(row["split"], row["method"]) for row in rows] == [
        ("3", "bridge (`bridge3`)"),
        ("3", "regression (`regression3`)"),
        ("10", "bridge (`bridge10`)"),
        ("10", "regression (`regression10`)"),
    ]
    assert list(rows[0])[2:] == ["KL at 1 step", "KL at 2 steps", "KL at 16 steps"]
    kl = read_result(tmp_path / "results/steps/split3/bridge3.json").metrics["2"]["kl"]
    assert rows[0]["KL at 2 steps"] == f"{kl.value:.3f} [{kl.low:.3f}, {kl.high:.3f}]"
    assert (rows[1]["KL at 2 steps"], rows[1]["KL at 16 steps"]) == ("-", "-")
    bold = [(row["split"], row["method"][:6], name) for row in rows for name, cell in row.items() if cell[:2] == "**"]
    assert bold == [("3", "regres", "KL at 1 step"), ("10", "bridge", "KL at 16 steps")]


def test_unlike_budgets_are_refused(readme, tmp_path):
    write_results(tmp_path, budget="richer")
    with pytest.raises(UsageError, match=r"budget\.name"):
        readme.filled(STEPS.format(""), tmp_path)


# -- sweep


def write_sweep(root: Path, folder: str, *, regime: str) -> None:
    generator = np.random.default_rng(0)
    loss = np.array([0.5, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8])
    good = [sweep_kit.predictor(f"good-{n}", -loss + 0.001 * n, spread=0.05, seed=n) for n in range(6)]
    bad = sweep_kit.predictor("a|b", loss)
    score = sweep_kit.predictor("score", loss + 0.01 * generator.normal(size=8), group="score", spread=0.05)
    report = sweep_kit.report([score, bad, *good], [sweep_kit.truth("kl", loss, spread=0.01)], regime=regime)
    write_json(ensure_dir(root / "results" / folder) / FILE_NAME, report.to_dict())


def test_the_sweep_table_shows_the_best_predictors_and_every_geometry_score(readme, tmp_path):
    write_sweep(tmp_path, "sweep", regime="replace")
    only = rows_of(readme.filled(SWEEP.format(""), tmp_path))
    write_sweep(tmp_path, "sweep-write", regime="generate")
    rows = rows_of(readme.filled(SWEEP.format(""), tmp_path))
    assert {row["regime: truth"] for row in only} == {"replace: KL"}
    assert {row["regime: truth"] for row in rows} == {"replace: KL", "generate: KL"}
    assert [row["predictor"] for row in only] == [*(f"the good-{n}" for n in range(5)), "the score"]
    best, score = only[0], only[-1]
    assert best["Spearman"].startswith("1.00 [")
    assert best["Kendall"].startswith("1.00 [")
    assert best["chooses split"] == "1"
    assert best["top-1 regret"].startswith("0.0000 [")
    assert score["Spearman"].startswith("-1.00 [") or score["Spearman"].startswith("-0.9")
    assert score["chooses split"] == "7"
    assert score["top-1 regret"].startswith("0.7000 [")
    assert score["top-1 regret"].endswith("nats")


def test_a_bar_in_a_label_does_not_break_the_table(readme):
    assert readme._table(["a"], [["x|y"]]).splitlines()[2] == "| x\\|y |"


def test_a_damaged_sweep_is_refused(readme, tmp_path):
    write_json(ensure_dir(tmp_path / "results" / "sweep") / FILE_NAME, {"schema": "dihal.sweep/0"})
    with pytest.raises(UsageError, match="not a sweep record"):
        readme.filled(SWEEP.format(""), tmp_path)


def _interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def _compared(label: str, null: bool) -> dict[str, object]:
    """The part of a compare.json that the table reads."""
    overlap = [{"k": k, "jaccard": _interval(k / 2000), "ceiling": 0.8} for k in (100, 1000)]
    runs = {"in_second": {"first": _interval(0.9), "second": _interval(0.95)}}
    return {
        "labels": ["embedded", label],
        "task": {"task": "ioi"},
        "behaviour": [{"accuracy": 1.0}, {"accuracy": 0.75}],
        "verdict": {"call": "kept"},
        "overlap": overlap,
        "function": runs,
        "whole": {"concentration": {"edges": {"change": {"value": 1.0, "low": 0.0, "high": 2.0}}}},
        "depth": {"writer": {"change": {"center": _interval(-0.3)}}},
        **({"noise_matched_null": {"overlap": overlap, "function": runs}} if null else {}),
    }


def test_the_table_of_circuits_shows_what_is_shared_beside_its_null(readme, tmp_path):
    for name, null in (("a", True), ("b", False)):
        folder = ensure_dir(tmp_path / "results" / "circuits" / name)
        compared = _compared("hybrid of embedded at split 3", null)
        if not null:
            pool = {"pairs": 40, "solved": [36, 18], "together": 18}
            compared["task"]["selected_from"] = {"discovery": pool, "test": {**pool, "solved": [40, 40]}}
        write_json(folder / "compare.json", compared)
    marks = "<!-- circuits: results/circuits/*/compare.json -->\n<!-- end circuits -->"
    first, second = rows_of(readme.filled(marks, tmp_path))
    assert first["backbone against"] == "bridge at split 3"
    assert first["accuracy"] == "1.00 -> 0.75"
    assert second["accuracy"] == "0.90 -> 0.45", "of the pairs tried, not of those chosen because both solve them"
    assert first["shared of the top 1,000 edges (ceiling; noise null)"] == "0.50 [0.40, 0.60] (0.80; 0.50)"
    assert second["shared of the top 1,000 edges (ceiling; noise null)"] == "0.50 [0.40, 0.60] (0.80; -)"
    assert first["backbone's circuit run in it (its own; noise null)"] == "0.90 [0.80, 1.00] (0.95; 0.90)"
    assert first["effective number of edges, x"] == "2.00 [1.00, 4.00]"
