"""One pass over the evaluation windows for all rows: the backbone runs once per batch, each row's suffix once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dihal.evaluation import metrics
from dihal.evaluation.definitions import SUMS
from dihal.evaluation.rows import Row
from dihal.methods import positions_of

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.data.packing import EvaluationWindows

__all__ = ["Measured", "Survey", "measure", "survey_splits"]

_PARITY_POSITIONS = 256


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What must be known of a split before its states are compared."""

    threshold: float
    """Norm above which a token is a sink."""
    shift: Float[Tensor, " dim"]
    """A point near the mean state."""


@dataclass(kw_only=True)
class Measured:
    """Sums per document of one row at one number of steps, and the seconds its own passes took."""

    sums: dict[str, Float[np.ndarray, " documents"]]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class _Batch:
    ids: Tensor
    keywords: dict[str, Any]
    sample_ids: Tensor
    real: Tensor
    """Flat indices of real tokens."""
    real_documents: Tensor
    """Their documents, as indices into ``windows.documents``."""
    first: Tensor
    """Which of them stand at position 0."""
    counted: Tensor
    """Flat indices of the positions whose prediction counts."""
    documents: Tensor
    targets: Tensor


def _batches(backbone: Backbone, windows: EvaluationWindows, batch_size: int):
    order = {document.index: place for place, document in enumerate(windows.documents)}
    place_of = torch.full((max(order) + 1,), -1, dtype=torch.int64)
    for index, place in order.items():
        place_of[index] = place
    for item in windows.batches(batch_size):
        # All windows real: no mask, which keeps the fast attention path.
        padded = not item.full
        positions = positions_of(item.attention_mask)
        real = item.attention_mask.flatten().nonzero().squeeze(-1)
        counted = item.loss_mask.flatten().nonzero().squeeze(-1)
        documents = place_of[item.document_ids.clamp_min(0)].flatten()
        device = backbone.device
        yield _Batch(
            ids=item.input_ids.to(device),
            keywords={
                "attention_mask": item.attention_mask.to(device) if padded else None,
                "position_ids": positions.to(device),
            },
            sample_ids=item.sample_ids.to(device),
            real=real.to(device),
            real_documents=documents[real].to(device),
            first=(positions.flatten()[real] == 0).to(device),
            counted=counted.to(device),
            documents=documents[counted].to(device),
            targets=item.input_ids.roll(-1, dims=1).flatten()[counted].to(device),
        )


@torch.no_grad()
def survey_splits(
    backbone: Backbone, windows: EvaluationWindows, splits: list[int], *, batch_size: int
) -> dict[int, Survey]:
    """Run the prefix over the windows once to find each split's norm threshold and the neighbourhood of its mean.

    Raises:
        UsageError: states that are not finite.
    """
    norms: dict[int, list[Tensor]] = {split: [] for split in splits}
    shifts: dict[int, Tensor] = {}
    for batch in _batches(backbone, windows, batch_size) if splits else ():
        for split, state in backbone.states(batch.ids, splits, **batch.keywords).items():
            rest = state.flatten(0, 1)[batch.real][~batch.first].double()
            found = rest.norm(dim=-1)
            norms[split].append(found)
            if split not in shifts and len(found):
                shifts[split] = rest[found <= metrics.SINK_FACTOR * found.median()].mean(0)
    return {
        split: Survey(threshold=metrics.sink_threshold(torch.cat(norms[split])), shift=shifts[split])
        for split in splits
    }


class _Sums:
    """Per-document sums on the device, read once at the end."""

    def __init__(self, documents: int, device: torch.device) -> None:
        self._table = {name: torch.zeros(documents, dtype=torch.float64, device=device) for name in SUMS}

    def add(self, documents: Int[Tensor, " positions"], **values: Float[Tensor, " positions"]) -> None:
        for name, value in values.items():
            self._table[name].index_add_(0, documents, value)

    def set(self, name: str, value: Float[Tensor, " documents"]) -> None:
        self._table[name].copy_(value)

    def numpy(self) -> dict[str, Float[np.ndarray, " documents"]]:
        return {name: value.cpu().numpy() for name, value in self._table.items()}


@dataclass(kw_only=True)
class _Run:
    """One (row, steps) during the pass."""

    row: Row
    steps: int
    sums: _Sums
    seconds: float = 0.0
    features: Tensor | None = field(default=None, repr=False)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _own_features(backbone: Backbone, batch_ids: Tensor, keywords: dict[str, Any]) -> Tensor:
    """States after the final norm by the model's own, unsplit forward: the teacher."""
    return backbone.decoder(input_ids=batch_ids, use_cache=False, **keywords)[0]


def _parity(backbone: Backbone, batch: _Batch, features: Tensor) -> float:
    # The teacher is read through `head` in chunks; this is the model's own forward, head included.
    row = {name: None if value is None else value[:1] for name, value in batch.keywords.items()}
    kept = _PARITY_POSITIONS
    cut = {name: None if value is None else value[:, :kept] for name, value in row.items()}
    logits = backbone.forward(batch.ids[:1, :kept], **cut)
    ours = backbone.head(_own_features(backbone, batch.ids[:1, :kept], cut))
    return float((logits.float() - ours.float()).abs().max())


@torch.no_grad()
def measure(
    backbone: Backbone,
    windows: EvaluationWindows,
    rows: list[Row],
    *,
    batch_size: int,
    sampler: str | None,
    seed: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> tuple[dict[tuple[str, int], Measured], dict[str, Any]]:
    """Measure every row at each of its numbers of steps.

    Per batch: the unsplit forward once (the teacher), the prefix once for the true states, and per row and number
    of steps its states and its suffix. Before that, the prefix runs over all windows once (`survey_splits`).

    Args:
        backbone: the backbone.
        windows: evaluation windows.
        rows: the rows; those without a source are measured from their logits or n-grams, or are the backbone.
        batch_size: windows per forward pass.
        sampler: solver; None: each method's own.
        seed: seed of the sampling noise, which is further keyed by window and position.
        advance: called with the tokens predicted in each batch.

    Returns:
        Sums per (row name, steps), and facts of the pass: sink thresholds and counts, parity of the teacher.

    Raises:
        UsageError: states or logits that are not finite, naming the row.
    """
    device, count = backbone.device, len(windows.documents)
    splits = sorted({row.split for row in rows if row.split is not None})
    surveys = survey_splits(backbone, windows, splits, batch_size=batch_size)
    moments = {split: metrics.StateMoments(count, surveys[split].shift) for split in splits}
    runs = [_Run(row=row, steps=steps, sums=_Sums(count, device)) for row in rows for steps in row.steps]
    facts: dict[str, Any] = {}
    chunk = metrics.chunk_positions(backbone.vocab_size)
    for batch in _batches(backbone, windows, batch_size):
        teacher = _own_features(backbone, batch.ids, batch.keywords)
        if "own_forward_max_logit_difference" not in facts:
            facts["own_forward_max_logit_difference"] = _parity(backbone, batch, teacher)
        teacher = teacher.flatten(0, 1)[batch.counted]
        truth = backbone.states(batch.ids, splits, **batch.keywords) if splits else {}
        flat = {split: state.flatten(0, 1)[batch.real] for split, state in truth.items()}
        sinks: dict[int, Tensor] = {}
        for split, state in flat.items():
            sinks[split] = batch.first | (state.double().norm(dim=-1) > surveys[split].threshold)
            moments[split].add(state, batch.real_documents, ~sinks[split])
        for run in runs:
            if run.row.source is not None:
                split = run.row.split
                estimate = _features(backbone, batch, run, sampler=sampler, seed=seed)
                _add_states(run, batch, estimate, flat[split], sinks[split])
        for start in range(0, len(batch.counted), chunk):
            part = slice(start, start + chunk)
            reference = metrics.teacher_chunk(_head(backbone, teacher[part]))
            for run in runs:
                _add_distribution(backbone, run, batch, part, reference, teacher)
        for run in runs:
            run.features = None
        advance(len(batch.counted))
    for run in runs:
        if run.row.split is not None:
            run.sums.set("state_variance", moments[run.row.split].variance())
        _add_counts(run, windows)
    facts["sinks"] = {
        str(split): {
            "policy": f"position 0 and norm above {metrics.SINK_FACTOR:g} x the median of the evaluated tokens",
            "norm_threshold": surveys[split].threshold,
            "ordinary_tokens": int(moments[split].count().sum()),
        }
        for split in splits
    }
    return {(run.row.name, run.steps): Measured(sums=run.sums.numpy(), seconds=run.seconds) for run in runs}, facts


def _head(backbone: Backbone, features: Tensor) -> Tensor:
    return backbone.head(features.unsqueeze(0)).squeeze(0)


def _features(backbone: Backbone, batch: _Batch, run: _Run, *, sampler: str | None, seed: int) -> Tensor:
    """Sample the row's states, read them by the suffix (kept in ``run.features``), return them at real tokens."""
    row = run.row
    began = _now(backbone.device)
    keywords: dict[str, Any] = {}
    if run.steps > 0:
        keywords = {"steps": run.steps, "sampler": sampler, "seed": seed, "sample_ids": batch.sample_ids}
    estimate = row.source.states(backbone, batch.ids, **batch.keywords, **keywords)
    with row.source.reading():
        features = backbone.suffix_features(estimate, row.split, **batch.keywords)
    run.features = features.flatten(0, 1)[batch.counted]
    run.seconds += _now(backbone.device) - began
    return estimate.flatten(0, 1)[batch.real]


def _add_states(run: _Run, batch: _Batch, estimate: Tensor, state: Tensor, sink: Tensor) -> None:
    error = _named(run, lambda: metrics.compare_states(estimate, state))
    ordinary = ~sink
    run.sums.add(
        batch.real_documents[ordinary],
        state_tokens=torch.ones_like(error.cosine[ordinary]),
        state_squared_error=error.squared_error[ordinary],
        state_cosine=error.cosine[ordinary],
    )
    run.sums.add(
        batch.real_documents[sink],
        sink_tokens=torch.ones_like(error.cosine[sink]),
        sink_squared_error=error.squared_error[sink],
        sink_energy=error.energy[sink],
    )


def _add_distribution(
    backbone: Backbone, run: _Run, batch: _Batch, part: slice, reference: metrics.Teacher, teacher: Tensor
) -> None:
    if run.row.logits is not None:
        logits = run.row.logits.expand_as(reference.log_p)
    elif run.row.ngram is not None:
        contexts = run.row.ngram.contexts(batch.ids).flatten(0, 1)[batch.counted[part]]
        logits = run.row.ngram.log_probabilities(contexts, dtype=torch.float32)
    else:
        logits = _head(backbone, teacher[part] if run.features is None else run.features[part])
    found = _named(run, lambda: metrics.compare_distribution(reference, logits, batch.targets[part]))
    run.sums.add(batch.documents[part], kl=found.kl, nll=found.nll, agreement=found.agreement, margin=found.margin)


def _add_counts(run: _Run, windows: EvaluationWindows) -> None:
    for name in ("tokens", "bytes"):
        values = [float(getattr(document, name)) for document in windows.documents]
        run.sums.set(name, torch.tensor(values, dtype=torch.float64))


def _named(run: _Run, compute: Callable[[], Any]) -> Any:
    from dihal.errors import UsageError

    try:
        return compute()
    except UsageError as error:
        raise UsageError(f"row {run.row.name!r}, {run.steps} steps: {error}") from error
