"""The reading by which each trained method does best."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dihal.config import SamplerConfig
from dihal.evaluation.frontier import report
from dihal.evaluation.frontier.best import best_cells, best_markdown, best_readings
from dihal.evaluation.frontier.board import build_board
from dihal.evaluation.frontier.result import FrontierRow, write_row
from tests.unit.evaluation.frontier_kit import bounds, line, make_row, train_config


def reading(
    run: str, label: str, nll: float, *, seed: int = 0, nfe: int = 16, to: float = 4.0, **options
) -> FrontierRow:
    writing = {"readout": "own", "project": 0.0} | options.pop("writing", {})
    row = make_row(f"{run} {label}", line(nll, to=to), train=train_config(seed, **options), writing=writing)
    points = [dataclasses.replace(point, nfe=nfe) for point in row.points]
    return dataclasses.replace(
        row, points=points, config={"variants": ["stack: readout=suffix", f"{label}: x=1", label]}
    )


def board(*rows: FrontierRow, entropies=(3.5, 3.9)):
    found = [(Path("results") / f"{row.name}.json", row) for row in [*bounds(), *rows]]
    return build_board(found, entropies=entropies, span=(3.0, 4.0))


def test_each_method_has_its_least_nll_at_each_entropy_and_says_by_which_row():
    short = reading("write-a", "short", 4.0, to=3.6, writing={"readout": "fused"})
    found = best_readings(board(reading("write-a", "long", 4.5), short))
    (item,) = found
    assert (item.run, item.rows) == ("write-a", 2)
    cells = best_cells(item)
    assert cells["nll_0"].startswith("4.50")
    assert cells["reading_0"] == "short (16)"
    assert cells["nll_1"].startswith("5.40"), "the row that is better elsewhere does not reach it"
    assert cells["reading_1"] == "long (16)"


def test_a_row_above_the_entropy_may_be_the_best():
    above = dataclasses.replace(reading("write-a", "above", 4.0), points=reading("write-a", "x", 4.0).points[1:])
    (item,) = best_readings(board(above, reading("write-a", "at", 4.8, writing={"readout": "fused"})))
    # 5.0 at entropy 4.0 is worse than 5.3 at 3.5 in entropy asked for, not in NLL.
    assert best_cells(item)["nll_0"].endswith(" at 4.00")
    assert best_cells(item)["reading_0"] == "above (16)"


def test_seeds_are_one_method_and_rows_with_fewer_of_them_do_not_count():
    rows = [reading(f"write-a-{n}", "own", 4.0 + n, seed=n) for n in (0, 1)]
    lucky = reading("write-a-0", "fused", 3.0, writing={"readout": "fused"})
    (item,) = best_readings(board(*rows, lucky))
    assert (item.run, item.rows) == ("write-a-{0, 1}", 2)
    assert best_cells(item)["nll_0"] == "5.00 (4.50 to 5.50)"
    assert best_cells(item)["reading_0"] == "own (16)"
    (alone,) = best_readings(board(rows[0], lucky))
    assert best_cells(alone)["reading_0"] == "fused (16)"


def test_rows_of_too_many_passes_and_of_the_frozen_stack_alone_do_not_count():
    many = reading("write-a", "many", 3.0, nfe=96, writing={"readout": "fused"})
    stack = reading("write-a", "stack", 3.2, writing={"readout": "suffix", "project": 1.0})
    states = reading("write-a", "suffix", 5.0, writing={"readout": "suffix", "project": 0.0})
    own = reading("write-a", "own", 4.0)
    found = board(many, stack, states, own)
    (item,) = best_readings(found, passes=96)
    assert item.rows == 2, "a frozen stack that reads denoised states is a reading of them"
    assert best_cells(item)["reading_0"] == "own (16)"
    assert best_cells(best_readings(found)[0])["reading_0"] == "many (96)"


def test_methods_stand_by_the_first_entropy_and_one_that_reaches_none_is_last():
    rows = [
        reading("write-b", "own", 4.6, method={"sampler": SamplerConfig(steps=3)}),
        reading("write-a", "own", 4.2),
        reading("write-c", "own", 4.0, to=3.1, method={"sampler": SamplerConfig(steps=4)}),
    ]
    found = best_readings(board(*rows))
    assert [item.run for item in found] == ["write-a", "write-b", "write-c"]
    assert best_cells(found[-1])["nll_0"] == best_cells(found[-1])["reading_1"] == ""


def test_the_report_has_the_table_where_a_method_has_several_rows(tmp_path):
    own = reading("write-a", "own", 4.5, nfe=4)
    rows = [own, reading("write-a", "fused", 4.0, nfe=4, writing={"readout": "fused"})]
    for index, row in enumerate([*bounds(), *rows]):
        write_row(tmp_path / f"{index}.json", row)
    report([tmp_path], tmp_path / "out", entropies=[3.5], span=(3.0, 4.0))
    text = (tmp_path / "out" / "frontier.md").read_text(encoding="utf-8")
    assert "| write-a | 4.50 [4.50, 4.50] | fused (4) | 2 |" in text.split("## Best reading")[1]
    assert best_markdown(board(own)) == ""


def test_runs_keep_what_tells_them_apart_and_a_row_without_variant_is_as_trained():
    rows = [reading(f"{name}/write a", "own, late", 4.0 + index, seed=index) for index, name in enumerate("ab")]
    (item,) = best_readings(board(*rows))
    assert item.run == "{a, b}/write a"
    assert best_cells(item)["reading_0"] == "own, late (16)"
    plain = dataclasses.replace(rows[0], name="write own", config={"variants": []})
    (item,) = best_readings(board(plain))
    assert (item.run, best_cells(item)["reading_0"]) == ("write own", "as trained (16)")
