"""What circuits do when they are run: metric per prompt, faithfulness over budgets, ablations.

Faithfulness of a circuit is f = (m_circuit - m_empty) / (m_clean - m_empty), m the mean metric over
prompts. CPR is the area under f over the share of edges, CMD that of |1 - f|, both by the trapezoid rule between
the smallest and the largest budget (Mueller et al. 2025, "MIB").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.integrate import trapezoid
from torch import Tensor

from dihal.circuits.adapters import Adapter, open_model
from dihal.circuits.graph import GraphSpec, align
from dihal.circuits.metrics import logit_difference
from dihal.circuits.patching import Ablation, CircuitRun, Replacement, Runner, component_hooks
from dihal.circuits.types import Circuit, EdgeScores, Metric, PairBatch, Rank
from dihal.errors import UsageError, unknown_name
from dihal.geometry.intervals import percentile_interval, resample_documents

__all__ = [
    "FRACTIONS",
    "Curve",
    "Ends",
    "ablate",
    "ablate_edges",
    "ablate_sets",
    "curve",
    "curve_of",
    "ends",
    "faithfulness",
    "run_circuit",
    "run_circuits",
]

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of all edges at which a curve is taken: MIB's."""

_AT_ONCE = {True: 1 << 33, False: 1 << 29}
"""Bytes of writers' changes that circuits run at once may have, on CUDA and elsewhere; memory, not results."""

_Values = Float[np.ndarray, " prompts"]


@dataclass(frozen=True, kw_only=True)
class Ends:
    """Metric of every prompt in the clean run and in the empty circuit."""

    clean: _Values
    empty: _Values


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Faithfulness over edge budgets, with percentile intervals over resampled prompts."""

    fractions: tuple[float, ...]
    sizes: tuple[int, ...]
    """Edges of each circuit."""
    by: str
    ablation: str
    values: Float[np.ndarray, "budgets prompts"]
    """Metric of every prompt in every circuit."""
    ends: Ends
    faithfulness: Float[np.ndarray, " budgets"]
    intervals: Float[np.ndarray, "2 budgets"]
    cpr: float
    cpr_interval: tuple[float, float]
    cmd: float
    cmd_interval: tuple[float, float]
    confidence: float

    def record(self) -> dict[str, Any]:
        """The curve without values per prompt, for a JSON file."""
        return {
            "fractions": list(self.fractions),
            "sizes": list(self.sizes),
            "by": self.by,
            "ablation": self.ablation,
            "clean": float(self.ends.clean.mean()),
            "empty": float(self.ends.empty.mean()),
            "prompts": len(self.ends.clean),
            "faithfulness": self.faithfulness.tolist(),
            "intervals": self.intervals.tolist(),
            "cpr": self.cpr,
            "cpr_interval": list(self.cpr_interval),
            "cmd": self.cmd,
            "cmd_interval": list(self.cmd_interval),
            "confidence": self.confidence,
        }


def faithfulness(
    values: Float[np.ndarray, "*n prompts"], ends: Ends, counts: Float[np.ndarray, "resamples prompts"] | None = None
) -> Float[np.ndarray, "..."]:
    """(m_circuit - m_empty) / (m_clean - m_empty) of mean metrics; per resample (a first axis) if counts are given."""
    weights = np.ones((1, len(ends.clean))) if counts is None else counts
    top = weights @ (values - ends.empty).T
    bottom = weights @ (ends.clean - ends.empty)
    out = np.divide(top.T, bottom, out=np.full(top.T.shape, np.nan), where=bottom != 0)
    return np.moveaxis(out, -1, 0) if counts is not None else out[..., 0]


def _mean_replacement(runner: Runner, pairs: Sequence[PairBatch], batch_size: int) -> Replacement:
    """Mean over prompts and positions of what components write in clean runs, with axes (1, 1, channels)."""
    total: Replacement | None = None
    count = 0
    for batch in _split(pairs, batch_size, runner.adapter):
        found, _ = runner.written(runner.state(batch, "clean"), batch)
        count += batch.clean.numel()
        total = _map(_sum_positions, found) if total is None else _map(lambda a, b: a + _sum_positions(b), total, found)
    assert total is not None
    return _map(lambda value: value / count, total)


def _sum_positions(value: Tensor) -> Tensor:
    return value.sum((0, 1), keepdim=True)


def _map(change: Callable[..., Tensor], *items: Replacement) -> Replacement:
    first = items[0]
    return Replacement(
        change(*(item.state for item in items)),
        {layer: change(*(item.heads[layer] for item in items)) for layer in first.heads},
        {layer: change(*(item.mlps[layer] for item in items)) for layer in first.mlps},
    )


def _split(pairs: Sequence[PairBatch], batch_size: int, adapter: Adapter) -> Iterator[PairBatch]:
    for whole in pairs:
        for first in range(0, len(whole), batch_size):
            yield whole.rows(first, first + batch_size).to(adapter.device)


def _replacer(
    runner: Runner, pairs: Sequence[PairBatch], ablation: str, batch_size: int
) -> Callable[[PairBatch], Replacement]:
    """What stands for missing edges in a batch."""
    if ablation == "corrupt":
        return lambda batch: runner.written(runner.state(batch, "corrupted"), batch)[0]
    if ablation not in ("mean", "zero"):
        raise unknown_name("ablation", ablation, ("corrupt", "mean", "zero"))
    one = _mean_replacement(runner, pairs if ablation == "mean" else [pairs[0].rows(0, 1)], batch_size)
    if ablation == "zero":
        one = _map(torch.zeros_like, one)
    return lambda batch: one.expand(batch.clean)


def _prepare(model: Any, spec: GraphSpec, pairs: Sequence[PairBatch], noise_seed: int) -> Runner:
    adapter = open_model(model)
    if not pairs:
        raise UsageError("no pairs of prompts to run. Ask the task for more.")
    own = adapter.spec(kv=spec.kv, seam=spec.seam)
    align(own, spec)
    return Runner(adapter, own, noise_seed)


def _groups(circuits: Sequence[Circuit], runner: Runner, state: Tensor) -> Iterator[Sequence[Circuit]]:
    """Circuits that are run at once: as many as their writers' changes have room for."""
    at_once = _AT_ONCE[state.device.type == "cuda"]
    one = state.numel() * runner.spec.n_writers * runner.adapter.work_dtype.itemsize
    count = max(1, at_once // one)
    for start in range(0, len(circuits), count):
        yield circuits[start : start + count]


def run_circuits(
    model: Any,
    pairs: Sequence[PairBatch],
    circuits: Sequence[Circuit],
    *,
    ablation: Ablation = "corrupt",
    noise_seed: int = 0,
    metric: Metric = logit_difference,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> Float[np.ndarray, "circuits prompts"]:
    """Metric of every prompt in every circuit; prompts in the order of the pairs. One graph for all circuits.

    A circuit found in another model may be run, if its graph is the same.

    Args:
        progress: called with the number of circuits that have been run on a batch.

    Raises:
        UsageError: no pairs or circuits, or a circuit of a different graph.
    """
    if not circuits:
        raise UsageError("no circuit to run.")
    runner = _prepare(model, circuits[0].spec, pairs, noise_seed)
    for circuit in circuits:
        align(runner.spec, circuit.spec)
    columns: list[Tensor] = []
    with runner.adapter.session(), runner.adapter.readers(runner.spec.kv):
        replacer = _replacer(runner, pairs, ablation, batch_size)
        for batch in _split(pairs, batch_size, runner.adapter):
            state, replacement = runner.state(batch, "clean"), replacer(batch)
            rows = []
            for group in _groups(circuits, runner, state):
                edges, several = np.stack([circuit.edges for circuit in group]), batch.repeated(len(group))
                with CircuitRun(runner, edges, replacement, state):
                    values = metric(runner.logits(state.repeat(len(group), 1, 1), several), several)
                rows.append(values.view(len(group), -1))
                if progress is not None:
                    progress(len(group))
            columns.append(torch.cat(rows))
    return torch.cat(columns, 1).double().cpu().numpy()


def run_circuit(model: Any, pairs: Sequence[PairBatch], circuit: Circuit, **options: Any) -> _Values:
    """`run_circuits` of one circuit."""
    return run_circuits(model, pairs, [circuit], **options)[0]


def ends(
    model: Any,
    pairs: Sequence[PairBatch],
    spec: GraphSpec,
    *,
    ablation: Ablation = "corrupt",
    noise_seed: int = 0,
    metric: Metric = logit_difference,
    batch_size: int = 16,
) -> Ends:
    """Metric of every prompt in the clean run and in the empty circuit (with `corrupt`: the corrupted run)."""
    runner = _prepare(model, spec, pairs, noise_seed)
    adapter = runner.adapter
    clean, empty = [], []
    with adapter.session():
        for batch in _split(pairs, batch_size, adapter):
            clean.append(metric(runner.logits(runner.state(batch, "clean"), batch), batch))
            if ablation == "corrupt":
                empty.append(metric(runner.logits(runner.state(batch, "corrupted"), batch), batch))
    values = torch.cat(clean).double().cpu().numpy()
    if ablation == "corrupt":
        return Ends(clean=values, empty=torch.cat(empty).double().cpu().numpy())
    options: dict[str, Any] = {"noise_seed": noise_seed, "metric": metric, "batch_size": batch_size}
    return Ends(clean=values, empty=run_circuit(adapter, pairs, Circuit.empty(spec), ablation=ablation, **options))


def curve(
    model: Any,
    scores: EdgeScores,
    pairs: Sequence[PairBatch],
    fractions: Sequence[float] = FRACTIONS,
    *,
    by: Rank = "magnitude",
    connected: bool = False,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    **options: Any,
) -> Curve:
    """Faithfulness of the highest-ranked edges at every budget. Scores of another model give the transfer of its circuits.

    Args:
        model: where the circuits run.
        scores: which edges enter first; of this or another model with the same graph.
        pairs: prompts, best others than those of the attribution.
        fractions: shares of all edges, ascending.
        by: magnitude or signed value.
        connected: prune dead ends.
        resamples, confidence, seed: of the intervals.
        options: of `run_circuits`.

    Raises:
        UsageError: as `run_circuits`, or budgets that do not ascend.
    """
    circuits = [scores.top(fraction=fraction, by=by, connected=connected) for fraction in fractions]
    return curve_of(
        model, circuits, pairs, fractions, by=by, resamples=resamples, confidence=confidence, seed=seed, **options
    )


def curve_of(
    model: Any,
    circuits: Sequence[Circuit],
    pairs: Sequence[PairBatch],
    fractions: Sequence[float],
    *,
    by: str = "given",
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    **options: Any,
) -> Curve:
    """`curve` of given circuits, one per budget: random ones, intersections, unions.

    With several draws of random circuits (all budgets of the first, then of the next) a prompt's metric is the mean over
    them: single random circuits are outliers now and then.
    """
    if list(fractions) != sorted(set(fractions)) or not circuits or len(circuits) % len(fractions):
        raise UsageError("a curve needs ascending budgets, and a circuit for each.")
    if len(fractions) < 2:
        raise UsageError("a curve needs at least two budgets.")
    plain = {key: value for key, value in options.items() if key != "progress"}
    lines = ends(model, pairs, circuits[0].spec, **plain)
    merge = _merger(pairs)
    values = run_circuits(model, pairs, circuits, **options) @ merge
    values = values.reshape(-1, len(fractions), values.shape[1]).mean(0)
    both = Ends(clean=lines.clean @ merge, empty=lines.empty @ merge)
    counts = resample_documents(values.shape[1], resamples, seed).double().numpy()
    found = faithfulness(values, both)
    drawn = faithfulness(values, both, counts)

    def area(heights: np.ndarray) -> np.ndarray:
        return np.asarray(trapezoid(heights, np.asarray(fractions), axis=-1))

    def interval(samples: np.ndarray) -> Any:
        return percentile_interval(torch.from_numpy(samples), confidence).numpy()

    return Curve(
        fractions=tuple(fractions),
        sizes=tuple(circuit.size for circuit in circuits[: len(fractions)]),
        by=by,
        ablation=options.get("ablation", "corrupt"),
        values=values,
        ends=both,
        faithfulness=found,
        intervals=interval(drawn),
        cpr=float(area(found)),
        cpr_interval=tuple(interval(area(drawn)).tolist()),
        cmd=float(area(abs(1 - found))),
        cmd_interval=tuple(interval(area(abs(1 - drawn))).tolist()),
        confidence=confidence,
    )


def _merger(pairs: Sequence[PairBatch]) -> Float[np.ndarray, "lines prompts"]:
    """Matrix that averages lines of one prompt (states at several denoising steps, of one sample id): prompts are resampled whole."""
    ids = np.concatenate([batch.ids.cpu().numpy() for batch in pairs])
    _, prompt, counts = np.unique(ids, return_inverse=True, return_counts=True)
    out = np.zeros((len(ids), len(counts)))
    out[np.arange(len(ids)), prompt] = 1.0 / counts[prompt]
    return out


def ablate(
    model: Any, pairs: Sequence[PairBatch], components: Sequence[str], *, kind: Ablation = "corrupt", **options: Any
) -> _Values:
    """`ablate_sets` of one set in one way."""
    return ablate_sets(model, pairs, [components], kinds=[kind], **options)[kind][0]


def ablate_sets(
    model: Any,
    pairs: Sequence[PairBatch],
    sets: Sequence[Sequence[str]],
    *,
    spec: GraphSpec | None = None,
    kinds: Sequence[Ablation] = ("corrupt", "zero"),
    noise_seed: int = 0,
    metric: Metric = logit_difference,
    batch_size: int = 16,
) -> dict[Ablation, Float[np.ndarray, "sets prompts"]]:
    """Drop of each prompt's metric (clean minus ablated) when the named heads and MLPs write a replacement everywhere.

    Args:
        sets: each of names like ``a3.h5``, ``m7``; the clean and the corrupted run serve them all.
        spec: the graph they belong to; None: the whole model's.
        kinds: the replacements (``corrupt``: resample ablation).

    Raises:
        UsageError: no pairs, a component that is not in the graph, or the lower writer.
    """
    adapter = open_model(model)
    runner = _prepare(adapter, adapter.spec() if spec is None else spec, pairs, noise_seed)
    writers = [[runner.spec.writer_index(name) for name in components] for components in sets]
    if any(0 in chosen for chosen in writers):
        raise UsageError(f"{runner.spec.lower!r} is what the run starts from; ablate heads and MLPs.")
    drops: dict[Ablation, list[Tensor]] = {kind: [] for kind in kinds}
    with adapter.session():
        replacers = {kind: _replacer(runner, pairs, kind, batch_size) for kind in kinds}
        for batch in _split(pairs, batch_size, adapter):
            state = runner.state(batch, "clean")
            clean = metric(runner.logits(state, batch), batch)
            for kind, replacer in replacers.items():
                replacement, found = replacer(batch), []
                for chosen in writers:
                    with component_hooks(runner, chosen, replacement):
                        found.append(clean - metric(runner.logits(state, batch), batch))
                drops[kind].append(torch.stack(found))
    return {kind: torch.cat(columns, 1).double().cpu().numpy() for kind, columns in drops.items()}


def ablate_edges(model: Any, pairs: Sequence[PairBatch], edges: Circuit, **options: Any) -> _Values:
    """Drop of each prompt's metric when the given edges carry the replacement; options as for `run_circuits`."""
    spec = edges.spec
    without = Circuit(spec=spec, edges=spec.edge_mask & ~edges.edges, rule="complement")
    full, found = run_circuits(model, pairs, [Circuit.full(spec), without], **options)
    return full - found
