"""One pass over the evaluation windows for all rows: the backbone runs once per batch, each row's suffix once.

Several processes take whole batches in turn and hand each other what they contribute to the sums: batches, and the
order in which they are added, are those of one process, and so is every bit of the result.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dihal.evaluation import metrics
from dihal.evaluation.definitions import SUMS
from dihal.evaluation.rows import Row
from dihal.evaluation.sharing import in_turn
from dihal.evaluation.sums import Contributions, DocumentSums, contributions
from dihal.geometry.ranks import Ranks
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
    """Sums per document of one row at one number of steps."""

    sums: dict[str, Float[np.ndarray, " documents"]]
    seconds: float
    """That its own passes took, on all processes together."""


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
    begun: int
    """Documents that earlier batches hold a part of."""


class _Batches:
    """The batches of all windows by number, each on the backbone's device."""

    def __init__(self, backbone: Backbone, windows: EvaluationWindows, batch_size: int) -> None:
        self._device, self._windows = backbone.device, windows
        self._rows = torch.arange(len(windows)).split(batch_size)
        order = {document.index: place for place, document in enumerate(windows.documents)}
        self._place_of = torch.full((max(order) + 1,), -1, dtype=torch.int64)
        for index, place in order.items():
            self._place_of[index] = place

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> _Batch:
        rows = self._rows[number]
        item, device = self._windows.select(rows), self._device
        # All windows real: no mask, which keeps the fast attention path.
        padded = not item.full
        positions = positions_of(item.attention_mask)
        real = item.attention_mask.flatten().nonzero().squeeze(-1)
        counted = item.loss_mask.flatten().nonzero().squeeze(-1)
        documents = self._place_of[item.document_ids.clamp_min(0)].flatten()
        before = int(rows[0]) - 1
        return _Batch(
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
            begun=0 if before < 0 else int(self._place_of[self._windows.document_ids[before, 0]]) + 1,
        )


@torch.no_grad()
def survey_splits(
    backbone: Backbone,
    windows: EvaluationWindows,
    splits: list[int],
    *,
    batch_size: int,
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
) -> dict[int, Survey]:
    """Run the prefix over the windows once to find each split's norm threshold and the neighbourhood of its mean.

    Raises:
        UsageError: states that are not finite.
    """
    batches = _Batches(backbone, windows, batch_size)
    seen: set[int] = set()  # splits of which this process has found a neighbourhood; the earliest batch's counts

    def survey(number: int) -> dict[int, tuple[np.ndarray, np.ndarray | None]]:
        batch, found = batches[number], {}
        for split, state in backbone.states(batch.ids, splits, **batch.keywords).items():
            rest = state.flatten(0, 1)[batch.real][~batch.first].double()
            norms, near = rest.norm(dim=-1), None
            if split not in seen and len(norms):
                seen.add(split)
                near = rest[norms <= metrics.SINK_FACTOR * norms.median()].mean(0).cpu().numpy()
            found[split] = norms.cpu().numpy(), near
        return found

    surveyed = list(in_turn(ranks, len(batches) if splits else 0, survey))
    found = {}
    for split in splits:
        norms, near = zip(*(part[split] for part in surveyed), strict=True)
        threshold = metrics.sink_threshold(torch.from_numpy(np.concatenate(norms)))
        shift = next(value for value in near if value is not None)
        found[split] = Survey(threshold=threshold, shift=torch.from_numpy(shift).to(backbone.device))
    return found


@dataclass(kw_only=True)
class _Run:
    """One (row, steps) during the pass."""

    row: Row
    steps: int
    sums: DocumentSums
    seconds: float = 0.0


@dataclass(kw_only=True)
class _RunBatch:
    """What one run makes of one batch."""

    seconds: float = 0.0
    parts: list[Contributions] = field(default_factory=list)
    features: Tensor | None = field(default=None, repr=False)
    """Its states read by the suffix, until they are no longer needed."""


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What comes of one batch, for all processes."""

    tokens: int
    moments: dict[int, Contributions]
    runs: list[_RunBatch]
    parity: float | None


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
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
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
        ranks: the processes that share the batches, each with the same arguments; all of them get the result.

    Returns:
        Sums per (row name, steps), and facts of the pass: sink thresholds and counts, parity of the teacher.

    Raises:
        UsageError: states or logits that are not finite, naming the row (on the first process; the others exit).
    """
    count = len(windows.documents)
    batches = _Batches(backbone, windows, batch_size)
    splits = sorted({row.split for row in rows if row.split is not None})
    surveys = survey_splits(backbone, windows, splits, batch_size=batch_size, ranks=ranks)
    moments = {split: metrics.StateMoments(count, surveys[split].shift) for split in splits}
    numbers = dict.fromkeys(SUMS, ())
    runs = [_Run(row=row, steps=steps, sums=DocumentSums(count, numbers)) for row in rows for steps in row.steps]
    facts: dict[str, Any] = {}

    def work(number: int) -> _Found:
        batch = batches[number]
        teacher = _own_features(backbone, batch.ids, batch.keywords)
        parity = _parity(backbone, batch, teacher) if number == 0 else None
        teacher = teacher.flatten(0, 1)[batch.counted]
        truth = backbone.states(batch.ids, splits, **batch.keywords) if splits else {}
        flat = {split: state.flatten(0, 1)[batch.real] for split, state in truth.items()}
        sinks: dict[int, Tensor] = {}
        part_of: dict[int, Contributions] = {}
        for split, state in flat.items():
            sinks[split] = batch.first | (state.double().norm(dim=-1) > surveys[split].threshold)
            part_of[split] = moments[split].part(state, batch.real_documents, ~sinks[split], begun=batch.begun)
        made = [_RunBatch() for _ in runs]
        for run, out in zip(runs, made, strict=True):
            if run.row.source is not None:
                split = run.row.split
                estimate = _features(backbone, batch, run, out, sampler=sampler, seed=seed)
                out.parts += _compared_states(run, batch, estimate, flat[split], sinks[split])
        _compare_distributions(backbone, runs, made, batch, teacher)
        return _Found(tokens=len(batch.counted), moments=part_of, runs=made, parity=parity)

    for found in in_turn(ranks, len(batches), work):
        if found.parity is not None:
            facts["own_forward_max_logit_difference"] = found.parity
        for split, part in found.moments.items():
            moments[split].add(part)
        for run, out in zip(runs, found.runs, strict=True):
            run.seconds += out.seconds
            for part in out.parts:
                run.sums.add(part)
        advance(found.tokens)
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


def _features(
    backbone: Backbone, batch: _Batch, run: _Run, out: _RunBatch, *, sampler: str | None, seed: int
) -> Tensor:
    """Sample the row's states, read them by the suffix (kept in ``out.features``), return them at real tokens."""
    row = run.row
    began = _now(backbone.device)
    keywords: dict[str, Any] = {}
    if run.steps > 0:
        keywords = {"steps": run.steps, "sampler": sampler, "seed": seed, "sample_ids": batch.sample_ids}
    estimate = row.source.states(backbone, batch.ids, **batch.keywords, **keywords)
    with row.source.reading():
        features = backbone.suffix_features(estimate, row.split, **batch.keywords)
    out.features = features.flatten(0, 1)[batch.counted]
    out.seconds = _now(backbone.device) - began
    return estimate.flatten(0, 1)[batch.real]


def _compared_states(
    run: _Run, batch: _Batch, estimate: Tensor, state: Tensor, sink: Tensor
) -> tuple[Contributions, Contributions]:
    error = _named(run, lambda: metrics.compare_states(estimate, state))
    ordinary = ~sink
    at_ordinary = {
        "state_tokens": torch.ones_like(error.cosine[ordinary]),
        "state_squared_error": error.squared_error[ordinary],
        "state_cosine": error.cosine[ordinary],
    }
    at_sinks = {
        "sink_tokens": torch.ones_like(error.cosine[sink]),
        "sink_squared_error": error.squared_error[sink],
        "sink_energy": error.energy[sink],
    }
    return (
        contributions(batch.real_documents[ordinary], at_ordinary, begun=batch.begun),
        contributions(batch.real_documents[sink], at_sinks, begun=batch.begun),
    )


def _compare_distributions(
    backbone: Backbone, runs: list[_Run], made: list[_RunBatch], batch: _Batch, teacher: Tensor
) -> None:
    """Compare every run's next-token distributions with the backbone's, a chunk of positions at a time."""
    chunk = metrics.chunk_positions(backbone.vocab_size)
    chunks: list[list[metrics.Distribution]] = [[] for _ in runs]
    for start in range(0, len(batch.counted), chunk):
        part = slice(start, start + chunk)
        reference = metrics.teacher_chunk(_head(backbone, teacher[part]))
        for run, out, found in zip(runs, made, chunks, strict=True):
            features = teacher if out.features is None else out.features
            found.append(_distribution(backbone, run, batch, part, reference, features))
    for out, found in zip(made, chunks, strict=True):
        out.features = None
        if found:
            names = ("kl", "nll", "agreement", "margin")
            values = {name: torch.cat([getattr(item, name) for item in found]) for name in names}
            out.parts.append(contributions(batch.documents, values, begun=batch.begun))


def _distribution(
    backbone: Backbone, run: _Run, batch: _Batch, part: slice, reference: metrics.Teacher, features: Tensor
) -> metrics.Distribution:
    if run.row.logits is not None:
        logits = run.row.logits.expand_as(reference.log_p)
    elif run.row.ngram is not None:
        contexts = run.row.ngram.contexts(batch.ids).flatten(0, 1)[batch.counted[part]]
        logits = run.row.ngram.log_probabilities(contexts, dtype=torch.float32)
    else:
        logits = _head(backbone, features[part])
    return _named(run, lambda: metrics.compare_distribution(reference, logits, batch.targets[part]))


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
