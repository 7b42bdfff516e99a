"""How alike two sets of edges, or two score tables, are. Pure functions on arrays of edges.

An array of edges holds one value per edge of the graph, in the order of `edge_values`. All of these measure
*structure*: two circuits that share few edges may still do the same (see `verdict.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import spearmanr

from dihal.circuits.graph import GraphSpec
from dihal.circuits.types import EdgeScores
from dihal.errors import UsageError
from dihal.random import uniform

__all__ = [
    "Estimate",
    "budgets",
    "chance_jaccard",
    "corrected",
    "edge_values",
    "jaccard",
    "jaccards",
    "part_weights",
    "require_parts",
    "resampled_edges",
    "spearman",
    "top_edges",
    "weighted_jaccard",
]

Edges = Float[np.ndarray, " edges"]
Chosen = Bool[np.ndarray, " edges"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value and its interval; null where there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, value: float, resampled: Float[np.ndarray, " resamples"], confidence: float) -> Estimate:
        """Percentile interval, shifted so that the resamples' mean falls on the value.

        Shifted, because these statistics are biased by noise and a resample has more of it than the sample: a
        magnitude grows, an overlap shrinks.
        """
        finite = resampled[np.isfinite(resampled)]
        if not np.isfinite(value):
            return cls(value=None)
        if len(finite) < 2:
            return cls(value=float(value))
        tail = (1.0 - confidence) / 2.0
        low, high = np.quantile(finite, [tail, 1.0 - tail]) - finite.mean() + value
        return cls(value=float(value), low=float(low), high=float(high))

    @property
    def lower(self) -> float:
        """Low end; the value where there is no interval."""
        known = self.low if self.low is not None else self.value
        return float("nan") if known is None else known

    @property
    def upper(self) -> float:
        """High end; the value where there is no interval."""
        known = self.high if self.high is not None else self.value
        return float("nan") if known is None else known

    def record(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)


def edge_values(spec: GraphSpec, table: Float[np.ndarray, "writers readers"]) -> Edges:
    """The values of the edges that exist, row by row, in float64."""
    return table[spec.edge_mask].astype(np.float64)


def top_edges(values: Edges, k: int) -> Chosen:
    """The `k` largest in magnitude; ties go to the lower index, as in `EdgeScores.top`.

    Raises:
        UsageError: `k` is larger than the number of edges, or below 1.
    """
    if not 1 <= k <= len(values):
        raise UsageError(f"K = {k} is out of range: this graph has {len(values)} edges.")
    chosen = np.zeros(len(values), dtype=bool)
    chosen[np.argsort(-np.abs(values), kind="stable")[:k]] = True
    return chosen


def jaccard(one: Chosen, other: Chosen) -> float:
    """Size of the intersection by size of the union; 1 where both are empty."""
    union = int((one | other).sum())
    return 1.0 if union == 0 else int((one & other).sum()) / union


def jaccards(a: Edges, b: Edges, ks: Int[np.ndarray, " budgets"]) -> list[float]:
    """J of the two tables' top edges at every K, by one sort of each; as `jaccard` of `top_edges`."""
    order_a, order_b = (np.argsort(-np.abs(values), kind="stable") for values in (a, b))
    rank_a, rank_b = np.empty(len(a), dtype=np.int64), np.empty(len(b), dtype=np.int64)
    rank_a[order_a], rank_b[order_b] = np.arange(len(a)), np.arange(len(b))
    # An edge is shared at K when the worse of its two ranks is below K: one sort serves all K.
    shared = np.searchsorted(np.sort(np.maximum(rank_a, rank_b)), ks)
    return list(shared / (2 * ks - shared))


def chance_jaccard(k: int, edges: int) -> float:
    """J of two independent uniform sets of `k` edges of `edges`: K / (2E - K), from the expected intersection K^2 / E."""
    return k / (2 * edges - k)


def corrected(value: float, chance: float, ceiling: float = 1.0) -> float:
    """Rescaled so that chance is 0 and the ceiling 1; NaN where the ceiling is not above chance."""
    return (value - chance) / (ceiling - chance) if ceiling > chance else float("nan")


def weighted_jaccard(one: Edges, other: Edges) -> float:
    """Sum of minima by sum of maxima of magnitudes normalised to sum 1: needs no K; NaN where one is all zero."""
    a, b = np.abs(one), np.abs(other)
    if a.sum() == 0 or b.sum() == 0:
        return float("nan")
    a, b = a / a.sum(), b / b.sum()
    return float(np.minimum(a, b).sum() / np.maximum(a, b).sum())


def spearman(one: Edges, other: Edges) -> float:
    """Rank correlation of magnitudes over all edges; NaN where one is constant."""
    a, b = np.abs(one), np.abs(other)
    return float("nan") if np.ptp(a) == 0 or np.ptp(b) == 0 else float(spearmanr(a, b).statistic)


def part_weights(counts: Sequence[int], resamples: int, seed: int) -> Float[np.ndarray, "resamples parts"]:
    """Weights of each part of the prompts in each resample: parts drawn with replacement, weighted by their prompts.

    The same arguments always give the same weights, which pairs two models on the same prompts. Parts stand for
    groups of prompts, so that fewer than about eight give coarse intervals.
    """
    import torch

    parts = len(counts)
    draws = uniform(seed, torch.arange(resamples), "circuits-bootstrap", (parts,), dtype=torch.float64).numpy()
    chosen = np.minimum((draws * parts).astype(np.int64), parts - 1)
    weights = np.stack([(chosen == part).sum(1) for part in range(parts)], axis=1) * np.asarray(counts, np.float64)
    total = weights.sum(1, keepdims=True)
    # A resample may consist of parts without prompts; it then repeats the sample.
    weights = np.where(total > 0, weights, np.asarray(counts, np.float64))
    return weights / weights.sum(1, keepdims=True)


def resampled_edges(scores: EdgeScores, weights: Float[np.ndarray, " parts"]) -> Edges:
    """Scores of a resample of the prompts.

    Raises:
        UsageError: the scores were kept without parts.
    """
    return edge_values(scores.spec, np.tensordot(weights, require_parts(scores).astype(np.float64), 1))


def require_parts(scores: EdgeScores) -> Float[np.ndarray, "parts writers readers"]:
    """The parts, or an error that says how to get them."""
    if scores.parts is None or len(scores.parts) < 2:
        raise UsageError("these scores were kept without parts, which ceilings and intervals need. Run them again.")
    return scores.parts


def budgets(edges: int, ks: Sequence[int], fractions: Sequence[float]) -> Int[np.ndarray, " budgets"]:
    """All K at which overlap is reported: those given that the graph has, and the shares of it; ascending, once each."""
    wanted = {k for k in ks if 1 <= k <= edges} | {max(1, round(share * edges)) for share in fractions}
    return np.array(sorted(wanted), dtype=np.int64)
