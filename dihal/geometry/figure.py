"""One figure: the score with its intervals, the three proxies, the selected split."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dihal.geometry.report import ScoreReport, SplitReport
from dihal.geometry.table import text_line
from dihal.io import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_figure", "save_figure"]

# Okabe and Ito's palette: told apart with every common colour vision, and by marker and dash in grey.
_STYLE = {
    "raw": ("#E69F00", "s", (0, (4, 2))),
    "rms": ("#0072B2", "o", "solid"),
    "standardized": ("#009E73", "^", (0, (1, 1.2))),
}
_SELECTED = "#D55E00"
_PROXIES = (
    ("curvature", "local curvature κ"),
    ("stiffness", "global stiffness s"),
    ("rank", "log effective rank r"),
)


def _limits(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = 0.08 * (high - low) or 0.5
    return low - pad, high + pad


def _control_at(layers: int) -> float:
    """Where split 0 stands: at 0, or farther left where layers are many and the room between two is small."""
    return min(0.0, 1 - 0.1 * layers)


def _control(
    axes: Axes, value: float, limits: tuple[float, float], style: tuple[Any, ...], layers: int, above: int = 0
) -> None:
    """Split 0: a hollow marker, or an arrow at the edge with its value where that is off the scale.

    ``above``: arrows already drawn at this edge.
    """
    colour, marker, _ = style
    low, high = limits
    x = _control_at(layers)
    if low <= value <= high:
        axes.plot([x], [value], marker=marker, ms=5, mfc="white", mec=colour, color=colour, ls="none", zorder=4)
        return
    up = value > high
    height = axes.get_position().height * axes.figure.get_figheight()
    inch = (high - low) / max(height, 0.5)
    sign = -1 if up else 1
    position = (high if up else low) + sign * inch * (0.09 + 0.34 * above)
    axes.plot([x], [position], marker="^" if up else "v", ms=5, mfc="white", mec=colour, ls="none", zorder=4)
    axes.annotate(
        f"{value:.1f}", (x, position), xytext=(0, 9 * sign), textcoords="offset points", fontsize=7.5, color="0.25",
        ha="center", va="center", zorder=5,
    )  # fmt: skip


def _line(
    axes: Axes, splits: list[SplitReport], name: str, style: tuple[Any, ...], label: str | None = None
) -> list[float]:
    """Values of the candidates with their band; returns everything that must be inside the axis."""
    colour, marker, dash = style
    x = [item.split for item in splits]
    y = [getattr(item, name) for item in splits]
    bands = [getattr(item, f"{name}_interval") for item in splits]
    shown = list(y)
    if all(band is not None for band in bands):
        low, high = zip(*bands)
        axes.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)
        shown += [*low, *high]
    axes.plot(x, y, color=colour, marker=marker, ms=3.6, lw=1.5, ls=dash, label=label, zorder=3)
    return shown


def _frame(axes: Axes, report: ScoreReport, ticks: int) -> None:
    layers = len(report.layers)
    control = _control_at(layers)
    axes.axvline((control + 1) / 2, color="0.6", lw=0.8, ls=(0, (2, 2)))
    axes.axvline(report.selected_split, color=_SELECTED, lw=1.2, alpha=0.8, zorder=1)
    axes.grid(axis="y", color="0.9", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(control - 0.06 * layers - 0.3, layers - 0.5)
    shown = list(range(1, layers, max(1, -(-layers // ticks))))
    axes.set_xticks([control, *shown], ["0", *map(str, shown)])
    axes.tick_params(labelsize=8)


def draw_figure(report: ScoreReport) -> Figure:
    """Draw the report. Uses no pyplot state; the caller owns the figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = list(report.coordinates)
    rows, layers = len(names), len(report.layers)
    figure = Figure(figsize=(10.5, 4.2 + 1.75 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows + 1, 3, height_ratios=[2.0] + [1.0] * rows, hspace=0.05)

    top = figure.add_subplot(grid[0, :])
    shown: list[float] = []
    for name in names:
        splits = [item for item in report.coordinates[name].splits if item.candidate]
        best = report.coordinates[name].argmax
        shown += _line(top, splits, "score", _STYLE[name], label=f"{name} (best: {best})")
    limits = _limits(shown)
    arrows = {True: 0, False: 0}
    for name in names:
        value = report.coordinates[name].splits[0].score
        _control(top, value, limits, _STYLE[name], layers, arrows[value > limits[1]])
        arrows[value > limits[1]] += not limits[0] <= value <= limits[1]
    top.set_ylim(*limits)
    _frame(top, report, ticks=16)
    top.set_ylabel("score  z(κ) + z(s) − z(r)", fontsize=9)
    top.set_xlabel("split (blocks replaced); left of the dashes: split 0, token space, never selected", fontsize=8.5)
    handles, labels = top.get_legend_handles_labels()
    handles.append(top.axvline(report.selected_split, color=_SELECTED, lw=1.2, alpha=0.8, zorder=1))
    labels.append(f"selected: split {report.selected_split} ({report.select_by})")
    top.legend(
        handles, labels, fontsize=8.5, frameon=False, ncols=len(labels), loc="upper center", bbox_to_anchor=(0.5, 1.13)
    )

    for row, name in enumerate(names, start=1):
        for column, (proxy, title) in enumerate(_PROXIES):
            axes = figure.add_subplot(grid[row, column])
            splits = list(report.coordinates[name].splits)
            limits = _limits(_line(axes, splits[1:], proxy, _STYLE[name]))
            _control(axes, getattr(splits[0], proxy), limits, _STYLE[name], layers)
            axes.set_ylim(*limits)
            _frame(axes, report, ticks=6)
            axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
            if row == 1:
                axes.set_title(f"{title} (nats)", fontsize=9.5, pad=10)
            if row == rows:
                axes.set_xlabel("split", fontsize=8.5)
            if column == 0:
                axes.set_ylabel(name, fontsize=9.5, fontweight="bold")
    band = f"; bands: {report.config['confidence']:.0%} document bootstrap" if report.config["bootstrap"] else ""
    figure.suptitle(f"Geometry score of {report.backbone['id']}\n", fontsize=12, fontweight="bold")
    figure.text(
        0.5,
        0.985 - 0.24 / figure.get_figheight(),
        text_line(report) + band,
        ha="center",
        va="top",
        fontsize=8.5,
        color="0.35",
    )
    return figure


def save_figure(report: ScoreReport, *targets: Path) -> None:
    """Write the figure to each path, in the format of its ending; each file is whole or absent.

    Raises:
        UsageError: a path cannot be written.
    """
    import matplotlib

    figure = draw_figure(report)
    # Text stays text in SVG, and two runs give the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dihal"}):
        for target in targets:
            kind = target.suffix.lstrip(".")
            with atomic_path(target) as staged:
                figure.savefig(staged, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
