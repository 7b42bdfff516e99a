"""Which tokens are masked."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dihal.random import uniform
from dihal.types import Mask

__all__ = ["mask_count", "mask_rate", "predictable"]


def predictable(mask: Mask, position_ids: Int[Tensor, "batch time"]) -> Mask:
    """Tokens that can be masked: all real ones but the first, which no position predicts."""
    return mask & (position_ids > 0)


def mask_rate(
    free: Mask, t: Float[Tensor, " batch"], *, seed: int, sample_ids: Int[Tensor, " batch"], purpose: str = "masked"
) -> Mask:
    """Mask each of the ``free`` tokens with probability t, independently."""
    return free & (uniform(seed, sample_ids, purpose, (free.shape[1],), device=free.device) < t[:, None])


def mask_count(
    free: Mask, count: Int[Tensor, " batch"], *, seed: int, sample_ids: Int[Tensor, " batch"], purpose: str
) -> Mask:
    """Mask exactly ``count`` of the ``free`` tokens of each row, every set of that size equally likely."""
    draws = uniform(seed, sample_ids, purpose, (free.shape[1],), dtype=torch.float64, device=free.device)
    order = draws.masked_fill(~free, 2.0).argsort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(free.shape[1], device=free.device).expand_as(order))
    return free & (rank < count[:, None])
