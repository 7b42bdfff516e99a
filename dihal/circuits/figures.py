"""Figures of a run and of a comparison: matplotlib only, PNG and SVG, drawn from the files alone."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dihal.circuits.drawing import HINDERS, SERVES, draw_circuit, draw_map, places_of, small_circuit
from dihal.circuits.graph import GraphSpec
from dihal.circuits.profile import component_scores, depth_profile
from dihal.circuits.report import Run
from dihal.io import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Drawn",
    "clean_axes",
    "comparison_figures",
    "draw_curves",
    "draw_depth",
    "draw_lens",
    "draw_maps",
    "draw_neurons",
    "new_figure",
    "percent_axis",
    "plot_band",
    "run_figures",
]

# Okabe and Ito's palette, and a marker per series: told apart without colour as well.
FIRST, SECOND = "#0072B2", "#D55E00"
_CURVES = {
    "magnitude": ("EAP-IG, by magnitude", "#0072B2", "o"),
    "signed": ("by signed value", "#009E73", "^"),
    "eap": ("EAP (one gradient)", "#E69F00", "s"),
    "random": ("random edges", "#777777", "x"),
}


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A figure that was written."""

    name: str
    title: str
    caption: str
    svg: str


def clean_axes(axes: Axes) -> None:
    axes.grid(color="0.92", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def layer_axis(axes: Axes) -> None:
    """Whole numbers of layers below an axis."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.set_xlabel("layer", fontsize=8.5)


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, folder: Path, name: str, title: str, caption: str) -> Drawn:
    """Write a figure as PNG and SVG."""
    import matplotlib

    held = ""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dihal"}):
        for kind in ("png", "svg"):
            with atomic_path(folder / f"{name}.{kind}") as staged:
                figure.savefig(staged, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        held = buffer.getvalue()
    return Drawn(name=name, title=title, caption=caption, svg=held)


def percent_axis(axes: Axes, shares: Sequence[float]) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    shown = [share for share in (0.001, 0.01, 0.1, 1.0) if min(shares) <= share <= max(shares)]
    axes.set_xticks(shown, [f"{100 * share:g} %" for share in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("share of all edges in the circuit", fontsize=8.5)


def plot_band(
    axes: Axes, x: Any, y: Any, low: Any, high: Any, label: str, colour: str, marker: str, dash: str = "-"
) -> None:
    axes.fill_between(x, low, high, color=colour, alpha=0.14, lw=0)
    axes.plot(x, y, color=colour, marker=marker, ms=4, lw=1.5, ls=dash, label=label)


def draw_curves(curves: dict[str, Any]) -> Figure:
    """Faithfulness over budgets."""
    figure = new_figure(6.4, 3.9)
    axes = figure.subplots()
    top = 1.15
    for name, row in curves.items():
        label, colour, marker = _CURVES[name]
        low, high = row["intervals"]
        text = f"{label}: CPR {row['cpr']:.2f}, CMD {row['cmd']:.3f}"
        plot_band(axes, row["fractions"], row["faithfulness"], low, high, text, colour, marker)
        top = max(top, 1.05 * max(row["faithfulness"]))
    axes.axhline(1, color="0.5", lw=0.8, ls=(0, (3, 2)))
    axes.axhline(0, color="0.5", lw=0.8)
    axes.set_ylim(-0.15, min(top, 4.0))
    percent_axis(axes, [share for row in curves.values() for share in row["fractions"]])
    axes.set_ylabel("faithfulness", fontsize=8.5)
    clean_axes(axes)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def _profiles(axes: Axes, layers: Sequence[int], rows: Sequence[tuple[str, str, Any, Any, Any]]) -> None:
    for label, colour, shares, low, high in rows:
        if low is not None:
            axes.fill_between(layers, low, high, color=colour, alpha=0.2, lw=0, step="mid")
        axes.step(layers, shares, where="mid", color=colour, lw=1.5, label=label)
    axes.set_ylim(bottom=0)
    layer_axis(axes)
    clean_axes(axes)


def draw_depth(sides: dict[str, tuple[Sequence[int], list[tuple[str, str, Any, Any, Any]]]], total: int) -> Figure:
    """Share of the scores' magnitude per layer, by writer and by reader."""
    figure = new_figure(8.2, 3.2)
    for axes, (side, (layers, rows)) in zip(figure.subplots(1, 2), sides.items(), strict=True):
        _profiles(axes, layers, rows)
        axes.axvline(total / 3 - 0.5, color="0.5", lw=0.8, ls=(0, (3, 2)))
        axes.set_title(f"by the layer that {'writes' if side == 'writer' else 'reads'}", fontsize=9.5)
        axes.set_ylabel("share of magnitude", fontsize=8.5)
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def draw_maps(items: Sequence[tuple[str, GraphSpec, Any]]) -> Figure:
    """Component scores of one or two models, in one scale."""
    spec = items[0][1]
    figure = new_figure(1.1 + len(items) * (2.4 + 0.09 * spec.heads), 1.4 + 0.12 * max(12, min(spec.depth, 48)))
    tables = [np.asarray(table, dtype=np.float64) for *_, table in items]
    # A few components tower above the rest: the scale ends at the 99th percentile.
    limit = float(np.quantile(np.abs(np.concatenate([table[1:] for table in tables])), 0.99)) or 1.0
    cells = figure.subplots(1, len(items), squeeze=False)[0]
    for axes, (label, own, _), table in zip(cells, items, tables, strict=True):
        # Blue serves: the sign of a score is that of corrupting the edge.
        image = draw_map(axes, own, -table, limit)
        axes.set_title(label, fontsize=9)
    bar = figure.colorbar(image, ax=list(cells), shrink=0.8, extend="both")
    bar.set_label("metric lost when corrupted, s(v)", fontsize=8)
    bar.ax.tick_params(labelsize=7.5)
    return figure


def draw_lens(lenses: Sequence[tuple[str, str, dict[str, Any]]]) -> Figure:
    """Answer rank, probability and entropy by layer; specialisation of components."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = new_figure(9.6, 3.0)
    rank, chance, entropy, special = figure.subplots(1, 4)
    for index, (label, colour, lens) in enumerate(lenses):
        marker = "os"[index]
        rank.plot(lens["layers"], np.asarray(lens["rank"]) + 1, color=colour, marker=marker, ms=3, lw=1.3, label=label)
        chance.plot(lens["layers"], lens["probability"], color=colour, marker=marker, ms=3, lw=1.3)
        entropy.plot(lens["layers"], lens["entropy"], color=colour, marker=marker, ms=3, lw=1.3)
        values = sorted(lens["specialisation"], reverse=True)
        special.plot(range(1, len(values) + 1), values, color=colour, marker=marker, ms=3, lw=1.0)
        if values:
            special.axhline(float(np.median(values)), color=colour, lw=0.9, ls=(0, (3, 2)))
    rank.set_yscale("log")
    rank.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    rank.yaxis.set_minor_locator(NullLocator())
    rank.set_ylim(0.8, 1.3 * max(max(lens["rank"]) + 1 for *_, lens in lenses))
    titles = ("answer's rank (1: first)", "answer's probability", "entropy, nats", "specialisation")
    for axes, title in zip((rank, chance, entropy, special), titles, strict=True):
        axes.set_title(title, fontsize=9)
        layer_axis(axes)
        clean_axes(axes)
    special.set_xlabel("component, sorted", fontsize=8.5)
    special.set_ylim(0, 1)
    if len(lenses) > 1:
        handles, labels = rank.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def draw_neurons(rows: Sequence[tuple[str, str, Sequence[int], Sequence[dict[str, Any]]]]) -> Figure:
    """Concentration of MLP neurons by layer."""
    figure = new_figure(8.2, 2.9)
    left, right = figure.subplots(1, 2)
    for index, (label, colour, layers, found) in enumerate(rows):
        marker = "os"[index]
        left.plot(layers, [one["gini"] for one in found], color=colour, marker=marker, ms=3, lw=1.3, label=label)
        shares = [100 * one["share_80"] / one["neurons"] for one in found]
        right.plot(layers, shares, color=colour, marker=marker, ms=3, lw=1.3)
    left.set_title("Gini coefficient of neuron attributions", fontsize=9)
    right.set_title("neurons that hold 80 % of the mass, %", fontsize=9)
    right.set_ylim(bottom=0)
    for axes in (left, right):
        layer_axis(axes)
        clean_axes(axes)
    if len(rows) > 1:
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def _drawing(run: Run, edges: int) -> Figure:
    from matplotlib.lines import Line2D

    circuit = small_circuit(run.scores, edges)
    height = len({y for _, y in places_of(circuit).values()})
    figure = new_figure(7.6, max(3.4, min(11.0, 1.3 + 0.46 * height)))
    axes = figure.subplots()
    draw_circuit(axes, circuit, run.scores)
    handles = [
        Line2D([], [], color=SERVES, lw=2, label="serves the task"),
        Line2D([], [], color=HINDERS, lw=2, label="works against it"),
        Line2D([], [], color="0.3", lw=1.2, ls="solid", label="into value, MLP, logits"),
        Line2D([], [], color="0.3", lw=1.2, ls=(0, (4, 1.6)), label="into query"),
        Line2D([], [], color="0.3", lw=1.2, ls=(0, (1.2, 1.2)), label="into key"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def run_figures(run: Run, *, edges: int = 40) -> list[Drawn]:
    """Draw everything about a run into its folder.

    Args:
        run: a finished run.
        edges: edges of the drawn circuit, at most 50.
    """
    spec, table, details = run.scores.spec, run.scores.scores, run.details
    sides: dict[str, Any] = {}
    for side in ("writer", "reader"):
        profile = depth_profile(spec, table, side)
        sides[side] = (profile.layers, [(run.label, FIRST, profile.shares, None, None)])
    made: list[tuple[Callable[[], Figure], str, str, str]] = [
        (
            lambda: draw_curves(details["curves"]),
            "curves",
            "Faithfulness",
            "How much of the metric circuits of growing size keep, on test prompts; bands: 95 % prompt bootstrap. "
            "1: the whole model, 0: every edge corrupted. CPR and CMD are areas over a linear axis.",
        ),
        (
            lambda: draw_maps([(run.label, spec, component_scores(spec, table))]),
            "components",
            "Components",
            "Scores of all edges into and out of each head and MLP, added up.",
        ),
        (
            lambda: draw_depth(sides, spec.layers),
            "depth",
            "Depth",
            "Where the magnitude of all scores lies. Dashed: end of the first third of the layers.",
        ),
        (
            lambda: _drawing(run, edges),
            "circuit",
            "Circuit",
            f"The largest connected circuit of the top edges with at most {edges} edges; width: size of the score.",
        ),
    ]
    if details.get("lens"):
        made.append(
            (
                lambda: draw_lens([(run.label, FIRST, details["lens"])]),
                "lens",
                "Logit lens",
                "States at the answer's position read by the final norm and output matrix. Right: top components, "
                "1 - entropy / log V of their output read alone; dashed: median.",
            )
        )
    if run.neurons:
        layers = details["neurons"]["layers"]
        rows = [(run.label, FIRST, [int(layer) for layer in layers], list(layers.values()))]
        made.append(
            (lambda: draw_neurons(rows), "neurons", "Neurons", "How few MLP neurons carry a layer's attribution.")
        )
    return [_save(make(), run.folder, name, title, caption) for make, name, title, caption in made]


def comparison_figures(data: dict[str, Any], folder: Path) -> list[Drawn]:
    """Draw everything about a comparison into its folder, from what compare.json holds."""
    from dihal.circuits.figures_compare import parts

    return [_save(make(), folder, name, title, caption) for make, name, title, caption in parts(data)]
