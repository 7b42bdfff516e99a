"""Which masked positions a step reveals, and with which tokens."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dihal.types import Mask

__all__ = ["Drawn", "chosen", "draw", "nucleus", "planned"]

Drawn = tuple[Int[Tensor, " rows"], Float[Tensor, " rows"], Float[Tensor, " rows"]]
"""Tokens, the logarithm of their probability, entropy of the distribution (nats)."""


def planned(total: Int[Tensor, " batch"], steps: int) -> Int[Tensor, "batch steps"]:
    """How many positions each step reveals: as equal as whole numbers allow, all of them after the last."""
    edges = total[:, None] * torch.arange(steps + 1, device=total.device) // steps
    return edges.diff(dim=-1)


def nucleus(log_p: Float[Tensor, "rows vocab"], top_p: float) -> Float[Tensor, "rows vocab"]:
    """Minus infinity outside the smallest set of tokens that holds a share ``top_p`` (Holtzman et al. 2020)."""
    ordered, index = log_p.sort(dim=-1, descending=True, stable=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    # The most probable token stays, whatever rounding does.
    outside = (before >= top_p) & (torch.arange(log_p.shape[-1], device=log_p.device) > 0)
    return log_p.masked_fill(torch.zeros_like(outside).scatter_(-1, index, outside), float("-inf"))


def draw(
    logits: Float[Tensor, "rows vocab"],
    noise: Float[Tensor, "rows vocab"] | None,
    *,
    temperature: float,
    top_p: float,
) -> Drawn:
    """Draw a token per row in fp64: from softmax(logits / temperature) within its nucleus, by the Gumbel-max rule.

    Args:
        logits: of one position each; minus infinity where a token is banned.
        noise: standard Gumbel numbers; None at temperature 0, where the most probable token is taken.
        temperature: 0 or positive.
        top_p: share of the nucleus.

    Log-probability and entropy are those at temperature 1, before the nucleus: how sure the model is.
    """
    log_p = logits.double().log_softmax(-1)
    entropy = torch.special.entr(log_p.exp()).sum(-1)
    scores = log_p
    if temperature > 0:
        assert noise is not None, "a temperature above 0 needs noise"
        scores = (log_p / temperature).log_softmax(-1)
        scores = (nucleus(scores, top_p) if top_p < 1.0 else scores) + noise
    tokens = scores.argmax(-1)
    return tokens, log_p.gather(-1, tokens[:, None]).squeeze(-1), entropy


def chosen(
    score: Float[Tensor, "batch time"], hidden: Mask, count: Int[Tensor, " batch"]
) -> Bool[Tensor, "batch time"]:
    """The ``count`` masked positions of each row with the highest scores; among equals the first."""
    order = score.masked_fill(~hidden, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(score.shape[1], device=score.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    return hidden & (rank < count[:, None])
