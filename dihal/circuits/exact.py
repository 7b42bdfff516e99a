"""Effect of single edges by running the model: what attribution estimates."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dihal.circuits.adapters import KeyValue, open_model
from dihal.circuits.evaluate import ends, run_circuits
from dihal.circuits.metrics import logit_difference
from dihal.circuits.types import Circuit, EdgeScores, Metric, PairBatch

__all__ = ["exact_scores"]


def exact_scores(
    model: Any,
    pairs: Sequence[PairBatch],
    edges: Circuit | None = None,
    *,
    kv: KeyValue = "grouped",
    noise_seed: int = 0,
    metric: Metric = logit_difference,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> EdgeScores:
    """Change of the metric when one edge alone carries the corrupted value: one run per edge and batch.

    Args:
        edges: which; None: all of them (small graphs). Other edges score 0.
        kv: readers of the graph, if ``edges`` does not say.
        progress: called with 1 after every run.
    """
    adapter = open_model(model)
    spec = adapter.spec(kv=kv) if edges is None else edges.spec
    chosen = np.argwhere(spec.edge_mask if edges is None else edges.edges)
    circuits = []
    started = time.perf_counter()
    for writer, reader in chosen:
        kept = spec.edge_mask.copy()
        kept[writer, reader] = False
        circuits.append(Circuit(spec=spec, edges=kept, rule="all but one"))
    options: dict[str, Any] = {"noise_seed": noise_seed, "metric": metric, "batch_size": batch_size}
    both = ends(adapter, pairs, spec, **options)
    values = run_circuits(adapter, pairs, circuits, progress=progress, **options) - both.clean
    scores, squares = np.zeros(spec.edge_mask.shape), np.zeros(spec.edge_mask.shape)
    scores[tuple(chosen.T)] = values.mean(1)
    squares[tuple(chosen.T)] = np.square(values).mean(1)
    return EdgeScores(
        spec=spec,
        scores=scores,
        n=values.shape[1],
        squares=squares,
        clean=float(both.clean.mean()),
        corrupted=float(both.empty.mean()),
        accuracy=float((both.clean > 0).mean()),
        method="exact",
        passes={"forward": len(circuits) * len(pairs)},
        seconds=time.perf_counter() - started,
        details={"model": adapter.name, "noise_seed": noise_seed},
    )
