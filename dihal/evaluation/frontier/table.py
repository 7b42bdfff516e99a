"""A board as cells, and as a terminal table, Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

from rich.table import Table

from dihal.evaluation.bootstrap import Interval
from dihal.evaluation.frontier.board import Board, Curve, SeedGroup
from dihal.evaluation.frontier.definitions import BOUND, METRICS, SET_METRICS, STATES
from dihal.evaluation.frontier.matched import Matched
from dihal.evaluation.frontier.result import Point

__all__ = [
    "ENDS",
    "KIND_TEXT",
    "curve_cells",
    "curve_columns",
    "curves_csv",
    "describe",
    "group_cells",
    "line_cells",
    "markdown_table",
    "point_cells",
    "point_columns",
    "points_csv",
    "rich_table",
    "to_markdown",
]

ENDS = "ends at "
"""What a cell begins with that says where a curve ends instead of a value."""

KIND_TEXT = {"checkpoint": "trained", "bound": "bound", "control": "control", "text": "text"}

_LEFT = ("name", "kind", "run")

_FEW_DOCUMENTS = 10
_FEW_SAMPLES = 1_000


def number(value: float | None, digits: int = 2) -> str:
    """A value for a table; empty where there is none."""
    return "" if value is None else f"{value:.{digits}f}"


def with_interval(found: Interval, digits: int = 2) -> str:
    """``4.78 [4.71, 4.85]``."""
    if found.value is None or found.low is None or found.high is None:
        return number(found.value, digits)
    return f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def with_spread(found: Interval, digits: int = 2) -> str:
    """``4.78 (4.71 to 4.85)``: mean, lowest and highest seed."""
    if found.value is None:
        return ""
    return f"{found.value:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})"


def elsewhere(matched: Matched) -> str:
    """`` at 3.98``: the entropy of the values where it is not the one asked for; of several seeds, its mean."""
    where = matched.where
    if where.value is None or math.isclose(where.value, matched.entropy):
        return ""
    return f" at {where.value:.2f}"


def ends(curves: Sequence[Curve], axis: str, entropy: float) -> str:
    """``ends at 3.75`` where a curve, or that of one of several seeds, stays below the entropy asked for."""
    last = min(max(point.metrics[axis].value for point in curve.points) for curve in curves)
    return f"{ENDS}{last:.2f}" if last < entropy else ""


def count(value: float | int | None) -> str:
    """``79M``."""
    if value is None:
        return ""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def curve_columns(board: Board) -> dict[str, str]:
    """Column key -> heading of the table of curves."""
    columns = {"name": "row", "kind": "kind", "seeds": "training seeds", "steps": "steps"}
    for index, entropy in enumerate(board.entropies):
        columns |= {
            f"nll_{index}": f"NLL @ {entropy:.2f}",
            f"behind_{index}": "behind the backbone",
            f"agreement_{index}": f"agreement @ {entropy:.2f}",
        }
    columns |= {
        "area": "area [nats]",
        "bound": BOUND.label,
        "states": STATES.label,
        "nfe": "NFE",
        "encodes": "encodes",
        "reads": "reads",
        "flops": "FLOPs/token",
    }
    return columns | {"speed": "tokens/s", "parameters": "trained", "tokens": "diffused"}


def curve_cells(curve: Curve, axis: str) -> dict[str, str]:
    """The texts of one curve by column."""
    point = curve.points[0]
    speeds = [item.tokens_per_second for item in curve.points if item.tokens_per_second is not None]
    text = curve.row.kind == "text"
    found = {
        "name": curve.label,
        "kind": KIND_TEXT[curve.row.kind],
        "seeds": "" if curve.seed is None else str(curve.seed),
        "steps": "" if curve.steps == 0 else str(curve.steps),
        # One point has no curve; its area would only say where the point lies.
        "area": "" if text else with_interval(curve.area),
        "bound": with_interval(curve.bound),
        "states": with_interval(curve.states),
        "nfe": "" if not point.nfe else str(point.nfe),
        "encodes": "" if point.encodes is None else str(point.encodes),
        "reads": "" if point.reads is None else str(point.reads),
        "flops": count(point.flops_per_token),
        "speed": count(max(speeds)) if speeds else "",
        "parameters": count(curve.row.cost.get("trainable_parameters")),
        "tokens": count(curve.row.cost.get("diffused_tokens")),
    }
    for index, matched in enumerate(curve.matched):
        found[f"nll_{index}"] = with_interval(matched.nll) + elsewhere(matched)
        if matched.nll.value is None and not text:
            found[f"nll_{index}"] = ends([curve], axis, matched.entropy)
        reference = curve.row.kind in ("bound", "text")
        found[f"behind_{index}"] = "" if reference else with_interval(matched.behind)
        found[f"agreement_{index}"] = with_interval(matched.agreement)
    if text and not any(matched.nll.value is not None for matched in curve.matched):
        # A point is no curve: shown with its own entropy.
        nll, entropy = point.metrics["nll"].value, point.metrics[axis].value
        found["nll_0"] = f"{number(nll)} at {number(entropy)}"
        found["agreement_0"] = f"{number(point.metrics['agreement'].value)} at {number(entropy)}"
    return found


def group_cells(group: SeedGroup, axis: str) -> dict[str, str]:
    """The texts of several training seeds by column: means with the lowest and highest seed, and what all share."""
    rows = [curve_cells(curve, axis) for curve in group.curves]
    found = {name: text if all(row[name] == text for row in rows) else "" for name, text in rows[0].items()}
    found |= {
        "name": f"{group.label}, {len(group.seeds)} seeds: mean (lowest to highest)",
        "seeds": f"{len(group.seeds)} ({', '.join(map(str, group.seeds))})",
        "area": with_spread(group.area),
        "bound": with_spread(group.bound),
        "states": with_spread(group.states),
        # How fast a seed was written says nothing about another.
        "speed": "",
    }
    for index, matched in enumerate(group.matched):
        found[f"nll_{index}"] = with_spread(matched.nll) + elsewhere(matched)
        if matched.nll.value is None:
            found[f"nll_{index}"] = ends(group.curves, axis, matched.entropy)
        found[f"behind_{index}"] = with_spread(matched.behind)
        found[f"agreement_{index}"] = with_spread(matched.agreement)
    return found


def line_cells(board: Board) -> list[tuple[str, dict[str, str]]]:
    """(kind, texts by column) of every row of the table of curves, groups of seeds among them."""
    found = []
    for line in board.lines():
        if isinstance(line, SeedGroup):
            found.append(("checkpoint", group_cells(line, board.axis)))
            continue
        cells = curve_cells(line, board.axis)
        if board.single(line):
            cells["seeds"] = f"{line.seed} only"
        found.append((line.row.kind, cells))
    return found


def point_columns(board: Board) -> dict[str, str]:
    """Column key -> heading of the table of points."""
    shown = ("nll", board.axis, "agreement", "self_agreement", "rep_4", "degenerate", "memorised", "ended")
    columns = {"name": "row", "steps": "steps", "temperature": "T"}
    columns |= {name: METRICS[name].label for name in shown}
    return columns | {name: SET_METRICS[name][0] for name in ("dist_2", "self_bleu", "mauve", "frechet")}


def mean_of(values: Sequence[float | None]) -> float | None:
    """Mean over seeds; None if any is missing."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def point_cells(curve: Curve, point: Point, board: Board) -> dict[str, str]:
    """The texts of one point by column."""
    found = {
        "name": curve.label,
        "steps": "" if point.steps == 0 else str(point.steps),
        "temperature": "" if curve.row.kind == "text" else f"{point.temperature:g}",
    }
    for name in point_columns(board):
        if name in METRICS:
            interval = point.metrics[name]
            wide = name in ("nll", board.axis)
            found[name] = with_interval(interval) if wide else number(interval.value, 3)
        elif name in SET_METRICS:
            found[name] = number(mean_of(point.set_metrics[name]), 3)
    return found


def _about_intervals(board: Board) -> list[str]:
    lines = [
        f"Intervals in brackets: {board.first.confidence:.0%}, {board.first.bootstrap} resamples of documents, the same for "
        "all rows. They do not cover training seeds."
    ]
    if board.groups:
        lines.append(
            "The spread of training seeds is in the rows of several seeds: mean over seeds (lowest to highest seed), no "
            "interval; none where a seed stays below the entropy."
        )
    if any(map(board.single, board.curves)):
        lines.append('A method with one training seed is marked "only": its spread over seeds is unknown.')
    return lines


def describe(board: Board) -> list[str]:
    """What the reader must know beside the tables, one sentence each."""
    first, shared = board.first, board.first.comparable
    star = " It is the backbone or its kin: self-graded, and it favours its kin." if first.self_graded else ""
    low, high = board.range
    tokens = "the backbone's" if board.axis == "entropy" else "the scorer's"
    lines = [
        f"{shared.samples} continuations of {shared.new_tokens} tokens per point and seed "
        f"({len(shared.seeds)} sampling seed{'s' * (len(shared.seeds) != 1)}), each of a held-out prompt of "
        f"{shared.prompt_tokens} tokens; {len(first.document_keys)} documents. Backbone {first.backbone.get('id')} "
        f"({first.backbone.get('dtype')}).",
        f"NLL in nats per token under {shared.scorer}.{star}",
        f"Low NLL at low entropy is repetition: compare at equal entropy ({tokens} tokens, within a continuation), "
        "interpolated between the temperatures of a row. Of a row that lies above it, the point of lowest NLL counts, and its "
        "entropy is named: more than was asked for. Of a row that stays below, only where it ends is told.",
        f"Area: how far the row gets below log V = {math.log(first.scorer_vocab):.2f} nats at an entropy of at least e, "
        f"mean over e from {low:.2f} to {high:.2f}; higher is better.",
        *_about_intervals(board),
        "Distinct n-grams, self-BLEU, MAUVE and Frechet depend on the number of samples and have no interval.",
        "NFE, encodes, reads: passes of denoiser, replaced blocks and frozen stack per text, however many positions "
        "each had. FLOPs of one text alone, prompt included: metered for writers, counted by torch for the others.",
    ]
    if any(curve.bound.value is not None for curve in board.curves):
        lines.append(f"{BOUND.label[0].upper()}{BOUND.label[1:]}: {BOUND.definition}")
    if any(curve.states.value is not None for curve in board.curves):
        lines.append(f"{STATES.label[0].upper()}{STATES.label[1:]}: {STATES.definition}")
    if shared.samples < _FEW_SAMPLES:
        lines.append(f"Only {shared.samples} samples: too few for a headline.")
    if len(first.document_keys) < _FEW_DOCUMENTS:
        lines.append(f"Only {len(first.document_keys)} documents: the intervals are rough.")
    reasons = sorted(
        {f"{SET_METRICS[name][0]} is missing: {why}." for curve in board.curves for point in curve.points
         for name, why in point.missing.items() if curve.row.kind != "text"}
    )  # fmt: skip
    lines += reasons
    lines += board.ungrouped
    cut = [label for label, row in board.rows() if len(row.points) < row.planned]
    if cut:
        lines.append(f"Interrupted, some points are missing: {', '.join(cut)}.")
    if board.ignored:
        lines.append(f"{board.ignored} other JSON files were left out.")
    return lines


def _line(values: Sequence[str]) -> str:
    return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"


def markdown_table(columns: dict[str, str], rows: list[dict[str, str]], bold: list[bool]) -> list[str]:
    """Lines of a table, without columns that are empty; the first cell of a row may be bold."""
    used = [name for name in columns if any(row[name] for row in rows)]
    out = [_line([columns[name] for name in used])]
    out.append(_line(["---" if name in _LEFT else "---:" for name in used]))
    for row, strong in zip(rows, bold, strict=True):
        out.append(_line([f"**{row[n]}**" if n == "name" and strong else row[n] for n in used]))
    return out


def to_markdown(board: Board) -> str:
    """Both tables in Markdown with their notes."""
    pairs = [(curve, point) for curve in board.curves for point in curve.points]
    lines = line_cells(board)
    return (
        "\n".join(
            [
                "# Frontier",
                "",
                "![NLL against entropy](frontier.png)",
                "",
                *markdown_table(
                    curve_columns(board),
                    [cells for _, cells in lines],
                    [kind == "checkpoint" for kind, _ in lines],
                ),
                "",
                *(f"- {sentence}" for sentence in describe(board)),
                "",
                "## Points",
                "",
                *markdown_table(
                    point_columns(board),
                    [point_cells(curve, point, board) for curve, point in pairs],
                    [curve.row.kind == "checkpoint" for curve, _ in pairs],
                ),
            ]
        )
        + "\n"
    )


def rich_table(board: Board) -> Table:
    """The curves for a terminal."""
    from rich import box

    columns = curve_columns(board)
    shown = [name for name in columns if name.startswith(("name", "seeds", "steps", "nll", "agreement", "area", "nfe"))]
    lines = line_cells(board)
    table = Table(title="Frontier", box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0))
    used = [name for name in shown if any(row[name] for _, row in lines)]
    for name in used:
        table.add_column(columns[name], justify="left" if name == "name" else "right", no_wrap=True)
    for kind, row in lines:
        table.add_row(*(row[name] for name in used), style="bold" if kind == "checkpoint" else "dim")
    return table


def _csv(head: list[str], rows: list[list[object]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([["" if value is None else value for value in row] for row in rows])
    return out.getvalue()


def points_csv(board: Board) -> str:
    """Every point, every metric with its interval, unrounded; set metrics as the mean over seeds."""
    parts = ("value", "low", "high")
    head = ["name", "kind", "regime", "space", "split", "steps", "temperature"]
    head += [name if part == "value" else f"{name}_{part}" for name in METRICS for part in parts]
    head += [*SET_METRICS, "nfe", "encodes", "reads", "flops_per_token", "tokens_per_second", "commit", "file"]
    rows: list[list[object]] = []
    for curve in board.curves:
        row = curve.row
        for point in curve.points:
            rows.append(
                [curve.label, row.kind, row.regime, row.space, row.split, point.steps, point.temperature]
                + [getattr(point.metrics[name], part) for name in METRICS for part in parts]
                + [mean_of(point.set_metrics[name]) for name in SET_METRICS]
                + [point.nfe, point.encodes, point.reads, point.flops_per_token, point.tokens_per_second]
                + [row.provenance.get("commit"), curve.path.name]
            )
    return _csv(head, rows)


def curves_csv(board: Board) -> str:
    """Every curve at every entropy of comparison, with its area; groups of training seeds in rows of kind `seeds`.

    `bounds` says what low and high are: `documents` (interval over documents), `seeds` (lowest and highest seed).
    """
    groups = ("where", "nll", "agreement", "behind")
    head = ["name", "kind", "seeds", "steps", "bounds", "entropy"]
    head += [
        name if part == "value" else f"{name}_{part}"
        for name in (*groups, "area", "bound", "states")
        for part in ("value", "low", "high")
    ]
    rows: list[list[object]] = []
    for line in board.lines():
        if isinstance(line, SeedGroup):
            seeds = " ".join(map(str, line.seeds))
            facts: list[object] = [line.label, "seeds", seeds, line.curves[0].steps, "seeds"]
        else:
            facts = [line.label, line.row.kind, line.seed, line.steps, "documents"]
        for matched in line.matched:
            found = [*(getattr(matched, name) for name in groups), line.area, line.bound, line.states]
            rows.append([*facts, matched.entropy, *(v for item in found for v in (item.value, item.low, item.high))])
    return _csv(head, rows)
