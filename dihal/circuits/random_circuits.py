"""Random circuits and components of the same size and place as given ones: what "better than chance" means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from dihal.circuits.graph import GraphSpec
from dihal.circuits.types import Circuit
from dihal.errors import UsageError, unknown_name
from dihal.random import uniform

__all__ = ["DEPTHS", "matched_components", "random_circuit"]

DEPTHS = {"any": (0.0, 1.0), "early": (0.0, 1 / 3), "middle": (1 / 3, 2 / 3), "late": (2 / 3, 1.0)}
"""Where random components lie, as shares of the blocks of the graph."""


def _order(seed: int, purpose: str, count: int) -> np.ndarray:
    return np.argsort(uniform(seed, torch.arange(count), purpose, dtype=torch.float64).numpy(), kind="stable")


def random_circuit(spec: GraphSpec, k: int | None = None, *, seed: int = 0, like: Circuit | None = None) -> Circuit:
    """Edges drawn without replacement: ``k`` of all, or as many as ``like`` has between every two layers.

    Raises:
        UsageError: both or neither of ``k`` and ``like``, or more edges than there are.
    """
    if (k is None) == (like is None):
        raise UsageError("give either a number of edges k, or a circuit to be like.")
    inside = np.flatnonzero(spec.edge_mask)
    edges = np.zeros(spec.edge_mask.size, dtype=bool)
    order = inside[_order(seed, "random circuit", len(inside))]
    if like is None:
        assert k is not None
        if not 0 <= k <= len(inside):
            raise UsageError(f"{k} edges were asked for; this graph has {len(inside)}.")
        edges[order[:k]] = True
        return Circuit(spec=spec, edges=edges.reshape(spec.edge_mask.shape), rule="random", k=k)
    # A cell is a pair of layers; in the random order, the first edges of each cell are taken.
    cells = (spec.layer_of_writer[:, None] * (spec.layers + 1) + spec.layer_of_reader[None, :]).ravel()
    for cell in np.unique(cells[like.edges.ravel()]):
        wanted = int(like.edges.ravel()[cells == cell].sum())
        edges[order[cells[order] == cell][:wanted]] = True
    return Circuit(spec=spec, edges=edges.reshape(spec.edge_mask.shape), rule="random, layers matched", k=like.size)


def matched_components(
    spec: GraphSpec,
    components: Sequence[str],
    *,
    seed: int = 0,
    depth: Literal["any", "early", "middle", "late"] = "any",
) -> list[str]:
    """As many heads and as many MLPs as given, drawn from the others in a third of the blocks.

    Raises:
        UsageError: an unknown depth or component, or too few others there.
    """
    if depth not in DEPTHS:
        raise unknown_name("depth", depth, DEPTHS)
    given = {spec.writer_index(name) for name in components}
    low, high = (spec.seam + round(share * spec.depth) for share in DEPTHS[depth])
    out: list[str] = []
    for kind in ("a", "m"):
        wanted = sum(spec.writers[index][0] == kind and index > 0 for index in given)
        pool = [
            index
            for index in range(1, spec.n_writers)
            if spec.writers[index][0] == kind and index not in given and low <= spec.layer_of_writer[index] < high
        ]
        if wanted > len(pool):
            raise UsageError(
                f"{wanted} random components were asked for at depth {depth!r}, which has {len(pool)} others."
            )
        out += [spec.writers[pool[place]] for place in _order(seed, f"components {kind} {depth}", len(pool))[:wanted]]
    return out
