"""Write the README's tables from result files; with --check, fail if they are not what the files say.

    python benchmarks/readme.py [--check]

A table stands between `<!-- KIND: WORDS -->` and `<!-- end KIND -->`. The words are files relative to the repository;
`*` stands for any part of a name. The kinds:

    results: FILE.json ...                     of `dihal evaluate`, one row each, at the steps with the lowest KL
    frontier: FILE.json ... [at ENTROPY ...]   rows of `dihal frontier` at equal entropy; default: the real text's
    best: FILE.json ... [at ENTROPY ...]       of such rows, each trained method by the one that serves it best
    steps: FILE.json ...                       KL of the checkpoints of `dihal evaluate` over steps, by split
    sweep: FILE.json ...                       best predictors of each `dihal sweep`, and the geometry scores
    circuits: FILE.json ...                    `compare.json` of `dihal circuits hybrid` or `compare`, one row each

Files of `results` must exist. A table of another kind is left out, between its marks, while no file matches.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dihal.evaluation.bootstrap import Interval
from dihal.evaluation.frontier.best import best_cells, best_columns, best_readings
from dihal.evaluation.frontier.board import Board, Curve, SeedGroup, build_board, gather
from dihal.evaluation.frontier.table import curve_cells, curve_columns, group_cells
from dihal.evaluation.ranking import require_comparable
from dihal.evaluation.result import Result, read_result
from dihal.io import read_json
from dihal.sweep.report import SweepReport

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- (?P<kind>\w+): (?P<words>[^>]*?) -->\n).*?(<!-- end (?P=kind) -->)", re.DOTALL)

CIRCUIT_EDGES = 1_000
"""Edges of the circuits whose overlap is shown."""
BEST_PREDICTORS = 5
"""Predictors shown of each sweep, beside the geometry scores."""


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"

    return line(headings) + "|" + "---|" * len(headings) + "\n" + "".join(map(line, rows))


def _shown(found: Interval, digits: int = 3) -> str:
    if found.value is None:
        return "-"
    if found.low is None or found.high is None:
        return f"{found.value:.{digits}f}"
    return f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def _files(words: Sequence[str], root: Path) -> list[Path]:
    """Files that the patterns match, each once, numbers in names by their size."""

    def key(path: Path) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path)) if part]

    found: dict[Path, None] = {}
    for word in words:
        found |= dict.fromkeys(sorted(root.glob(word), key=key))
    return list(found)


# -- results at the best number of steps

RESULTS = (
    "split", "method", "training", "best steps", "KL, nats", "top-1 agreement", "NLL, nats", "NLL of the backbone",
    "tokens x window", "file",
)  # fmt: skip


def row(path: str, root: Path) -> list[str]:
    """One line of the table of results."""
    result: Result = read_result(root / path)
    steps = min(result.metrics, key=lambda key: (result.metrics[key]["kl"].value, int(key)))
    block = result.metrics[steps]
    cost = result.cost
    nll = block["nll"]
    return [
        str(result.split),
        f"{result.method}, {cost.trainable_parameters / 1e6:.0f}M",
        f"{cost.train_seconds:.0f} s, {cost.diffused_tokens / 1e6:.0f}M tokens",
        steps,
        _shown(block["kl"].interval),
        f"{block['agreement'].value:.3f}",
        f"{nll.value:.3f}",
        f"{nll.value - nll.difference:.3f}",
        f"{result.comparable.tokens // 1000}k x {result.comparable.sequence_length}",
        f"`{path}`",
    ]


def results(words: Sequence[str], root: Path) -> str:
    """Results as they are named, one row each."""
    return _table(RESULTS, [row(path, root) for path in words])


# -- spaces at equal entropy


def _board(words: Sequence[str], root: Path) -> Board | None:
    """The rows of `FILE.json ... [at ENTROPY ...]`; None: no file matches."""
    place = list(words).index("at") if "at" in words else len(words)
    files = _files(words[:place], root)
    return build_board(gather(files)[0], entropies=[float(word) for word in words[place + 1 :]]) if files else None


def _best_lines(board: Board) -> list[Curve | SeedGroup]:
    """A group in the place of its seeds, and each at the number of steps with the largest area."""
    grouped = [curve for group in board.groups for curve in group.curves]
    best: dict[str, Curve | SeedGroup] = {}
    for line in board.lines():
        if isinstance(line, Curve) and line in grouped:
            continue
        held = best.get(line.label)
        if held is None or (line.area.value or 0.0) > (held.area.value or 0.0):
            best[line.label] = line
    return list(best.values())


def _frontier_row(line: Curve | SeedGroup, board: Board) -> dict[str, str]:
    group = isinstance(line, SeedGroup)
    cells = group_cells(line, board.axis) if group else curve_cells(line, board.axis)
    first = (line.curves[0] if group else line).points[0]
    flops = first.flops_per_token
    if not group and line.seed is not None:
        cells["seeds"] = f"1 ({line.seed})"
    # What differs between seeds is empty; FLOPs do not.
    return {**cells, "name": line.label, "flops": "" if flops is None else f"{flops / 1e9:.3g}"}


def frontier(words: Sequence[str], root: Path) -> str:
    """Rows at equal entropy with what they cost; several training seeds as their mean (lowest to highest)."""
    board = _board(words, root)
    if board is None:
        return ""
    headings = curve_columns(board) | {
        "steps": "steps (largest area)",
        "flops": "GFLOP/token",
        "tokens": "training tokens",
    }
    measured = [name for name in headings if name.startswith(("nll_", "agreement_"))]
    cells = [_frontier_row(line, board) for line in _best_lines(board)]
    given = [name for name in ("bound", "states") if any(found[name] for found in cells)]
    names = ["name", "steps", *measured, *given, "nfe", "flops", "tokens", "seeds"]
    return _table([headings[name] for name in names], [[found[name] or "-" for name in names] for found in cells])


def best(words: Sequence[str], root: Path) -> str:
    """Each trained method by the reading that serves it best, of those with fewer passes than tokens are written."""
    board = _board(words, root)
    if board is None:
        return ""
    columns = best_columns(board)
    found = [best_cells(item) for item in best_readings(board, passes=board.first.comparable.new_tokens)]
    return _table(list(columns.values()), [[cells[name] or "-" for name in columns] for cells in found])


# -- bridge against regression over steps


def steps(words: Sequence[str], root: Path) -> str:
    """KL of trained rows at every number of steps, by split; the least of a split in bold."""
    found = [(path, read_result(path)) for path in _files(words, root)]
    found = [(path, result) for path, result in found if result.kind == "checkpoint"]
    if not found:
        return ""
    require_comparable(found)
    ordered = sorted((result for _, result in found), key=lambda result: (result.split, result.method, result.name))
    counts = sorted({int(count) for result in ordered for count in result.metrics})
    least = {
        split: min(
            block["kl"].value for result in ordered if result.split == split for block in result.metrics.values()
        )
        for split in {result.split for result in ordered}
    }
    rows = []
    for result in ordered:
        cells = [str(result.split), f"{result.method} (`{result.name}`)"]
        for count in counts:
            block = result.metrics.get(str(count))
            text = "-" if block is None else _shown(block["kl"].interval)
            cells.append(f"**{text}**" if block is not None and block["kl"].value == least[result.split] else text)
        rows.append(cells)
    return _table(["split", "method", *(f"KL at {count} step{'s' * (count != 1)}" for count in counts)], rows)


# -- what predicts the truth of a sweep


def sweep(words: Sequence[str], root: Path) -> str:
    """The predictors of least regret and all geometry scores, per sweep."""
    rows = []
    for path in _files(words, root):
        report = SweepReport.load(path)
        truth = report.truths[report.truth]
        for place, name in enumerate(report.ranking, start=1):
            item, relation = report.predictors[name], report.relations[report.truth][name]
            if place > BEST_PREDICTORS and item["group"] != "score":
                continue
            rows.append(
                [
                    f"{report.regime}: {truth['label']}",
                    str(place),
                    item["label"],
                    _shown(relation.spearman, 2),
                    _shown(relation.kendall, 2),
                    "-" if relation.choice is None else str(relation.choice),
                    f"{_shown(relation.regret, 4)} {truth['unit']}" if relation.regret.value is not None else "-",
                ]
            )
    headings = ["regime: truth", "rank", "predictor", "Spearman", "Kendall", "chooses split", "top-1 regret"]
    return _table(headings, rows) if rows else ""


# -- circuits of two models


CIRCUITS = (
    "backbone against", "task", "accuracy", "verdict", "shared of the top 1,000 edges (ceiling; noise null)",
    "backbone's circuit run in it (its own; noise null)", "writers' centre, layers", "effective number of edges, x",
)  # fmt: skip


def _estimate(record: Mapping[str, Any], digits: int = 2) -> str:
    return _shown(Interval(value=record["value"], low=record["low"], high=record["high"]), digits)


def _at(overlap: Sequence[Mapping[str, Any]], k: int) -> Mapping[str, Any]:
    return next(row for row in overlap if row["k"] == k)


def _beside(value: str, *others: Mapping[str, Any] | float | None) -> str:
    each = [one["value"] if isinstance(one, Mapping) else one for one in others]
    return f"{value} ({'; '.join('-' if one is None else f'{one:.2f}' for one in each)})"


def _accuracies(data: Mapping[str, Any]) -> list[float]:
    """Share of all pairs that each model solves, also where circuits were run on those that both solve."""
    pool = (data["task"].get("selected_from") or {}).get("discovery")
    if pool is None:
        return [one["accuracy"] for one in data["behaviour"]]
    return [solved / pool["pairs"] for solved in pool["solved"]]


def circuits(words: Sequence[str], root: Path) -> str:
    """What two models share of a task's circuit; a hybrid beside the backbone with noise of the bridge's size."""
    rows = []
    for path in _files(words, root):
        data = read_json(path)
        null = data.get("noise_matched_null")
        shared, runs = _at(data["overlap"], CIRCUIT_EDGES), data["function"]["in_second"]
        null_shared = _at(null["overlap"], CIRCUIT_EDGES)["jaccard"] if null else None
        null_runs = null["function"]["in_second"]["first"] if null else None
        change = data["whole"]["concentration"]["edges"]["change"]
        rows.append(
            [
                data["labels"][1].replace("hybrid of embedded", "bridge"),
                data["task"]["task"],
                " -> ".join(f"{share:.2f}" for share in _accuracies(data)),
                data["verdict"]["call"],
                _beside(_estimate(shared["jaccard"]), shared["ceiling"], null_shared),
                _beside(_estimate(runs["first"]), runs["second"], null_runs),
                _estimate(data["depth"]["writer"]["change"]["center"]),
                _estimate({key: 2 ** change[key] for key in ("value", "low", "high")}),
            ]
        )
    return _table(CIRCUITS, rows) if rows else ""


TABLES: dict[str, Callable[[Sequence[str], Path], str]] = {
    "results": results,
    "frontier": frontier,
    "best": best,
    "steps": steps,
    "sweep": sweep,
    "circuits": circuits,
}


def filled(text: str, root: Path = ROOT) -> str:
    """The README with every table made anew from the files below ``root``."""

    def fill(found: re.Match[str]) -> str:
        if found["kind"] not in TABLES:
            sys.exit(f"README.md: no table {found['kind']!r}; there are {', '.join(TABLES)}.")
        return found[1] + TABLES[found["kind"]](found["words"].split(), root) + found[4]

    return BLOCK.sub(fill, text)


def main() -> None:
    """Rewrite, or check."""
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = filled(before)
    if "--check" in sys.argv[1:]:
        if before != after:
            sys.exit("README.md is not what the result files say: run `python benchmarks/readme.py`.")
        return
    readme.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
