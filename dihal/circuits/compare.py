"""Two score tables of one task: what they have in common, against nulls and ceilings. Pure functions of scores.

What running the circuits gives (faithfulness, transfer, ablations) is passed in by the caller as records; the verdict
needs it and is not given without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dihal.circuits.graph import align
from dihal.circuits.neurons import participation_ratio
from dihal.circuits.nulls import blocks_of, halves, permutation_null, stability
from dihal.circuits.overlap import (
    Estimate,
    budgets,
    chance_jaccard,
    corrected,
    edge_values,
    jaccard,
    jaccards,
    part_weights,
    require_parts,
    resampled_edges,
    spearman,
    top_edges,
    weighted_jaccard,
)
from dihal.circuits.profile import (
    DepthProfile,
    component_scores,
    depth_profile,
    mean_differences,
    top_overlap,
    wasserstein,
)
from dihal.circuits.types import EdgeScores
from dihal.circuits.verdict import Verdict
from dihal.config.circuits import OverlapConfig
from dihal.errors import UsageError

__all__ = ["COMPARE_SCHEMA", "Comparison", "compare_scores", "require_comparable"]

COMPARE_SCHEMA = "dihal.circuits-compare/1"
"""Format of compare.json."""


@dataclass(kw_only=True)
class Comparison:
    """Everything that is said about two models on one task; what compare.json holds."""

    edges: int
    overlap: list[dict[str, Any]]
    """Per K: J with interval, chance, layer-preserving nulls, ceiling, corrected J."""
    whole: dict[str, Any]
    """Weighted Jaccard and Spearman over all edges, with their split-half ceilings; how concentrated scores are."""
    components: dict[str, Any]
    depth: dict[str, Any]
    function: dict[str, Any] = field(default_factory=dict)
    """What running circuits gave: curves, transfer, ablations."""
    lens: dict[str, Any] = field(default_factory=dict)
    neurons: dict[str, Any] = field(default_factory=dict)
    verdict: Verdict | None = None
    details: dict[str, Any] = field(default_factory=dict)
    """Models, task, options, provenance."""

    def record(self) -> dict[str, Any]:
        """Plain JSON data."""
        fields = ("edges", "overlap", "whole", "components", "depth", "function", "lens", "neurons")
        verdict = None if self.verdict is None else self.verdict.record()
        return {
            "schema": COMPARE_SCHEMA,
            "verdict": verdict,
            **{name: getattr(self, name) for name in fields},
            **self.details,
        }

    def at(self, k: int) -> dict[str, Any]:
        """The overlap row of that K."""
        return next(row for row in self.overlap if row["k"] == k)


def require_comparable(first: EdgeScores, second: EdgeScores) -> None:
    """Refuse scores that do not speak of the same edges, task, metric and prompts.

    Raises:
        UsageError: graphs of different structure, or runs that differ in what is measured.
    """
    align(first.spec, second.spec)
    one, other = (s.details.get("comparable", {}) for s in (first, second))
    different = [
        f"{name} ({one[name]!r} and {other[name]!r})" for name in one if name in other and one[name] != other[name]
    ]
    if different:
        raise UsageError(f"these runs differ in {', '.join(different)}: run both with the same task and options.")
    if first.part_counts and second.part_counts and len(first.part_counts) != len(second.part_counts):
        raise UsageError("these runs were kept in different numbers of parts: run both with the same `parts`.")


def _resampled(
    first: EdgeScores,
    second: EdgeScores,
    config: OverlapConfig,
    measure: Callable[[np.ndarray, np.ndarray], Any],
) -> list[Any]:
    """A statistic of both models' edges in every resample; both see the same prompts."""
    require_parts(first), require_parts(second)
    # Where the runs kept different prompts the weights differ in size, not in which parts are drawn.
    pairs = zip(
        part_weights(first.part_counts, config.resamples, config.seed),
        part_weights(second.part_counts, config.resamples, config.seed),
        strict=True,
    )
    return [measure(resampled_edges(first, a), resampled_edges(second, b)) for a, b in pairs]


def _overlap(first: EdgeScores, second: EdgeScores, config: OverlapConfig) -> list[dict[str, Any]]:
    total = first.spec.n_edges
    ks = budgets(total, config.ks, config.fractions)
    a, b = (edge_values(s.spec, s.scores) for s in (first, second))
    split = halves(first, second, ks)
    again = np.array(_resampled(first, second, config, lambda x, y: jaccards(x, y, ks)))
    same = [stability(s, ks, config.resamples, config.seed) for s in (first, second)]
    rows = []
    for place, (k, half) in enumerate(zip(ks.tolist(), split, strict=True)):
        one, other = top_edges(a, k), top_edges(b, k)
        value, chance = jaccard(one, other), chance_jaccard(k, total)
        nulls = {}
        for null in ("layer", "kind"):
            draws = permutation_null(one, other, blocks_of(first.spec, null), config.null_resamples, config.seed)
            nulls[null] = {"mean": float(draws.mean()), "high": float(np.quantile(draws, config.confidence))}
        rows.append(
            {
                "k": k,
                "fraction": k / total,
                "jaccard": Estimate.of(value, again[:, place], config.confidence).record(),
                "shared": int((one & other).sum()),
                "chance": chance,
                "null": nulls,
                "above_chance": corrected(value, chance),
                "halves": {"first": half.first, "second": half.second, "across": half.across},
                "ceiling": half.ceiling,
                # Across halves, because the ceiling is between halves: equal noise, no prompt in common.
                "corrected": corrected(half.across, chance, half.ceiling),
                "stability": [float(values[:, place].mean()) for values in same],
            }
        )
    return rows


def _whole(first: EdgeScores, second: EdgeScores, config: OverlapConfig) -> dict[str, Any]:
    a, b = (edge_values(s.spec, s.scores) for s in (first, second))
    halves_a, halves_b = ([edge_values(s.spec, half) for half in s.halves] for s in (first, second))
    found = {}
    for name, measure in (("weighted_jaccard", weighted_jaccard), ("spearman", spearman)):
        again = np.array(_resampled(first, second, config, measure))
        within = measure(*halves_a), measure(*halves_b)
        across = np.mean([measure(halves_a[0], halves_b[1]), measure(halves_a[1], halves_b[0])])
        found[name] = {
            **Estimate.of(measure(a, b), again, config.confidence).record(),
            "halves": {"first": within[0], "second": within[1], "across": float(across)},
            "ceiling": float(np.sqrt(max(0.0, within[0]) * max(0.0, within[1]))),
        }
    return found


def _concentration(first: EdgeScores, second: EdgeScores, config: OverlapConfig) -> dict[str, Any]:
    """How many edges and components carry the scores (participation ratio), and the base-2 logarithm of second over first."""
    found = {}
    tables: dict[str, Callable[[EdgeScores, np.ndarray], np.ndarray]] = {
        "edges": lambda scores, table: edge_values(scores.spec, table),
        "components": lambda scores, table: component_scores(scores.spec, table),
    }
    for name, values in tables.items():
        models, again = [], []
        for scores in (first, second):
            parts = require_parts(scores).astype(np.float64)
            weights = part_weights(scores.part_counts, config.resamples, config.seed)
            models.append(participation_ratio(values(scores, scores.scores)))
            again.append(
                np.array([participation_ratio(values(scores, np.tensordot(row, parts, 1))) for row in weights])
            )
        change = Estimate.of(float(np.log2(models[1] / models[0])), np.log2(again[1] / again[0]), config.confidence)
        each = [Estimate.of(value, many, config.confidence).record() for value, many in zip(models, again)]
        found[name] = {"first": each[0], "second": each[1], "change": change.record()}
    return found


def _components(first: EdgeScores, second: EdgeScores, config: OverlapConfig) -> dict[str, Any]:
    found: dict[str, Any] = {"names": first.spec.writers}
    for kind in ("top", "all"):
        tables = []
        for scores in (first, second):
            edges = scores.top(min(config.k, scores.spec.n_edges)).edges if kind == "top" else None
            tables.append(component_scores(scores.spec, scores.scores, edges))
        found[kind] = {
            "first": tables[0].tolist(),
            "second": tables[1].tolist(),
            "overlap": {str(k): top_overlap(*tables, k) for k in config.components},
            "spearman": spearman(*tables),
        }
    return found


def _profiles(scores: EdgeScores, table: np.ndarray) -> list[DepthProfile]:
    return [depth_profile(scores.spec, table, side) for side in ("writer", "reader")]


def _depth(first: EdgeScores, second: EdgeScores, config: OverlapConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    weights = [part_weights(s.part_counts, config.resamples, config.seed) for s in (first, second)]
    parts = [require_parts(s).astype(np.float64) for s in (first, second)]
    again = [
        [_profiles(s, np.tensordot(w, part, 1)) for w in ws] for s, ws, part in zip((first, second), weights, parts)
    ]
    for side in (0, 1):
        one, other = (_profiles(s, s.scores)[side] for s in (first, second))
        resampled = [[profiles[side] for profiles in model] for model in again]
        noise = [wasserstein(*(_profiles(s, half)[side] for half in s.halves)) for s in (first, second)]
        changes = [mean_differences(a, b) for a, b in zip(*resampled, strict=True)]
        found[one.side] = {
            "layers": list(one.layers),
            "models": [
                _profile_record(profile, many, config) for profile, many in zip((one, other), resampled, strict=True)
            ],
            "wasserstein": wasserstein(one, other),
            "wasserstein_halves": noise,
            "change": {
                name: Estimate.of(value, np.array([change[name] for change in changes]), config.confidence).record()
                for name, value in mean_differences(one, other).items()
            },
        }
    return found


def _profile_record(profile: DepthProfile, resampled: list[DepthProfile], config: OverlapConfig) -> dict[str, Any]:
    shares = np.stack([one.shares for one in resampled])
    bands = [Estimate.of(value, shares[:, i], config.confidence) for i, value in enumerate(profile.shares)]
    return {
        "shares": profile.shares.tolist(),
        "low": [band.lower for band in bands],
        "high": [band.upper for band in bands],
        **{
            name: Estimate.of(
                getattr(profile, name), np.array([getattr(one, name) for one in resampled]), config.confidence
            ).record()
            for name in ("early", "center", "lower")
        },
    }


def compare_scores(first: EdgeScores, second: EdgeScores, config: OverlapConfig) -> Comparison:
    """Everything about two models that their scores alone can tell; no verdict.

    Args:
        first: the reference.
        second: the other model, of the same block structure, on the same prompts.
        config: budgets, resamples, nulls.

    Raises:
        UsageError: different structures or tasks, scores without parts, or all zero.
    """
    require_comparable(first, second)
    return Comparison(
        edges=first.spec.n_edges,
        overlap=_overlap(first, second, config),
        whole={**_whole(first, second, config), "concentration": _concentration(first, second, config)},
        components=_components(first, second, config),
        depth=_depth(first, second, config),
    )
