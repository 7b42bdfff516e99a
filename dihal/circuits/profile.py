"""Where in depth the scores lie, and which components carry them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from dihal.circuits.graph import GraphSpec
from dihal.errors import UsageError

__all__ = ["DepthProfile", "component_scores", "depth_profile", "mean_differences", "top_overlap", "wasserstein"]

Side = Literal["writer", "reader"]
Table = Float[np.ndarray, "writers readers"]


@dataclass(frozen=True, kw_only=True)
class DepthProfile:
    """Shares of magnitude mass per layer; they sum to 1."""

    side: Side
    layers: tuple[int, ...]
    """Writers: seam - 1 (the lower writer), then every block. Readers: every block, then L (the logits)."""
    shares: Float[np.ndarray, " layers"]
    total: int
    """L, the blocks of the whole model."""

    @property
    def early(self) -> float:
        """Share in the first third of the whole model's blocks (the lower writer counts as the block below the seam)."""
        return float(self.shares[[layer < self.total / 3 for layer in self.layers]].sum())

    @property
    def center(self) -> float:
        """Centre of mass, in layers."""
        return float(self.shares @ np.array(self.layers))

    @property
    def lower(self) -> float:
        """Writers: share of the lower writer (`input`, or `bridge` under a seam); readers: of the first block."""
        return float(self.shares[0])


def depth_profile(
    spec: GraphSpec, table: Table, side: Side, edges: Bool[np.ndarray, "writers readers"] | None = None
) -> DepthProfile:
    """Magnitude mass per layer, by the layer of the writer or of the reader.

    Args:
        spec: the graph.
        table: scores.
        side: which end of an edge gives the layer.
        edges: edges that count; None: all.

    Raises:
        UsageError: no mass at all.
    """
    mass = np.abs(table.astype(np.float64)) * (spec.edge_mask if edges is None else edges)
    if side == "writer":
        where, layers, per_node = spec.layer_of_writer, range(spec.seam - 1, spec.layers), mass.sum(1)
    else:
        where, layers, per_node = spec.layer_of_reader, range(spec.seam, spec.layers + 1), mass.sum(0)
    if per_node.sum() == 0:
        raise UsageError("all scores are zero: there is no depth profile. Does the metric depend on the corruption?")
    shares = np.bincount(where - layers[0], weights=per_node, minlength=len(layers))
    return DepthProfile(side=side, layers=tuple(layers), shares=shares / shares.sum(), total=spec.layers)


def wasserstein(one: DepthProfile, other: DepthProfile) -> float:
    """Wasserstein-1 distance of two profiles, in layers: mass times the way it must go."""
    if one.layers != other.layers:
        raise UsageError("depth profiles of different graphs cannot be compared: contract both at one seam.")
    return float(np.abs(np.cumsum(one.shares - other.shares)[:-1]).sum())


def component_scores(
    spec: GraphSpec, table: Table, edges: Bool[np.ndarray, "writers readers"] | None = None
) -> Float[np.ndarray, " writers"]:
    """s(v): the scores of the edges that enter a component and of those that leave it, added up (with their signs).

    Components are the writers. A key or value that several heads share is an edge into each of them, by equal parts.

    Args:
        spec: the graph.
        table: scores.
        edges: edges that count (Kong et al.: the top K); None: all.
    """
    kept = table.astype(np.float64) * (spec.edge_mask if edges is None else edges)
    entering = kept.sum(0)
    out = kept.sum(1)
    node = spec.reader_node
    fed = node >= 0
    shared = np.maximum(fed.sum(1), 1)
    reader, column = np.nonzero(fed)
    np.add.at(out, node[reader, column], entering[reader] / shared[reader])
    return out


def top_overlap(one: Float[np.ndarray, " writers"], other: Float[np.ndarray, " writers"], k: int) -> float:
    """Share of the `k` components largest in magnitude that two models have in common (0 to 1)."""
    k = min(k, len(one))
    first, second = (set(np.argsort(-np.abs(values), kind="stable")[:k].tolist()) for values in (one, other))
    return len(first & second) / k


def mean_differences(one: DepthProfile, other: DepthProfile) -> dict[str, float]:
    """Second minus first: centre of mass (layers), early share, share of the lower writer."""
    return {
        "center": other.center - one.center,
        "early": other.early - one.early,
        "lower": other.lower - one.lower,
    }
