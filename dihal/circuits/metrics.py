"""What a run is judged by: one number per prompt from the logits at its targets."""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dihal.circuits.types import Metric, PairBatch
from dihal.errors import UsageError, unknown_name

__all__ = [
    "METRICS",
    "PlainGradientWarning",
    "answer_first",
    "answer_rank",
    "find_metric",
    "kl_divergence",
    "logit_difference",
    "probability_difference",
    "solved",
]

_Logits = Float[Tensor, "batch targets vocab"]


class PlainGradientWarning(UserWarning):
    """The metric has no gradient where plain EAP takes it."""


def _mean(values: _Logits, ids: Int[Tensor, "batch targets choices"]) -> Float[Tensor, "batch targets"]:
    listed = ids >= 0
    picked = values.gather(-1, ids.clamp_min(0)) * listed
    return picked.sum(-1) / listed.sum(-1)


def _total(values: _Logits, ids: Int[Tensor, "batch targets choices"]) -> Float[Tensor, "batch targets"]:
    return (values.gather(-1, ids.clamp_min(0)) * (ids >= 0)).sum(-1)


def _over_targets(per_target: Float[Tensor, "batch targets"], batch: PairBatch) -> Float[Tensor, " batch"]:
    weights = batch.weights.to(per_target)
    return (per_target * weights).sum(-1) / weights.sum(-1)


def logit_difference(logits: _Logits, batch: PairBatch) -> Float[Tensor, " batch"]:
    """Mean logit of the answers minus mean logit of the foils, averaged over targets; logits.

    With several ids the means are plain means of logits: no maximum and no sum of exponentials, so that the gradient
    does not depend on which answer leads.
    """
    return _over_targets(_mean(logits, batch.answers) - _mean(logits, batch.foils), batch)


def probability_difference(logits: _Logits, batch: PairBatch) -> Float[Tensor, " batch"]:
    """Probability of all answers together minus that of all foils, averaged over targets; in [-1, 1]."""
    chances = logits.softmax(-1)
    return _over_targets(_total(chances, batch.answers) - _total(chances, batch.foils), batch)


def kl_divergence(reference: _Logits) -> Metric:
    """Minus the divergence from a clean run, KL(clean ‖ run) in nats, as a metric of batches shaped like `reference`.

    Its gradient at the clean run is zero: plain EAP would find nothing. Use EAP-IG.
    """
    warnings.warn(
        "the KL metric has zero gradient at the clean run: plain EAP scores would all be zero; use eap-ig.",
        PlainGradientWarning,
        stacklevel=2,
    )
    wanted = reference.detach().log_softmax(-1)

    def metric(logits: _Logits, batch: PairBatch) -> Float[Tensor, " batch"]:
        if logits.shape != wanted.shape:
            raise UsageError(f"the clean run has logits {tuple(wanted.shape)}, this one {tuple(logits.shape)}.")
        divergence = (wanted.exp() * (wanted - logits.log_softmax(-1))).sum(-1)
        return -_over_targets(divergence, batch)

    return metric


METRICS: dict[str, Metric] = {
    "logit_difference": logit_difference,
    "probability_difference": probability_difference,
}
"""Metric name -> function."""


def find_metric(name: str) -> Metric:
    """The metric of that name.

    Raises:
        UsageError: no such metric.
    """
    if name not in METRICS:
        hint = "kl depends on a clean run: make it with dihal.circuits.metrics.kl_divergence." if name == "kl" else ""
        raise unknown_name("metric", name, METRICS, hint=hint)
    return METRICS[name]


def solved(logits: _Logits, batch: PairBatch) -> Bool[Tensor, " batch"]:
    """Whether a prompt counts as solved: at every target the answers' mean logit is above the foils'."""
    ahead = _mean(logits, batch.answers) > _mean(logits, batch.foils)
    return (ahead | (batch.weights.to(logits.device) == 0)).all(-1)


def answer_first(logits: _Logits, batch: PairBatch) -> Bool[Tensor, " batch"]:
    """Whether the most likely token of the whole vocabulary is an answer, at every target: stricter than `solved`."""
    first = logits.argmax(-1, keepdim=True)
    right = (first == batch.answers).any(-1)
    return (right | (batch.weights.to(logits.device) == 0)).all(-1)


def answer_rank(logits: _Logits, batch: PairBatch) -> Int[Tensor, "batch targets"]:
    """How many tokens are more likely than the best answer (0: it leads)."""
    best = (
        logits.gather(-1, batch.answers.clamp_min(0)).masked_fill(batch.answers < 0, -torch.inf).amax(-1, keepdim=True)
    )
    return (logits > best).sum(-1)
