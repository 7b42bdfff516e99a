"""One figure per regime: the truth along the splits with what was chosen, and every predictor's worth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dihal.io import atomic_path
from dihal.sweep.predictors import GROUPS
from dihal.sweep.report import SweepReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_figure", "save_figure"]

# Okabe and Ito's palette, and a shape per group: told apart without colour as well.
_STYLE = {
    "score": ("#D55E00", "o"),
    "without": ("#E69F00", "v"),
    "proxy": ("#CC79A7", "s"),
    "transfer": ("#009E73", "D"),
    "trivial": ("#555555", "X"),
    "states": ("#0072B2", "^"),
    "suffix": ("#56B4E9", "P"),
}
_CHOICES = {
    "raw": ("#E69F00", (0, (4, 2)), "s"),
    "rms": ("#D55E00", "solid", "o"),
    "standardized": ("#CC79A7", (0, (1, 1.2)), "^"),
}
_BEST = "#009E73"


def _control_at(splits: list[int]) -> float:
    return -0.04 * max(splits)


def _truth(axes: Axes, report: SweepReport, name: str) -> None:
    about = report.truths[name]
    index = {split: place for place, split in enumerate(report.splits)}
    at = _control_at(report.splits)
    x = report.candidates
    y = [about["values"][index[split]] for split in x]
    bands = [about["intervals"][index[split]] for split in x]
    if all(band["low"] is not None for band in bands):
        axes.fill_between(x, [b["low"] for b in bands], [b["high"] for b in bands], color="#0072B2", alpha=0.18, lw=0)
    axes.plot(x, y, color="#0072B2", marker="o", ms=3.4, lw=1.5, zorder=3)
    if len(report.seeds) > 1:
        for row in about["per_seed"]:
            axes.plot(x, [row[index[split]] for split in x], ".", color="#0072B2", ms=3, alpha=0.5)
    if 0 in index:
        axes.plot([at], [about["values"][index[0]]], "o", ms=4.5, mfc="white", mec="#0072B2", zorder=4)
    for place, (kind, (colour, dash, marker)) in enumerate(_CHOICES.items()):
        relation = report.relations[name].get(f"score/{kind}")
        if relation is not None and relation.choice is not None:
            axes.axvline(relation.choice, color=colour, lw=1.1, ls=dash, zorder=1)
            # Lines at one split cover each other, their heads do not.
            axes.plot(
                [relation.choice],
                [0.97 - 0.09 * place],
                marker,
                color=colour,
                ms=6,
                transform=axes.get_xaxis_transform(),
            )
    best = about["best_split"]
    axes.plot([best], [about["values"][index[best]]], "*", color=_BEST, ms=13, zorder=5)
    axes.set_title(f"{about['label']} ({about['unit']})", fontsize=9.5)
    axes.set_xlabel("split (blocks replaced)", fontsize=8.5)
    shown = list(range(5 if max(x) > 12 else 1, max(x) + 1, 5 if max(x) > 12 else 1))
    if 0 in index:
        axes.set_xticks([at, *shown], ["0", *map(str, shown)])
    else:
        axes.set_xticks(shown)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]) if name != "nll" and report.regime == "replace" else None)
    _clean(axes, "y")


def _clean(axes: Axes, grid: str) -> None:
    axes.grid(axis=grid, color="0.9", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _worth(axes: Axes, report: SweepReport, order: list[str], field: str, title: str) -> None:
    """A row per predictor: value and interval of a field of its relation."""
    rows = report.relations[report.truth]
    for place, name in enumerate(order):
        item = getattr(rows[name], field)
        colour, marker = _STYLE[report.predictors[name]["group"]]
        if item.value is None:
            axes.text(0.02, place, "n/a", fontsize=7.5, color="0.5", va="center", transform=axes.get_yaxis_transform())
            continue
        if item.low is not None:
            axes.plot([item.low, item.high], [place, place], color=colour, lw=2.2, alpha=0.45, solid_capstyle="butt")
        axes.plot([item.value], [place], marker, color=colour, ms=5.5, zorder=3)
        if field == "regret":
            axes.annotate(
                f"{rows[name].choice}",
                (1.01, place),
                xycoords=("axes fraction", "data"),
                fontsize=7.5,
                va="center",
                color="0.25",
            )
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_title(title, fontsize=9.5)
    _clean(axes, "x")


def draw_figure(report: SweepReport) -> Figure:
    """Draw the report. Uses no pyplot state; the caller owns the figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    order, about = report.ranking, report.truths[report.truth]
    names = [report.truth, *(name for name in report.truths if name != report.truth)]
    lower = 1.3 + 0.185 * len(order)
    figure = Figure(figsize=(11, 3.6 + lower), layout="constrained")
    FigureCanvasAgg(figure)
    outer = figure.add_gridspec(2, 1, height_ratios=[2.7, lower])
    top = outer[0].subgridspec(1, len(names))
    for column, name in enumerate(names):
        _truth(figure.add_subplot(top[0, column]), report, name)
    bottom = outer[1].subgridspec(1, 2, width_ratios=[1.15, 1])
    left = figure.add_subplot(bottom[0, 0])
    right = figure.add_subplot(bottom[0, 1], sharey=left)
    _worth(left, report, order, "spearman", f"Spearman with −{about['label']} (1: perfect order)")
    left.axvline(0, color="0.5", lw=0.8)
    left.set_xlim(-1.06, 1.06)
    left.set_yticks(range(len(order)), [report.predictors[name]["label"] for name in order])
    for tick, name in zip(left.get_yticklabels(), order):
        tick.set_fontweight("bold" if report.predictors[name]["group"] == "score" else "normal")
    _worth(right, report, order, "regret", f"regret ({about['unit']}); at the edge: split chosen")
    right.axvline(0, color="0.5", lw=0.8)
    random = about["random_regret"]["value"]
    right.axvline(random, color="0.4", lw=1, ls=(0, (3, 2)))
    right.tick_params(labelleft=False)

    handles: list[Any] = [Line2D([], [], marker="*", color=_BEST, ms=11, ls="none", label="least loss")]
    for kind, (colour, dash, marker) in _CHOICES.items():
        if f"score/{kind}" in report.predictors:
            label = f"chosen by the score ({kind})"
            handles.append(Line2D([], [], color=colour, ls=dash, lw=1.1, marker=marker, ms=5, label=label))
    handles.append(Line2D([], [], color="0.4", ls=(0, (3, 2)), lw=1, label="a split at random"))
    used = [group for group in GROUPS if any(item["group"] == group for item in report.predictors.values())]
    for group in used:
        colour, marker = _STYLE[group]
        handles.append(Line2D([], [], marker=marker, color=colour, ls="none", ms=5.5, label=GROUPS[group]))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    control = "; hollow: split 0, token space, never selected" if 0 in report.splits else ""
    inch = 1 / figure.get_figheight()
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.set(rect=(0, 0, 1, 1 - 0.55 * inch))
    title = f"{report.backbone['id']}, regime {report.regime}: what each split costs, and what predicts it"
    figure.text(0.5, 1 - 0.1 * inch, title, ha="center", va="top", fontsize=12, fontweight="bold")
    tokens = f"{report.budget['tokens']:,} diffused tokens a split"
    bands = f"bands: {report.confidence:.0%} document bootstrap{control}"
    figure.text(0.5, 1 - 0.36 * inch, f"{tokens}; {bands}", ha="center", va="top", fontsize=8.5, color="0.35")
    return figure


def save_figure(report: SweepReport, *targets: Path) -> None:
    """Write the figure to each path, in the format of its ending; each file is whole or absent.

    Raises:
        UsageError: a path cannot be written.
    """
    import matplotlib

    figure = draw_figure(report)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dihal"}):
        for target in targets:
            kind = target.suffix.lstrip(".")
            with atomic_path(target) as staged:
                figure.savefig(staged, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
