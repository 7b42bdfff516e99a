"""Ranking, refusals, files."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dihal.config import LeaderboardConfig
from dihal.errors import UsageError
from dihal.evaluation.leaderboard import leaderboard
from dihal.evaluation.page import to_html
from dihal.evaluation.ranking import build_board, gather
from dihal.evaluation.result import write_result
from dihal.evaluation.table import to_csv, to_markdown
from tests.unit.evaluation.kit import demo_results, make_result, text


def board(results=None, sort_by: str = "kl"):
    results = demo_results() if results is None else results
    return build_board([(Path(f"{r.name}.json"), r) for r in results], sort_by=sort_by)


@pytest.fixture
def folder(tmp_path):
    for result in demo_results():
        write_result(tmp_path / "results" / f"{result.name}.json", result)
    return tmp_path / "results"


def test_rows_are_in_order_at_their_best_steps():
    entries = board().entries
    values = [entry.value for entry in entries]
    assert values == sorted(values)
    assert [entry.label for entry in entries][:4] == ["backbone", "identity@3", "bridge-wide", "bridge-narrow"]
    wide = entries[2].result
    assert entries[2].steps == min(wide.metrics, key=lambda steps: wide.metrics[steps]["kl"].value)


def test_higher_is_better_where_it_is():
    entries = board(sort_by="agreement").entries
    values = [entry.value for entry in entries]
    assert values == sorted(values, reverse=True)
    assert entries[0].label == "backbone"


def test_ranks_are_ranges_where_documents_do_not_separate():
    ranks = {entry.label: entry.rank for entry in board().entries}
    assert ranks["backbone"] == ranks["identity@3"] == (1, 2)
    assert ranks["bridge-wide"] == ranks["bridge-narrow"] == (3, 4)
    assert ranks["bridge-split6"] == (5, 5)


def test_rows_without_the_metric_come_last_and_unranked():
    entries = board(sort_by="explained_variance").entries
    unranked = [entry.label for entry in entries if entry.rank is None]
    assert sorted(unranked) == ["backbone", "unigram"]
    assert [entry.label for entry in entries][-2:] == unranked
    assert entries[0].label == "identity@3"


def test_text_metrics_rank_without_intervals():
    entries = board(sort_by="generative_perplexity").entries
    assert [entry.label for entry in entries if entry.rank][:2] == ["backbone", "bridge-wide"]
    assert entries[0].rank == (1, 1)


def test_unknown_metric_and_metric_nobody_has():
    with pytest.raises(UsageError, match="Did you mean 'agreement'"):
        board(sort_by="agrement")
    with pytest.raises(UsageError, match="no row has the metric"):
        board([make_result("a", {1: 0.1})], sort_by="entropy")


def test_the_cause_is_named_before_its_consequences(tmp_path):
    write_result(tmp_path / "a.json", make_result("a", {1: 0.1}))
    write_result(tmp_path / "b.json", make_result("b", {1: 0.1}, tokens=1, data_fingerprint="other"))
    with pytest.raises(UsageError, match=r"comparable: tokens is .*Also different: data_fingerprint\."):
        leaderboard(LeaderboardConfig(results=(str(tmp_path),)))


def test_a_row_without_budget_goes_with_any():
    rows = [make_result("null", {0: 1.0}, kind="control"), make_result("a", {1: 0.1}, budget="b1")]
    assert len(board(rows).entries) == 2
    with pytest.raises(UsageError, match=r"budget\.name is 'b1'"):
        board([*rows, make_result("b", {1: 0.1}, budget="b2")])


def test_other_json_is_counted_and_damaged_json_refused(folder):
    (folder / "scores.json").write_text(json.dumps({"layers": []}))
    (folder / "list.json").write_text("[1]")
    found, ignored = gather([folder])
    assert (len(found), ignored) == (len(demo_results()), 2)
    (folder / "cut.json").write_text('{"schema": "dihal.result/2", ')
    with pytest.raises(UsageError, match=r"cut.json.*not valid JSON"):
        gather([folder])


def test_nothing_found(tmp_path):
    with pytest.raises(UsageError, match="no result in"):
        gather([tmp_path])
    with pytest.raises(UsageError, match="no file"):
        gather([tmp_path / "absent.json"])


def test_a_named_file_that_is_no_result_is_refused(tmp_path):
    (tmp_path / "scores.json").write_text("{}")
    with pytest.raises(UsageError, match="not a DiHAL result"):
        gather([tmp_path / "scores.json"])


def test_a_path_given_twice_counts_once(folder):
    found, _ = gather([folder, folder, folder / "backbone.json"])
    assert len(found) == len(demo_results())


def test_copies_are_left_out_and_namesakes_told_apart(tmp_path):
    same = make_result("backbone", {0: 0.0}, kind="bound")
    rows = [
        (tmp_path / "x" / "backbone.json", same),
        (tmp_path / "y" / "backbone.json", dataclasses.replace(same, config_hash="ffff")),
        (tmp_path / "x" / "run.json", make_result("run", {1: 0.1}, seed=1)),
        (tmp_path / "y" / "run.json", make_result("run", {1: 0.2}, seed=2)),
    ]
    found = build_board(rows, sort_by="kl")
    assert found.duplicates == 1
    assert [entry.label for entry in found.entries] == ["backbone", "run (x)", "run (y)"]


class _Page(HTMLParser):
    """Collects what a browser would fetch, and the first column of the first table."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.names: list[str] = []
        self.tables = 0
        self._in_name = False
        self.buttons = 0

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert tag not in ("link", "iframe", "object", "embed", "img", "base"), tag
        self.fetched += [attributes[name] for name in ("src", "href", "data", "action", "srcset") if name in attributes]
        self.tables += tag == "table"
        self.buttons += tag == "button"
        self._in_name = tag == "th" and attributes.get("scope") == "row" and self.tables == 1

    def handle_data(self, data):
        if self._in_name:
            self.names.append(data)
            self._in_name = False


def test_the_page_needs_nothing_else_and_is_sorted():
    html = to_html(board())
    page = _Page()
    page.feed(html)
    assert page.fetched == []
    assert not re.search(r"https?:|//[a-z]|url\(|@import|fetch\(|XMLHttp", html)
    assert page.names == [entry.label for entry in board().entries]
    assert page.buttons >= 10, "headings sort by mouse and keyboard"
    assert "prefers-color-scheme:dark" in html
    assert html.count("<svg") == 4
    assert html.count("<details>") == len(demo_results())


def test_the_figures_are_well_formed():
    html = to_html(board())
    for drawing in re.findall(r"<svg.*?</svg>", html, re.S):
        root = ET.fromstring(drawing)
        left, top, width, height = map(float, root.attrib["viewBox"].split())
        for circle in root.iter("circle"):
            assert left <= float(circle.attrib["cx"]) <= width
            assert top <= float(circle.attrib["cy"]) <= height


def test_generated_text_and_names_cannot_break_the_page():
    evil = "</script><script>alert(1)</script>"
    bad = text(10.0, 2.0)
    rows = [make_result(evil, {1: 0.1}, texts={1: dataclasses.replace(bad, texts=[f"a ||| {evil}"])})]
    html = to_html(board(rows))
    assert html.count("<script>") == 1
    assert "&lt;script&gt;alert(1)" in html


def test_a_single_row_makes_a_page_too():
    html = to_html(board([make_result("only", {1: 0.1})]))
    assert html.count("<svg") == 1


def test_markdown_marks_ranges_and_escapes_pipes():
    out = to_markdown(board([*demo_results(), make_result("a|b", {1: 9.0}, budget="b1")]))
    assert "| 3-4 | **bridge-wide** |" in out
    assert "a\\|b" in out
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "self-graded" in out


def test_csv_holds_every_number_unrounded():
    results = demo_results()
    rows = list(csv.DictReader(io.StringIO(to_csv(board(results)))))
    assert len(rows) == sum(len(result.metrics) for result in results)
    wide = next(result for result in results if result.name == "bridge-wide")
    line = next(row for row in rows if row["name"] == "bridge-wide" and row["steps"] == "16")
    assert float(line["kl"]) == wide.metrics["16"]["kl"].value
    assert line["best"] == "0"
    assert line["rank_low"] == ""
    assert next(row for row in rows if row["name"] == "unigram")["explained_variance"] == ""


def test_the_command_writes_all_files(folder, tmp_path):
    out = tmp_path / "board"
    table = leaderboard(LeaderboardConfig(results=(str(folder),), out=str(out)))
    assert table.row_count == len(demo_results())
    names = {path.name for path in out.iterdir()}
    assert names == {f"leaderboard.{ending}" for ending in ("md", "csv", "html", "png", "svg")}
    assert (out / "leaderboard.png").read_bytes()[:4] == b"\x89PNG"
    first = (out / "leaderboard.svg").read_bytes()
    leaderboard(LeaderboardConfig(results=(str(folder),), out=str(out)))
    assert (out / "leaderboard.svg").read_bytes() == first, "equal boards, equal pictures"


def test_the_board_of_its_own_output_folder_is_stable(folder):
    for _ in range(2):  # its own files must not be taken for results
        leaderboard(LeaderboardConfig(results=(str(folder),), out=str(folder)))
    assert len(gather([folder])[0]) == len(demo_results())


def test_an_output_path_that_is_a_file(folder, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        leaderboard(LeaderboardConfig(results=(str(folder),), out=str(tmp_path / "taken")))
