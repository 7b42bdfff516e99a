"""Several training seeds of one method in a frontier table."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from dihal.config import SamplerConfig
from dihal.evaluation.frontier import report
from dihal.evaluation.frontier.board import Board, SeedGroup, build_board
from dihal.evaluation.frontier.page import to_html
from dihal.evaluation.frontier.result import FrontierRow, read_row, write_row
from dihal.evaluation.frontier.table import curves_csv, describe, line_cells, rich_table, to_markdown
from tests.unit.evaluation.frontier_kit import bounds, line, make_row, train_config


def board(*rows: FrontierRow, entropies: tuple[float, ...] = (3.5,)) -> Board:
    found = [(Path("results") / f"{row.name}.json", row) for row in [*bounds(), *rows]]
    return build_board(found, entropies=entropies, span=(3.0, 4.0))


def seed(number: int, nll: float, *, agreement: float = 0.2, to: float = 4.0, **options) -> FrontierRow:
    options.setdefault("train", train_config(number))
    return make_row(f"write-{number} own", line(nll, agreement, to=to), **options)


def cells(found: Board) -> dict[str, dict[str, str]]:
    return {row["name"]: row for _, row in line_cells(found)}


def test_two_seeds_give_a_row_of_their_mean_above_the_first_of_them():
    found = board(seed(0, 4.0, agreement=0.2), seed(1, 4.4, agreement=0.3))
    (group,) = found.groups
    assert group.seeds == [0, 1]
    (matched,) = group.matched
    assert (matched.nll.low, matched.nll.high) == pytest.approx((4.5, 4.9))
    assert matched.nll.value == pytest.approx(4.7)
    assert (matched.agreement.low, matched.agreement.value, matched.agreement.high) == pytest.approx((0.2, 0.25, 0.3))
    assert matched.behind.value == pytest.approx(4.7 - 3.5)
    areas = [curve.area.value for curve in group.curves]
    assert group.area.value == pytest.approx(sum(areas) / 2)
    assert (group.area.low, group.area.high) == (min(areas), max(areas))
    shown = [row["name"] for _, row in line_cells(found)]
    name = "write-{0, 1} own, 2 seeds: mean (lowest to highest)"
    assert shown == ["real text", "backbone", name, "write-0 own", "write-1 own"]
    row = cells(found)[name]
    assert row["nll_0"] == "4.70 (4.50 to 4.90)"
    assert row["agreement_0"] == "0.25 (0.20 to 0.30)"
    assert row["seeds"] == "2 (0, 1)"
    assert (row["nfe"], row["tokens"], row["speed"]) == ("16", "100M", "")
    assert [cells(found)[f"write-{n} own"]["seeds"] for n in (0, 1)] == ["0", "1"]


def test_likelihood_bounds_are_of_each_seed_and_of_all_where_none_lacks_it():
    def bounded(number: int, value: float) -> FrontierRow:
        found = {"value": value, "low": value - 0.1, "high": value + 0.1}
        found["states"] = {name: number / 10 for name, number in found.items()}
        return dataclasses.replace(seed(number, 4.0 + number / 10), details={"bound": found})

    found = board(bounded(0, 5.0), bounded(1, 5.5))
    name = "write-{0, 1} own, 2 seeds: mean (lowest to highest)"
    assert cells(found)[name]["bound"] == "5.25 (5.00 to 5.50)"
    assert cells(found)["write-0 own"]["bound"] == "5.00 [4.90, 5.10]"
    assert cells(found)["backbone"]["bound"] == cells(found)["backbone"]["states"] == ""
    assert cells(found)[name]["states"] == "0.53 (0.50 to 0.55)"
    assert any(sentence.startswith("States explained: Explained variance") for sentence in describe(found))
    assert any(sentence.startswith("Bound of real text's NLL: Upper bound") for sentence in describe(found))
    rows = list(csv.DictReader(io.StringIO(curves_csv(found))))
    assert [row["bound_high"] for row in rows if row["kind"] == "seeds"] == ["5.5"]
    assert [row["states_low"] for row in rows if row["kind"] == "seeds"] == ["0.5"]
    assert cells(board(bounded(0, 5.0), seed(1, 4.1)))[name]["bound"] == ""


def test_three_seeds_are_ordered_by_seed_whatever_the_order_of_files():
    found = board(seed(2, 4.1), seed(0, 4.6), seed(1, 4.0))
    (group,) = found.groups
    assert group.seeds == [0, 1, 2]
    assert group.matched[0].nll.value == pytest.approx((4.6 + 5.1 + 4.5) / 3)
    assert group.label == "write-{0, 1, 2} own"
    # Curves stand by area; the group above the best of them.
    assert [line.label for line in found.lines()][2:] == [
        "write-{0, 1, 2} own",
        "write-1 own",
        "write-2 own",
        "write-0 own",
    ]


def test_lowest_and_highest_are_of_seeds_and_not_of_documents():
    found = board(seed(0, 4.0, noise=1.0), seed(1, 4.4, noise=1.0))
    single = next(curve for curve in found.curves if curve.label == "write-0 own").matched[0].nll
    assert single.high - single.low > 0.4
    assert found.groups[0].matched[0].nll.high - found.groups[0].matched[0].nll.low == pytest.approx(0.4)


@pytest.mark.parametrize(
    "other",
    [
        {"train": train_config(1, method={"sampler": SamplerConfig(steps=3)})},
        {"writing": {"readout": "fused"}},
        {"steps": (32,)},
    ],
)
def test_a_row_that_differs_in_another_option_is_no_seed(other):
    found = board(seed(0, 4.0), seed(1, 4.4, **other))
    assert found.groups == []
    assert found.ungrouped == []
    shown = cells(found)
    assert [shown[name]["seeds"] for name in ("write-0 own", "write-1 own", "backbone")] == ["0 only", "1 only", ""]
    assert "(lowest to highest)" not in to_markdown(found)
    assert any('marked "only"' in sentence for sentence in describe(found))


def test_raw_and_averaged_weights_are_not_one_method():
    raw = seed(1, 4.4)
    raw = dataclasses.replace(raw, checkpoint={**raw.checkpoint, "weights": "raw"})
    assert board(seed(0, 4.0), raw).groups == []


def test_options_that_do_not_decide_the_weights_do_not_separate_seeds():
    one, other = train_config(0), train_config(1, out="elsewhere/a")
    other = dataclasses.replace(
        other,
        log=dataclasses.replace(other.log, every=1),
        trainer=dataclasses.replace(other.trainer, save_every=5),
        data=dataclasses.replace(other.data, source="the-same-text.jsonl"),
    )
    assert len(board(seed(0, 4.0, train=one), seed(1, 4.4, train=other)).groups) == 1


def test_a_file_older_than_an_option_has_its_default():
    old = seed(0, 4.0)
    assert old.train_config["trainer"].pop("skip_spike") == 0.0
    assert len(board(old, seed(1, 4.4)).groups) == 1
    spiky = train_config(1)
    spiky = dataclasses.replace(spiky, trainer=dataclasses.replace(spiky.trainer, skip_spike=3.0))
    assert board(old, seed(1, 4.4, train=spiky)).groups == []


def test_where_a_seed_does_not_reach_an_entropy_the_group_says_where_it_ends():
    found = board(seed(0, 4.0), seed(1, 4.4, to=3.6), entropies=(3.5, 3.9))
    near, far = found.groups[0].matched
    assert near.nll.value is not None
    for item in (far.nll, far.agreement, far.behind):
        assert (item.value, item.low, item.high) == (None, None, None)
    row = next(row for name, row in cells(found).items() if "2 seeds" in name)
    assert row["nll_0"] == "4.70 (4.50 to 4.90)"
    assert (row["nll_1"], row["agreement_1"], row["behind_1"]) == ("ends at 3.60", "", "")
    assert cells(found)["write-0 own"]["nll_1"].startswith("4.90"), "the seed that reaches it keeps its value"


def test_a_curve_above_an_entropy_counts_where_its_nll_is_lowest():
    """Not at its lowest entropy: a curve may turn."""
    found = board(make_row("turns", [(3.7, 4.9, 0.1), (3.6, 4.2, 0.3), (3.8, 5.5, 0.2)]), entropies=(3.5, 3.65, 3.9))
    above, inside, below = next(curve for curve in found.curves if curve.label == "turns").matched
    assert (above.where.value, above.nll.value, above.agreement.value) == pytest.approx((3.6, 4.2, 0.3))
    assert above.behind.value == pytest.approx(4.2 - 3.6), "the backbone at the entropy of the point, not at 3.5"
    assert (inside.where.value, inside.nll.value) == pytest.approx((3.65, 4.525))
    assert (below.where.value, below.nll.value, below.behind.value) == (None, None, None)
    row = cells(found)["turns"]
    assert (row["nll_0"], row["nll_2"]) == ("4.20 [4.20, 4.20] at 3.60", "ends at 3.80")
    assert " at " not in row["nll_1"]
    listed = [item for item in csv.DictReader(io.StringIO(curves_csv(found))) if item["name"] == "turns"]
    assert [item["where"] for item in listed] == [str(above.where.value), "3.65", ""]


def test_a_group_names_the_mean_entropy_of_seeds_above():
    rows = [make_row(f"write-{n} own", [(3.6 + n / 10, 4.0 + n, 0.2)], train=train_config(n)) for n in (0, 1)]
    found = board(*rows)
    row = next(row for name, row in cells(found).items() if "2 seeds" in name)
    assert row["nll_0"] == "4.50 (4.00 to 5.00) at 3.65"
    mixed = board(rows[0], seed(1, 4.0))
    assert next(row for name, row in cells(mixed).items() if "2 seeds" in name)["nll_0"].endswith(" at 3.55")


def test_each_number_of_steps_has_its_group():
    found = board(seed(0, 4.0, steps=(16, 64)), seed(1, 4.4, steps=(16, 64)))
    assert [[curve.steps for curve in group.curves] for group in found.groups] == [[16, 16], [64, 64]]
    groups = [row for _, row in line_cells(found) if "seeds:" in row["name"]]
    assert [row["steps"] for row in groups] == ["16", "64"]


def test_the_same_seed_twice_and_a_run_stopped_early_are_told_and_not_averaged():
    twice = board(seed(0, 4.0), dataclasses.replace(seed(0, 4.4), name="write-again own"))
    assert twice.groups == []
    assert any(
        "write-again own, write-0 own" in text or "write-0 own, write-again own" in text for text in describe(twice)
    )
    assert any("training seed 0 is there more than once" in text for text in describe(twice))
    stopped = board(seed(0, 4.0), seed(1, 4.4, tokens=50_000_000))
    assert stopped.groups == []
    assert any("trained on 50,000,000 to 100,000,000 tokens" in text for text in describe(stopped))
    nearly = board(seed(0, 4.0), seed(1, 4.4, tokens=99_000_000))
    assert len(nearly.groups) == 1
    assert next(row for _, row in line_cells(nearly) if "seeds:" in row["name"])["tokens"] == ""


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (("run-1", "run-11"), "run-{1, 11}"),
        (("write-hidden8 own", "write-hidden8-1 own"), "write-hidden8{, -1} own"),
        (("apple", "pear"), "{apple, pear}"),
        (("a-1-a", "a-2-a"), "a-{1, 2}-a"),
        (("a-a", "a-a-a"), "a-a{, -a}"),
    ],
)
def test_labels_of_groups(names, label):
    curves = board(seed(0, 4.0), seed(1, 4.4)).groups[0].curves
    curves = [dataclasses.replace(curve, label=name) for curve, name in zip(curves, names, strict=True)]
    group = board(seed(0, 4.0), seed(1, 4.4)).groups[0]
    assert dataclasses.replace(group, curves=curves).label == label


def test_markdown_terminal_and_csv_show_the_group_for_what_it_is(tmp_path):
    for row in [*bounds(), seed(0, 4.0), seed(1, 4.4), make_row("other", line(5.0), writing={"readout": "fused"})]:
        write_row(tmp_path / f"{row.name}.json", row)
        assert read_row(tmp_path / f"{row.name}.json") == row
    found = report([tmp_path], tmp_path / "out", entropies=[3.5], span=(3.0, 4.0))
    text = (tmp_path / "out" / "frontier.md").read_text(encoding="utf-8")
    assert "| **write-{0, 1} own, 2 seeds: mean (lowest to highest)** |" in text
    assert "4.70 (4.50 to 4.90)" in text
    assert "Intervals in brackets: 95%, 60 resamples of documents" in text
    assert "The spread of training seeds is in the rows of several seeds" in text
    assert "| 0 only |" in text
    console = Console(width=220, file=io.StringIO())
    console.print(rich_table(found))
    assert "write-{0, 1} own, 2 seeds: mean (lowest to highest)" in console.file.getvalue()
    rows = list(csv.DictReader(io.StringIO(curves_csv(found))))
    assert (tmp_path / "out" / "curves.csv").read_text(encoding="utf-8") == curves_csv(found)
    group = next(row for row in rows if row["kind"] == "seeds")
    assert (group["name"], group["seeds"], group["bounds"]) == ("write-{0, 1} own", "0 1", "seeds")
    assert [float(group[name]) for name in ("nll", "nll_low", "nll_high")] == pytest.approx([4.7, 4.5, 4.9])
    assert {row["bounds"] for row in rows if row["kind"] != "seeds"} == {"documents"}
    assert len(rows) == len(found.curves) + 1


def test_rows_without_training_are_never_grouped():
    found = board(make_row("unigram", line(6.0), kind="control"), make_row("bigram", line(5.0), kind="control"))
    assert not [line for line in found.lines() if isinstance(line, SeedGroup)]
    assert not any("training seed is marked" in sentence for sentence in describe(found))


def test_the_page_shows_the_seeds_and_sorts_them_by_their_mean():
    page = to_html(board(seed(0, 4.0), seed(1, 4.4)), "<svg></svg>")
    assert "write-{0, 1} own, 2 seeds: mean (lowest to highest)" in page
    assert 'data-v="4.70"' in page
    assert ">4.70 (4.50 to 4.90)<" in page
    above = to_html(board(seed(0, 4.0), entropies=(2.9,)), "<svg></svg>")
    assert 'data-v="4.00">4.00 [4.00, 4.00] at 3.00<' in above
    below = to_html(board(seed(0, 4.0), entropies=(4.5,)), "<svg></svg>")
    assert 'data-v="3.50">3.50 at 3.90<' in below, "real text, which has no interval there"
    assert re.search(r'<td class="number">ends at [0-9.]+<', below), "and sorts last"
    alone = to_html(board(seed(0, 4.0)), "<svg></svg>")
    assert ">0 only<" in alone
    assert "lowest to highest" not in alone
