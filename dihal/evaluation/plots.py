"""The leaderboard as one picture: KL of every row, KL against state error, KL against sampling steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dihal.evaluation import series
from dihal.evaluation.ranking import Board
from dihal.evaluation.scale import log_scale, tick_text
from dihal.evaluation.series import Series
from dihal.io import atomic_path, ensure_dir

__all__ = ["save_figure"]

_COLOURS = ("#0068b0", "#c64f00", "#00835f", "#a8478a", "#9a6b00", "#2b87b8")
_GREY = "#7b8494"
_SHAPES = "osD^v<>Ph*"


def _colour(item: Series) -> str:
    return _GREY if item.colour is None else _COLOURS[item.colour % len(_COLOURS)]


def _markers(groups: Sequence[list[Series]]) -> dict[str, str]:
    """A shape per row, the same in all panels: grey rows cannot be told apart by colour."""
    grey = dict.fromkeys(item.label for items in groups for item in items if item.colour is None)
    return {label: _SHAPES[index % len(_SHAPES)] for index, label in enumerate(grey)}


def _face(item: Series) -> str:
    return _colour(item) if item.kind == "checkpoint" else "white"


def _axis(axis: Any, which: str, values: Sequence[float]) -> Any:
    """Give an axis our scale (with its place for zero) and return where a value lies."""
    scale = log_scale(values)
    getattr(axis, f"set_{which}ticks")([scale(tick) for tick in scale.ticks], [tick_text(t) for t in scale.ticks])
    getattr(axis, f"set_{which}lim")(-0.04, 1.04)
    return scale


def _rows(axis: Any, rows: list[Series], shapes: dict[str, str]) -> None:
    marks = [item.marks[0] for item in rows]
    place = _axis(axis, "x", [v for m in marks for v in (m.x, m.low, m.high) if v is not None])
    for index, (item, mark) in enumerate(zip(rows, marks, strict=True)):
        if mark.low is not None and mark.high is not None:
            axis.plot([place(mark.low), place(mark.high)], [index, index], color=_colour(item), lw=2, alpha=0.6)
        axis.plot(place(mark.x), index, shapes.get(item.label, "o"), color=_colour(item), mfc=_face(item), ms=6)
        text = "0" if mark.x == 0 else f"{mark.x:.3g}"
        axis.annotate(text, (1.02, index), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [item.label for item in rows])
    for tick, item in zip(axis.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if item.kind == "checkpoint" else "normal")
        tick.set_color("black" if item.kind == "checkpoint" else "#566070")
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlabel("KL(backbone ‖ row), nats")
    axis.set_title("Distance from the backbone")


def _scatter(axis: Any, items: list[Series], shapes: dict[str, str]) -> None:
    marks = [mark for item in items for mark in item.marks]
    x_place = _axis(axis, "x", [m.x for m in marks])
    y_place = _axis(axis, "y", [v for m in marks for v in (m.y, m.low, m.high) if v is not None])
    for item in items:
        for mark in item.marks:
            x, y = x_place(mark.x), y_place(mark.y)
            alpha = 1.0 if mark.best else 0.4
            if mark.low is not None and mark.high is not None:
                axis.plot([x, x], [y_place(mark.low), y_place(mark.high)], color=_colour(item), lw=2, alpha=0.5 * alpha)
            name = item.label if mark.best else None
            axis.plot(
                x,
                y,
                shapes.get(item.label, "o"),
                color=_colour(item),
                mfc=_face(item),
                ms=6 if mark.best else 4,
                alpha=alpha,
                label=name,
            )
    axis.set_xlabel("state variance not explained")
    axis.set_ylabel("KL, nats")
    axis.set_title("State error against KL")


def _steps(axis: Any, items: list[Series], shapes: dict[str, str]) -> None:
    steps = sorted({mark.x for item in items for mark in item.marks})
    y_place = _axis(axis, "y", [v for item in items for m in item.marks for v in (m.y, m.low, m.high) if v is not None])
    for item in items:
        xs = [steps.index(mark.x) for mark in item.marks]
        axis.plot(xs, [y_place(mark.y) for mark in item.marks], "o-", color=_colour(item), ms=5, label=item.label)
        for x, mark in zip(xs, item.marks, strict=True):
            if mark.low is not None and mark.high is not None:
                axis.plot([x, x], [y_place(mark.low), y_place(mark.high)], color=_colour(item), lw=2, alpha=0.5)
    axis.set_xticks(range(len(steps)), [f"{step:g}" for step in steps])
    axis.set_xlim(-0.3, len(steps) - 0.7)
    axis.set_xlabel("sampling steps")
    axis.set_ylabel("KL, nats")
    axis.set_title("Sampling steps")


def save_figure(board: Board, folder: str | Path) -> list[Path]:
    """Write leaderboard.png and leaderboard.svg; return them.

    Panels without data are left out. The files carry no date, so equal boards give equal pictures.

    Raises:
        UsageError: the folder cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [
        (draw, items)
        for draw, items in (
            (_rows, series.kl_by_row(board)),
            (_scatter, series.kl_against_error(board)),
            (_steps, series.kl_by_steps(board)),
        )
        if items
    ]
    shapes = _markers([items for _, items in panels])
    folder = ensure_dir(folder)
    count = max(1, len(panels))
    settings = {"svg.hashsalt": "dihal", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(settings):
        height = max(3.6, 1.6 + 0.26 * len(board.entries))
        figure = Figure(figsize=(0.6 + 4.6 * count, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, count, squeeze=False)[0]
        for axis, (draw, items) in zip(axes, panels, strict=True):
            draw(axis, items, shapes)
            axis.grid(color="#dfe4ea", lw=0.8)
            axis.set_axisbelow(True)
        handles: dict[str, Any] = {}
        for axis in axes[1:]:
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        if handles:
            figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
        written = []
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            target = folder / f"leaderboard.{kind}"
            with atomic_path(target) as staged:
                figure.savefig(staged, format=kind, dpi=150, metadata=metadata)
            written.append(target)
    return written
