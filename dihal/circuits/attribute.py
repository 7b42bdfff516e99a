"""Scores of every edge of a graph from a handful of gradients.

EAP-IG (Hanna et al. 2024, "Have Faith in Faithfulness") replaces the gradient of edge attribution patching (Syed
et al. 2023) by its mean along the path from the corrupted to the clean input. Every method here is
a list of points on that path with weights; the score of an edge is (what the writer writes corrupted minus
clean) times the weighted mean of the reader's gradient. Passes do not depend on the number of edges.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from dihal.circuits.adapters import Adapter, KeyValue, open_model
from dihal.circuits.contraction import Contraction
from dihal.circuits.metrics import logit_difference
from dihal.circuits.passes import Plan, Room
from dihal.circuits.patching import logits_residuals
from dihal.circuits.tally import BatchScores, Tally
from dihal.circuits.types import EdgeScores, Metric, PairBatch
from dihal.errors import UsageError, unknown_name

__all__ = ["METHODS", "TOLERANCE", "attribute", "path_points", "score_batch"]

Method = Literal["eap", "eap-ig", "clean-corrupted"]
Rule = Literal["midpoint", "left"]
Path = Literal["inputs", "seam"]
METHODS: tuple[Method, ...] = ("eap", "eap-ig", "clean-corrupted")

TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-9,
    torch.float32: 1e-3,
    torch.bfloat16: 0.1,
    torch.float16: 0.05,
}
"""Largest relative error of the asserted identities by type of the weights: rounding of the model's own runs, not of the scores."""


def path_points(method: str, steps: int, rule: str) -> list[tuple[float, float]]:
    """Points of the path (0: corrupted, 1: clean) and their weights, which sum to 1.

    Raises:
        UsageError: unknown method or rule, or no step.
    """
    if method == "eap":
        return [(1.0, 1.0)]
    if method == "clean-corrupted":
        return [(0.0, 0.5), (1.0, 0.5)]
    if method != "eap-ig":
        raise unknown_name("attribution method", method, METHODS)
    if rule not in ("midpoint", "left"):
        raise unknown_name("rule of the path integral", rule, ("midpoint", "left"))
    if steps < 1:
        raise UsageError(f"{steps} steps along the path; at least 1 is needed.")
    shift = 0.5 if rule == "midpoint" else 0.0
    return [((step + shift) / steps, 1.0 / steps) for step in range(steps)]


def attribute(
    model: Any,
    pairs: Sequence[PairBatch],
    *,
    method: Method = "eap-ig",
    steps: int = 5,
    rule: Rule = "midpoint",
    path: Path = "inputs",
    kv: KeyValue = "grouped",
    seam: int | None = None,
    noise_seed: int = 0,
    metric: Metric = logit_difference,
    contraction: Contraction = "factored",
    batch_size: int = 16,
    chunk_bytes: int = 1 << 30,
    parts: int = 8,
    graphs: bool = True,
    room: Room | None = None,
    progress: Callable[[int], None] | None = None,
) -> EdgeScores:
    """Score every edge of a model on pairs of prompts.

    Args:
        model: anything `open_model` takes.
        pairs: batches of pairs, each of one length.
        method: ``eap`` (gradient at the clean run), ``eap-ig``, ``clean-corrupted`` (mean of the gradients at both ends).
        steps: points of the path for ``eap-ig``.
        rule: where they lie: in the middle of each interval, or at its corrupted end (as in Hanna's code).
        path: what is interpolated: the embeddings, or the state at the seam.
        kv: one key and value reader per key-value head, or per query head.
        seam: everything below it is one writer; None: the lowest seam of the model.
        noise_seed: key of a hybrid's noise, together with the sample id: the same for both runs of a pair.
        metric: of a run; larger is better.
        contraction: factored, or the generic form it is checked against (memory grows with readers).
        batch_size: pairs at once at most; memory, not results.
        chunk_bytes: writers held at once at most; memory, not results.
        parts: number of groups of prompts whose mean scores are kept; 0: none.
        graphs: on CUDA, batches of a shape that has come before are replayed as CUDA graphs where that is possible.
        room: of the same adapter: graphs of earlier calls serve this one; None: each call makes its own.
        progress: called with the number of pairs done after every batch.

    Raises:
        UsageError: no pairs, an unknown option, a seam or path that this model does not have.
        RuntimeError: an identity that scores and runs must satisfy does not hold: the model is not the graph.
    """
    adapter = open_model(model)
    if not pairs:
        raise UsageError("no pairs of prompts to attribute on. Ask the task for more.")
    if path not in ("inputs", "seam"):
        raise unknown_name("path", path, ("inputs", "seam"))
    if path == "inputs" and adapter.source is not None:
        raise UsageError(
            f"{adapter.name} draws its state at layer {adapter.seam} by a sampler, which no gradient passes. Use path=seam."
        )
    seam = adapter.seam if seam is None else seam
    adapter.require_seam(seam)
    spec = adapter.spec(kv=kv, seam=seam if path == "seam" else adapter.seam)
    points = path_points(method, steps, rule)
    tally = Tally(spec, parts, adapter.device)
    room = Room(adapter, graphs=graphs) if room is None else room
    if room.adapter is not adapter:
        raise UsageError("this room is another model's. Make one for this adapter: Room(adapter).")
    room.open()
    room.memory.begin()
    started = time.perf_counter()
    with adapter.session(), adapter.readers(kv):
        plan = Plan(
            adapter=adapter,
            spec=spec,
            readers=room.readers(spec),
            points=points,
            metric=metric,
            contraction=contraction,
            noise_seed=noise_seed,
            chunk_bytes=chunk_bytes,
        )
        tally.residuals |= room.aside(lambda: _check(plan, pairs[0]))
        batches = [whole.rows(at, at + batch_size) for whole in pairs for at in range(0, len(whole), batch_size)]
        room.reserve(plan, batches)
        for one in batches:
            batch = one.to(adapter.device)
            found = score_batch(plan, room, batch)
            _require("reader_sums", found.sums, adapter)
            tally.add(found, batch.ids)
            room.memory.note()
            if progress is not None:
                progress(len(batch))
    scores = tally.scores()
    scores.seconds = time.perf_counter() - started
    scores.peak_bytes = room.memory.peak
    scores.method, scores.path = method, path
    scores.steps, scores.rule = (steps, rule) if method == "eap-ig" else (len(points), "")
    scores.details = {
        "model": adapter.name,
        "dtype": str(adapter.dtype).removeprefix("torch."),
        "noise_seed": noise_seed,
    }
    return scores if scores.spec.seam == seam else scores.contract(seam)


def _require(name: str, residual: float, adapter: Adapter) -> None:
    # `not <=`: a NaN must not pass.
    if not residual <= TOLERANCE[adapter.dtype]:
        raise RuntimeError(
            f"the identity {name!r} fails on {adapter.name} with a relative error of {residual:.2e} "
            f"(allowed: {TOLERANCE[adapter.dtype]:.0e}): this model does not compute what its graph says, or overflows."
        )


def _check(plan: Plan, batch: PairBatch) -> dict[str, float]:
    """Full circuit = clean run and empty circuit = corrupted run, on the first prompts."""
    batch = batch.rows(0, 2).to(plan.adapter.device)
    residuals = logits_residuals(plan.adapter, plan.spec, batch, noise_seed=plan.noise_seed)
    for name, residual in residuals.items():
        _require(name, residual, plan.adapter)
    return residuals


def score_batch(plan: Plan, room: Room, batch: PairBatch) -> BatchScores:
    """Scores of one batch on the model's device. Passes: one forward per end, and one forward and backward per point.

    A point that is an end of the path shares that end's forward.
    """
    adapter, spec, keys = plan.adapter, plan.spec, {"sample_ids": batch.ids, "noise_seed": plan.noise_seed}
    ends = room.aside(
        lambda: {
            0.0: adapter.states(batch.corrupted, spec.seam, attention=batch.attention, role="corrupted", **keys),
            1.0: adapter.states(batch.clean, spec.seam, attention=batch.attention, role="clean", **keys),
        }
    )
    weights = dict(plan.points)
    passes, call = room.passes(plan, batch)
    passes.enter(batch, ends)
    metrics: dict[float, tuple[Tensor, Tensor]] = {}
    points = [0.0, 1.0, *(point for point in weights if point not in ends)]
    for point in points:
        # Rounded once: with both ends equal, every point of the path is that end.
        state = ends[point] if point in ends else torch.lerp(ends[0.0], ends[1.0], point)
        metrics[point] = passes.run(state, point if point in ends else None, weights.get(point), call)
    scores, totals = passes.contract(call)
    return BatchScores(
        scores=scores,
        clean=metrics[1.0][0],
        corrupted=metrics[0.0][0],
        solved=metrics[1.0][1],
        passes={"forward": len(points), "backward": len(weights)},
        sums=_sum_error(scores, totals),
    )


def _sum_error(scores: Tensor, totals: Tensor) -> float:
    # Relative to the largest reader of all: readers that nothing reaches have sums of rounding errors only.
    scale = scores.abs().sum(1).max()
    error = (scores.sum(1) - totals).abs().max()
    # One number for the host to wait for; a NaN stays one.
    return float(torch.where(scale == 0.0, 0.0, error / scale))
