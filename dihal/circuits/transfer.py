"""Circuits run in their own and in the other model, their intersection and union, random ones, and ablations.

Records for `compare.json`; faithfulness with intervals by resampled prompts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from dihal.circuits.evaluate import Ends, ablate_sets, ends, faithfulness, run_circuits
from dihal.circuits.overlap import Estimate
from dihal.circuits.profile import component_scores
from dihal.circuits.random_circuits import matched_components, random_circuit
from dihal.circuits.subject import Subject
from dihal.circuits.types import Circuit, EdgeScores, Metric, PairBatch
from dihal.errors import UsageError
from dihal.geometry.intervals import resample_documents

__all__ = ["Party", "Running", "ablations", "transfer"]


@dataclass(frozen=True, kw_only=True)
class Party:
    """One model of a comparison: how it is run, and its scores."""

    subject: Subject
    scores: EdgeScores
    pairs: Sequence[PairBatch]
    noise_seeds: tuple[int, ...] = (0,)
    known: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    """Values of the circuits that have been run in it, by what they are, for a model is compared twice."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """Noise seeds that make a difference."""
        return self.noise_seeds if self.subject.adapter.source is not None else self.noise_seeds[:1]


@dataclass(frozen=True, kw_only=True)
class Running:
    """How circuits are run."""

    metric: Metric
    ablation: str = "corrupt"
    batch_size: int = 16
    resamples: int = 1_000
    confidence: float = 0.95
    seed: int = 0

    def estimate(self, values: Float[np.ndarray, " prompts"], both: Ends) -> Estimate:
        """Faithfulness with its percentile interval over resampled prompts."""
        counts = resample_documents(len(values), self.resamples, self.seed).double().numpy()
        drawn = faithfulness(values[None], both, counts)[:, 0]
        return self.interval(float(faithfulness(values[None], both)[0]), drawn)

    def interval(self, value: float, drawn: Float[np.ndarray, " resamples"]) -> Estimate:
        """Percentile interval."""
        drawn = drawn[np.isfinite(drawn)]
        if not len(drawn) or not np.isfinite(value):
            return Estimate(value=None)
        tail = (1.0 - self.confidence) / 2.0
        low, high = np.quantile(drawn, [tail, 1.0 - tail])
        return Estimate(value=value, low=float(low), high=float(high))


def _values(party: Party, circuits: Sequence[Circuit], how: Running, progress: Any) -> tuple[np.ndarray, Ends]:
    """Metric of every prompt in every circuit, and the ends; means over noise seeds."""
    adapter, spec = party.subject.adapter, party.scores.spec
    options: dict[str, Any] = {"ablation": how.ablation, "metric": how.metric, "batch_size": how.batch_size}
    names = [hashlib.sha256(np.packbits(circuit.edges).tobytes()).hexdigest() + how.ablation for circuit in circuits]
    new = {name: replace(one, spec=spec) for name, one in zip(names, circuits) if name not in party.known}
    if progress is not None:
        progress(len(names) - len(new))
    if new:
        runs = [
            run_circuits(adapter, party.pairs, list(new.values()), noise_seed=seed, progress=progress, **options)
            for seed in party.seeds
        ]
        party.known.update(zip(new, np.mean(runs, axis=0), strict=True))
    if "ends" + how.ablation not in party.known:
        both = [ends(adapter, party.pairs, spec, noise_seed=seed, **options) for seed in party.seeds]
        means = [np.mean([getattr(one, name) for one in both], axis=0) for name in ("clean", "empty")]
        party.known["ends" + how.ablation] = np.stack(means)
    clean, empty = party.known["ends" + how.ablation]
    return np.stack([party.known[name] for name in names]), Ends(clean=clean, empty=empty)


def transfer(
    first: Party,
    second: Party,
    fractions: Sequence[float],
    fraction: float,
    how: Running,
    *,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Faithfulness of each model's circuits in both models.

    Args:
        first: the reference.
        second: the other model; same graph, same prompts.
        fractions: budgets of the curves.
        fraction: budget of everything else: intersection, union, random circuits, the verdict.
        how: metric, ablation, intervals.
        progress: called with the number of circuits that have been run on a batch.
    """
    budgets = sorted({*fractions, fraction})
    a, b = ([party.scores.top(fraction=share) for share in budgets] for party in (first, second))
    place = budgets.index(fraction)
    both, either = a[place].edges & b[place].edges, a[place].edges | b[place].edges
    spec = first.scores.spec
    extra = {
        "intersection": Circuit(spec=spec, edges=both, rule="intersection"),
        "union": Circuit(spec=spec, edges=either, rule="union"),
        "random like first": random_circuit(spec, like=a[place], seed=how.seed),
        "random like second": random_circuit(spec, like=replace(b[place], spec=spec), seed=how.seed),
    }
    circuits = [*a, *b, *extra.values()]
    found: dict[str, Any] = {
        "fraction": fraction,
        "sizes": {"own": a[place].size, **{name: circuit.size for name, circuit in extra.items()}},
        "prompts": sum(len(batch) for batch in first.pairs),
        "noise_seeds": {"first": list(first.seeds), "second": list(second.seeds)},
        "budgets": budgets,
    }
    for name, party in (("first", first), ("second", second)):
        values, edge = _values(party, circuits, how, progress)
        estimates = [how.estimate(row, edge).record() for row in values]
        found[f"in_{name}"] = {
            "clean": float(edge.clean.mean()),
            "empty": float(edge.empty.mean()),
            "accuracy": float((edge.clean > 0).mean()),
            "curves": {"first": estimates[: len(a)], "second": estimates[len(a) : 2 * len(a)]},
            "first": estimates[place],
            "second": estimates[len(a) + place],
            **dict(zip(extra, estimates[2 * len(a) :], strict=True)),
        }
    return found


def _top_components(scores: EdgeScores, count: int) -> list[str]:
    sizes = np.abs(component_scores(scores.spec, scores.scores))
    order = [int(i) for i in np.argsort(-sizes, kind="stable") if i > 0]  # not what stands for everything below
    return [scores.spec.writers[i] for i in order[:count]]


def ablations(parties: Sequence[Party], count: int, how: Running) -> dict[str, Any]:
    """Drop of the metric, as a share of clean minus corrupted, when components are ablated.

    Ablated: each model's own top components, the other's, and as many heads and MLPs drawn at random: anywhere, and in
    the early, middle and late third of the blocks. By resampling (the corrupted run's output) and by zero.
    """
    tops = [_top_components(party.scores, count) for party in parties]
    found: dict[str, Any] = {"count": count, "top": tops, "models": []}
    for index, party in enumerate(parties):
        sets: dict[str, list[str] | str] = {"own": tops[index], "other": tops[1 - index]}
        for depth in ("any", "early", "middle", "late"):
            try:
                sets[depth] = matched_components(party.scores.spec, tops[index], seed=how.seed, depth=depth)
            except UsageError as error:  # a shallow model has too few components there: said in the record
                sets[depth] = str(error)
        gap = party.scores.clean - party.scores.corrupted
        made = {name: components for name, components in sets.items() if not isinstance(components, str)}
        drops = [
            ablate_sets(
                party.subject.adapter,
                party.pairs,
                list(made.values()),
                spec=party.scores.spec,
                noise_seed=seed,
                metric=how.metric,
                batch_size=how.batch_size,
            )
            for seed in party.seeds
        ]
        rows: dict[str, Any] = {}
        for name, components in sets.items():
            if isinstance(components, str):
                rows[name] = {"components": None, "reason": components}
                continue
            rows[name] = {"components": components}
            for kind in ("corrupt", "zero"):
                mean = np.mean([one[kind][list(made).index(name)] for one in drops], axis=0)
                rows[name][kind] = _mean_drop(mean / gap, how).record()
        found["models"].append(rows)
    return found


def _mean_drop(drops: Float[np.ndarray, " prompts"], how: Running) -> Estimate:
    counts = resample_documents(len(drops), how.resamples, how.seed).double().numpy()
    return how.interval(float(drops.mean()), counts @ drops / counts.sum(1))
