"""Figures of a comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from dihal.circuits.figures import (
    FIRST,
    SECOND,
    clean_axes,
    draw_depth,
    draw_lens,
    draw_maps,
    draw_neurons,
    new_figure,
    percent_axis,
    plot_band,
)
from dihal.circuits.graph import GraphSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["parts"]

Part = tuple["Callable[[], Figure]", str, str, str]


def _jaccard(data: dict[str, Any]) -> Figure:
    figure = new_figure(6.4, 3.9)
    axes = figure.subplots()
    rows = data["overlap"]
    ks = [row["k"] for row in rows]
    value = [row["jaccard"] for row in rows]
    axes.fill_between(
        ks,
        0,
        [row["null"]["layer"]["high"] for row in rows],
        color="0.75",
        alpha=0.6,
        lw=0,
        label="layer-preserving null, up to its 95 % quantile",
    )
    axes.plot(ks, [row["chance"] for row in rows], color="0.35", lw=1, ls=(0, (1, 1.5)), label="chance, K / (2E − K)")
    axes.plot(
        ks,
        [row["ceiling"] for row in rows],
        color="#009E73",
        lw=1.3,
        ls=(0, (4, 2)),
        marker="^",
        ms=4,
        label="ceiling: split halves of one model",
    )
    low, high = ([item[end] if item[end] is not None else item["value"] for item in value] for end in ("low", "high"))
    plot_band(axes, ks, [item["value"] for item in value], low, high, "both models, all prompts", FIRST, "o")
    axes.plot(
        ks,
        [row["halves"]["across"] for row in rows],
        color=SECOND,
        lw=1.2,
        marker="s",
        ms=3.5,
        label="both models, across halves",
    )
    axes.set_xscale("log")
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("edges in each circuit, K", fontsize=8.5)
    axes.set_ylabel("Jaccard overlap", fontsize=8.5)
    clean_axes(axes)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def _depth(data: dict[str, Any]) -> Figure:
    sides = {}
    for side, found in data["depth"].items():
        rows = [
            (label, colour, model["shares"], model["low"], model["high"])
            for label, colour, model in zip(data["labels"], (FIRST, SECOND), found["models"], strict=True)
        ]
        sides[side] = (found["layers"], rows)
    return draw_depth(sides, data["spec"]["layers"])


_ROWS = {
    "first": "circuit of the first",
    "second": "circuit of the second",
    "intersection": "intersection",
    "union": "union",
    "random like first": "random, layers of the first",
    "random like second": "random, layers of the second",
}


def _matrix(data: dict[str, Any]) -> Figure:
    function = data["function"]
    models = [function["in_first"], function["in_second"]]
    table = np.array(
        [[model[name]["value"] if model[name]["value"] is not None else np.nan for model in models] for name in _ROWS]
    )
    figure = new_figure(6.2, 3.5)
    axes = figure.subplots()
    axes.imshow(np.clip(table, 0, 1), cmap="Blues", vmin=0, vmax=1.15, aspect="auto")
    for i, name in enumerate(_ROWS):
        for j, model in enumerate(models):
            cell = model[name]
            if cell["value"] is None:
                continue
            band = "" if cell["low"] is None else f"\n[{cell['low']:.2f}, {cell['high']:.2f}]"
            colour = "white" if cell["value"] > 0.7 else "black"
            axes.text(j, i, f"{cell['value']:.2f}{band}", ha="center", va="center", fontsize=8, color=colour)
    sizes = function["sizes"]
    labels = [f"{text} ({sizes.get(name, sizes['own']):,})" for name, text in _ROWS.items()]
    axes.set_yticks(range(len(_ROWS)), labels, fontsize=8)
    axes.set_xticks(
        range(2), [f"{place}: {_short(label)}" for place, label in zip(("first", "second"), data["labels"])], fontsize=8
    )
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("faithfulness in this model (edges in brackets)", fontsize=8.5)
    return figure


def _short(text: str, longest: int = 26) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _transfer(data: dict[str, Any]) -> Figure:
    function = data["function"]
    figure = new_figure(8.4, 3.5)
    cells = figure.subplots(1, 2, sharey=True)
    shares = function["budgets"]
    for axes, model, label in zip(cells, ("in_first", "in_second"), data["labels"], strict=True):
        for name, colour, marker, text in (
            ("first", FIRST, "o", "circuits of the first"),
            ("second", SECOND, "s", "circuits of the second"),
        ):
            rows = function[model]["curves"][name]
            value = [row["value"] if row["value"] is not None else np.nan for row in rows]
            low, high = ([row[end] if row[end] is not None else np.nan for row in rows] for end in ("low", "high"))
            plot_band(axes, shares, value, low, high, text, colour, marker)
        axes.axhline(1, color="0.5", lw=0.8, ls=(0, (3, 2)))
        axes.axvline(function["fraction"], color="0.5", lw=0.8, ls=(0, (1, 1.5)))
        percent_axis(axes, shares)
        axes.set_title(f"run in the {model.removeprefix('in_')}: {_short(label, 38)}", fontsize=9)
        clean_axes(axes)
    cells[0].set_ylim(-0.15, 1.3)
    cells[0].set_ylabel("faithfulness", fontsize=8.5)
    handles, labels = cells[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


_SETS = {
    "own": ("own top components", "#0072B2"),
    "other": ("the other's top", "#56B4E9"),
    "any": ("random", "#777777"),
    "early": ("random, early third", "#E69F00"),
    "middle": ("random, middle third", "#CC79A7"),
    "late": ("random, late third", "#009E73"),
}


def _ablations(data: dict[str, Any]) -> Figure:
    found = data["function"]["ablations"]
    figure = new_figure(8.4, 3.2)
    cells = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, rows, label in zip(cells, found["models"], data["labels"], strict=True):
        for place, (name, (_, colour)) in enumerate(_SETS.items()):
            row = rows[name]
            if row["components"] is None:
                axes.text(0, place, " too few components there", fontsize=7.5, va="center", color="0.45")
                continue
            for shift, kind, face in ((-0.18, "corrupt", colour), (0.18, "zero", "white")):
                drop = row[kind]
                axes.barh(place + shift, drop["value"], height=0.32, color=face, edgecolor=colour, lw=1)
                if drop["low"] is not None:
                    axes.plot([drop["low"], drop["high"]], [place + shift] * 2, color="0.2", lw=1)
        axes.axvline(0, color="0.4", lw=0.8)
        axes.set_title(_short(label, 44), fontsize=9)
        axes.set_xlabel("metric lost, share of clean − corrupted", fontsize=8.5)
        clean_axes(axes)
    cells[0].set_yticks(range(len(_SETS)), [text for text, _ in _SETS.values()], fontsize=8)
    cells[0].set_ylim(len(_SETS) - 0.4, -0.6)
    return figure


def parts(data: dict[str, Any]) -> list[Part]:
    """What can be drawn of a comparison: function that draws, file name, title, caption."""
    labels, spec = data["labels"], GraphSpec(**data["spec"])
    tables = data["components"]["all"]
    made: list[Part] = [
        (
            lambda: _jaccard(data),
            "overlap",
            "Overlap of the top edges",
            "Jaccard overlap of the two models' top K edges against what it would be without a shared mechanism and what "
            "it is for one model on other prompts. Overlap alone decides nothing.",
        ),
        (
            lambda: _depth(data),
            "depth",
            "Depth",
            "Where the magnitude of all scores lies; bands: bootstrap over parts of the prompts. Dashed: first third.",
        ),
        (
            lambda: draw_maps(
                [(label, spec, tables[name]) for label, name in zip(labels, ("first", "second"), strict=True)]
            ),
            "components",
            "Components",
            "Scores of all edges into and out of each head and MLP, added up; one scale.",
        ),
    ]
    if data["function"]:
        made += [
            (
                lambda: _matrix(data),
                "transfer-matrix",
                "Transfer at one budget",
                f"Circuits of {data['function']['fraction']:.1%} of the edges, run in both models; 95 % prompt bootstrap.",
            ),
            (
                lambda: _transfer(data),
                "transfer",
                "Transfer over budgets",
                "Faithfulness of each model's circuits in both models. Dotted: the budget of the verdict.",
            ),
        ]
        if "ablations" in data["function"]:
            made.append(
                (
                    lambda: _ablations(data),
                    "ablations",
                    "Necessity",
                    f"{data['function']['ablations']['count']} components ablated: filled by resampling (their output in the "
                    "corrupted run), hollow by zero. Lines: 95 % prompt bootstrap.",
                )
            )
    if data["lens"]:
        lenses = [
            (label, colour, data["lens"][name])
            for label, colour, name in zip(labels, (FIRST, SECOND), ("first", "second"), strict=True)
        ]
        made.append(
            (
                lambda: draw_lens(lenses),
                "lens",
                "Logit lens",
                "States at the answer's position read by the final norm and output matrix. Right: each model's top "
                "components, 1 - entropy / log V; dashed: medians.",
            )
        )
    if data["neurons"]["layers"]:
        layers = data["neurons"]["layers"]
        rows = [
            (label, colour, [row["layer"] for row in layers], [row[name] for row in layers])
            for label, colour, name in zip(labels, (FIRST, SECOND), ("first", "second"), strict=True)
        ]
        made.append(
            (lambda: draw_neurons(rows), "neurons", "Neurons", "How few MLP neurons carry a layer's attribution.")
        )
    return made
