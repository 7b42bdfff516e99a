"""A bound of the negative log-likelihood, in nats per token, by Monte Carlo.

A text is written by revealing one token at a time in a random order; its likelihood is the mean over all orders. By
Jensen's inequality -log p(x) <= E over orders of the sum of -log p(x_i | what is revealed). With l of N tokens masked
at random that expectation is E over l uniform on 1..N of (N / l) sum of the masked tokens' cross-entropy: the same
number as MDLM's integral over t of 1 / t times the masked cross-entropy (Sahoo et al. 2024; Ou et al. 2024), with less
variance, because the number of masked tokens is not random beside its mean. No t near 0 has to be left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dihal.errors import UsageError
from dihal.masked.attention import full
from dihal.masked.noise import mask_count, predictable
from dihal.method_parts import positions_of
from dihal.random import uniform

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.data import Batch
    from dihal.masked.model import MaskedLM

__all__ = ["Bound", "nll_bound"]

_ROWS = 1024
"""Positions whose logits exist at once (memory, not results)."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Bound of each sequence's negative log-likelihood given its first token.

    Attributes:
        nats: mean over draws, of the whole sequence.
        error: standard error of ``nats`` by the scatter of the draws; an upper estimate, for the draws of a sequence are
            spread evenly. Not a number with one draw.
        counted: tokens of the sequence that are predicted: all real ones but the first, and but for those that are the
            mask token itself.
    """

    nats: Float[Tensor, " sequences"]
    error: Float[Tensor, " sequences"]
    counted: Int[Tensor, " sequences"]

    @property
    def per_token(self) -> float:
        """Nats per token, all sequences together."""
        return float(self.nats.sum() / self.counted.sum())


@torch.no_grad()
def nll_bound(model: MaskedLM, backbone: Backbone, batch: Batch, *, draws: int, seed: int) -> Bound:
    """Estimate the bound of each sequence of a batch.

    The numbers of masked tokens of a sequence's draws are one randomly shifted even grid over 1..N, so that ``draws``
    masks cover all noise levels; shift and masks are keyed by (seed, sample id).

    Args:
        model: the converted backbone.
        backbone: what it was converted from.
        batch: sequences that begin at column 0.
        draws: masks per sequence, at least 1.
        seed: of shifts and masks.

    Raises:
        UsageError: no draw, or a sequence with nothing to predict.
    """
    if draws < 1:
        raise UsageError(f"draws is {draws}; the bound needs at least 1.")
    ids, mask, keys = batch.input_ids, batch.attention_mask, batch.sample_ids
    free = predictable(mask, positions_of(mask)) & (ids != model.mask_token_id)
    total = free.sum(-1)
    if bool((total == 0).any()):
        raise UsageError("a sequence has no token to predict: give windows of at least two tokens.")
    shift = uniform(seed, keys, "bound/shift", dtype=torch.float64, device=ids.device)
    visible = full(mask)
    training = model.training
    model.eval()
    found = []
    try:
        for draw in range(draws):
            level = torch.frac(draw / draws + shift)
            count = 1 + (level * total).long().clamp_max(total - 1)
            hidden = mask_count(free, count, seed=seed, sample_ids=keys, purpose=f"bound/{draw}")
            features = model.features(backbone, ids.masked_fill(hidden, model.mask_token_id), visible)
            nats = torch.zeros(ids.shape, dtype=torch.float64, device=ids.device)
            states, targets = features[:, :-1][hidden[:, 1:]], ids[:, 1:][hidden[:, 1:]]
            values = [
                -model.head(backbone, rows[None])[0].double().log_softmax(-1).gather(-1, wanted[:, None]).squeeze(-1)
                for rows, wanted in zip(states.split(_ROWS), targets.split(_ROWS), strict=True)
            ]
            nats[hidden] = torch.cat(values)
            found.append(nats.sum(-1) * total / count)
    finally:
        model.train(training)
    stacked = torch.stack(found)
    error = stacked.std(0) / math.sqrt(draws) if draws > 1 else torch.full_like(stacked[0], math.nan)
    return Bound(nats=stacked.mean(0), error=error, counted=total)
