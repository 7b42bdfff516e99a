"""Pictures of graphs: a small circuit as nodes and arrows, and component scores as a map of heads and layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from dihal.circuits.graph import GraphSpec
from dihal.circuits.types import Circuit, EdgeScores
from dihal.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LARGEST_DRAWING", "draw_circuit", "draw_map", "places_of", "small_circuit"]

LARGEST_DRAWING = 50
"""Edges above which a drawing shows nothing."""

SERVES, HINDERS = "#0072B2", "#D55E00"
_DASHES = {"q": (0, (4, 1.6)), "k": (0, (1.2, 1.2)), "v": "solid", "": "solid"}


def small_circuit(scores: EdgeScores, edges: int) -> Circuit:
    """The largest circuit of the top edges by magnitude, dead ends pruned, of at most `edges` edges.

    Raises:
        UsageError: more edges than a drawing can show, or fewer than one.
    """
    if not 1 <= edges <= LARGEST_DRAWING:
        raise UsageError(f"a drawing shows 1 to {LARGEST_DRAWING} edges, not {edges}. Ask for fewer.")
    total, best = scores.spec.n_edges, Circuit.empty(scores.spec)
    # Pruning only ever keeps more edges of a larger circuit, so that a bisection finds the border.
    low, high = 0, total
    while low < high:
        k = (low + high + 1) // 2
        found = scores.top(k, connected=True)
        if found.size <= edges:
            low, best = k, found
        else:
            high = k - 1
    return best


def _node_of(spec: GraphSpec, reader: int) -> list[int]:
    """Writers that a reader feeds; -1 for the logits."""
    found = [int(node) for node in spec.reader_node[reader] if node >= 0]
    return found or [-1]


def _slot(name: str) -> str:
    return name[-2] if name.endswith(">") else ""


def _targets(circuit: Circuit) -> dict[tuple[int, int], list[int]]:
    """Edge -> nodes it is drawn into. Of heads that share a key or value reader, those that another edge leaves."""
    spec, edges = circuit.spec, [(int(u), int(v)) for u, v in np.argwhere(circuit.edges)]
    leaving = {u for u, _ in edges}
    return {
        (u, v): [n for n in _node_of(spec, v) if n == -1 or n in leaving] or _node_of(spec, v)[:1] for u, v in edges
    }


def places_of(circuit: Circuit) -> dict[int, tuple[float, float]]:
    """Place of every node: one row per layer's heads and one per MLP, from below; -1 stands for the logits."""
    spec, targets = circuit.spec, _targets(circuit)
    rows: dict[tuple[int, int], list[int]] = {}
    for node in sorted({u for u, _ in targets} | {node for found in targets.values() for node in found}):
        layer = spec.layers if node == -1 else int(spec.layer_of_writer[node])
        is_mlp = node > 0 and spec.writers[node].startswith("m")
        rows.setdefault((layer, int(is_mlp)), []).append(node)
    places, alone = {}, 0
    for height, key in enumerate(sorted(rows)):
        row = rows[key]
        shift = 0.0
        if len(row) == 1 and row[0] not in (-1, 0):
            # Lone nodes swing left and right, so that edges over several rows do not run through them.
            shift = (0.5, -0.8, 0.9, -0.4)[alone % 4]
            alone += 1
        for index, node in enumerate(row):
            places[node] = (index - (len(row) - 1) / 2 + shift, float(height))
    return places


def draw_circuit(axes: Axes, circuit: Circuit, scores: EdgeScores) -> None:
    """Draw a circuit of at most 50 edges. Blue edges serve the task, orange ones work against it; width is the score's size."""
    from matplotlib.patches import FancyArrowPatch

    spec = circuit.spec
    if circuit.size > LARGEST_DRAWING:
        raise UsageError(f"this circuit has {circuit.size} edges; a drawing shows at most {LARGEST_DRAWING}.")
    targets, places = _targets(circuit), places_of(circuit)
    edges = list(targets)
    largest = max((abs(float(scores.scores[edge])) for edge in edges), default=1.0)
    for u, v in sorted(edges, key=lambda edge: abs(float(scores.scores[edge]))):
        score, slot = float(scores.scores[u, v]), _slot(spec.readers[v])
        for node in targets[u, v]:
            start, end = places[u], places[node]
            near = abs(end[1] - start[1]) <= 1
            bend = 0.08 * np.sign(end[0] - start[0] or 1) if near else 0.22 * np.sign(start[0] + end[0] or 1)
            arrow = FancyArrowPatch(
                start,
                end,
                connectionstyle=f"arc3,rad={bend}",
                arrowstyle="-|>",
                mutation_scale=8,
                shrinkA=11,
                shrinkB=11,
                lw=0.6 + 3.2 * abs(score) / largest,
                ls=_DASHES[slot],
                color=SERVES if score < 0 else HINDERS,
                alpha=0.75,
                zorder=1,
            )
            axes.add_patch(arrow)
    for node, (x, y) in places.items():
        name = "logits" if node == -1 else spec.writers[node]
        kind = "#E8E8E8" if node in (-1, 0) else "#FFF3D6" if name.startswith("m") else "#DDEEFA"
        box = {"boxstyle": "round,pad=0.28", "fc": kind, "ec": "0.35", "lw": 0.8}
        axes.text(x, y, name, ha="center", va="center", fontsize=7.5, bbox=box, zorder=3)
    xs, ys = [p[0] for p in places.values()] or [0.0], [p[1] for p in places.values()] or [0.0]
    axes.set_xlim(min(xs) - 0.8, max(xs) + 0.8)
    axes.set_ylim(min(ys) - 0.6, max(ys) + 0.6)
    axes.axis("off")


def draw_map(axes: Axes, spec: GraphSpec, components: Float[np.ndarray, " writers"], limit: float) -> Any:
    """Map of s(v): a column per head, one for the MLP, a row per layer from the bottom; what is below a seam is left out."""
    width = spec.heads + (1 if any(name.startswith("m") for name in spec.writers[1:]) else 0)
    table = components[1:].reshape(spec.depth, width)
    image = axes.imshow(
        table,
        origin="lower",
        aspect="auto",
        cmap="RdBu",
        vmin=-limit,
        vmax=limit,
        extent=(-0.5, width - 0.5, spec.seam - 0.5, spec.layers - 0.5),
        interpolation="nearest",
    )
    step = max(1, spec.heads // 8)
    ticks = list(range(0, spec.heads, step))
    labels = [str(tick) for tick in ticks]
    if width > spec.heads:
        axes.axvline(spec.heads - 0.5, color="0.3", lw=0.8)
        ticks, labels = [*ticks, spec.heads], [*labels, "MLP"]
    axes.set_xticks(ticks, labels, fontsize=7.5)
    axes.set_xlabel("head", fontsize=8.5)
    axes.set_ylabel("layer", fontsize=8.5)
    axes.tick_params(labelsize=7.5)
    return image
