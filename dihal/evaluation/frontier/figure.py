"""The frontier as one picture: likelihood of generated text against its entropy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dihal.evaluation.bootstrap import Interval
from dihal.evaluation.frontier.board import Board, Curve
from dihal.evaluation.frontier.result import FrontierRow, Point
from dihal.io import atomic_path, ensure_dir

__all__ = ["save_figure"]

_COLOURS = ("#0068b0", "#c64f00", "#00835f", "#a8478a", "#9a6b00", "#2b87b8", "#8c2d2d", "#5b5bb5")
_INK = "#1c1f24"
_GREY = "#7b8494"
_SHAPES = "osD^v<>Ph*"
_LINES = ("-", "--", ":", "-.")


def _trained(row: FrontierRow) -> tuple[str, str]:
    """What tells a run from the others, and a way of writing. The same run made again keeps its colour."""
    checkpoint = row.checkpoint or {}
    run = checkpoint.get("path") or json.dumps(checkpoint, sort_keys=True)
    return f"{run} {checkpoint.get('weights')}", json.dumps(row.writing, sort_keys=True)


def _styles(board: Board) -> dict[tuple[str, int], dict[str, Any]]:
    """Colour per run, shape per way of writing (and per control), line per number of steps."""
    trained = [_trained(row) for _, row in board.rows() if row.kind == "checkpoint"]
    checkpoints, ways = (list(dict.fromkeys(part)) for part in zip(*trained, strict=True)) if trained else ([], [])
    controls = [label for label, row in board.rows() if row.kind == "control"]
    found = {}
    for curve in board.curves:
        counts = sorted({point.steps for point in curve.row.points})
        line = _LINES[counts.index(curve.steps) % len(_LINES)]
        if curve.row.kind == "checkpoint":
            checkpoint, way = _trained(curve.row)
            style = {
                "color": _COLOURS[checkpoints.index(checkpoint) % len(_COLOURS)],
                "marker": _SHAPES[ways.index(way) % len(_SHAPES)],
                "ls": line,
            }
        elif curve.row.kind == "bound":
            style = {"color": _INK, "marker": "o", "ls": "-", "mfc": "white"}
        elif curve.row.kind == "text":
            style = {"color": _INK, "marker": "*", "ls": "", "ms": 13}
        else:
            shape = _SHAPES[1 + controls.index(curve.label) % (len(_SHAPES) - 1)]
            style = {"color": _GREY, "marker": shape, "ls": line, "mfc": "white"}
        found[curve.label, curve.steps] = style
    return found


def _ends(point: Point, axis: str) -> tuple[float, float]:
    x, y = point.metrics[axis].value, point.metrics["nll"].value
    assert x is not None
    assert y is not None
    return x, y


def _bars(values: list[Interval]) -> list[list[float]]:
    def length(found: Interval, end: float | None) -> float:
        return 0.0 if end is None or found.value is None else abs(found.value - end)

    return [[length(found, found.low) for found in values], [length(found, found.high) for found in values]]


def _draw(axis: Any, board: Board, curve: Curve, style: dict[str, Any]) -> None:
    drawn = [point for point in curve.points if point.metrics["nll"].value is not None]
    if not drawn:
        return
    xs, ys = zip(*(_ends(point, board.axis) for point in drawn), strict=True)
    axis.errorbar(
        xs,
        ys,
        xerr=_bars([point.metrics[board.axis] for point in drawn]),
        yerr=_bars([point.metrics["nll"] for point in drawn]),
        lw=1.6,
        elinewidth=1.4,
        label=curve.name,
        **{"ms": 5.5, **style},
    )
    if curve.row.kind == "text" or len(drawn) < 2:
        return
    from matplotlib.patheffects import Normal, Stroke

    for point, x, y in ((drawn[0], xs[0], ys[0]), (drawn[-1], xs[-1], ys[-1])):
        axis.annotate(
            f"{point.temperature:g}",
            (x, y),
            xytext=(4, -10),
            textcoords="offset points",
            fontsize=7,
            color=style["color"],
            path_effects=[Stroke(linewidth=2, foreground="white"), Normal()],
            zorder=5,
        )


def save_figure(board: Board, folder: str | Path) -> list[Path]:
    """Write frontier.png and frontier.svg; return them. They carry no date: equal boards give equal pictures.

    Raises:
        UsageError: the folder cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder = ensure_dir(folder)
    styles = _styles(board)
    settings = {"svg.hashsalt": "dihal", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(9.2, max(5.0, 1.4 + 0.24 * len(board.curves))), layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        for entropy in board.entropies:
            axis.axvline(entropy, color="#b9c2cd", lw=1, ls=(0, (3, 3)), zorder=0)
        for curve in reversed(board.curves):
            _draw(axis, board, curve, styles[curve.label, curve.steps])
        axis.grid(color="#dfe4ea", lw=0.8)
        axis.set_axisbelow(True)
        tokens = "backbone" if board.axis == "entropy" else "scorer"
        axis.set_xlabel(f"unigram entropy within a continuation, nats ({tokens} tokens)")
        scorer = Path(board.first.comparable.scorer).name  # of a folder or hub id, what tells it apart
        axis.set_ylabel(f"NLL under {scorer}{' (self-graded)' if board.first.self_graded else ''}, nats/token")
        axis.set_title("Likelihood of generated text against its entropy; numbers are temperatures", fontsize=10)
        handles, labels = axis.get_legend_handles_labels()
        lines = [container.lines[0] for container in handles[::-1]]
        figure.legend(lines, labels[::-1], loc="outside right upper", frameon=False, fontsize=8, handlelength=2.8)
        written = []
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            target = folder / f"frontier.{kind}"
            with atomic_path(target) as staged:
                figure.savefig(staged, format=kind, dpi=150, metadata=metadata)
            written.append(target)
    return written
