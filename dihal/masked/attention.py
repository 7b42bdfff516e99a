"""Who sees whom: from causal to full attention."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dihal.random import uniform
from dihal.types import Mask

__all__ = ["Visible", "annealed", "full", "openness"]

Visible = Bool[Tensor, "#batch 1 time time"]
"""True where a position (row) sees a position (column); a transformers model takes it as it is."""


def openness(progress: float, anneal: float) -> float:
    """Share of the pairs above the diagonal that are visible when a share ``progress`` of the budget is spent."""
    return 1.0 if anneal <= 0 else min(1.0, progress / anneal)


def full(mask: Mask) -> Visible:
    """Every position sees every real token; padding sees itself, so that no row is empty."""
    itself = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    return (mask[:, None, :] | itself)[:, None]


def annealed(mask: Mask, share: float, *, seed: int, sample_ids: Int[Tensor, " batch"]) -> Visible | None:
    """Causal attention with each pair above the diagonal opened with probability ``share``.

    Args:
        mask: real tokens.
        share: see :func:`openness`; 1 is :func:`full`.
        seed: of the run.
        sample_ids: key of each sequence's pairs. A pair that is open at one share is open at every larger one.

    Returns:
        None at share 0 without padding: the model's own causal attention, to the bit.
    """
    if share >= 1.0:
        return full(mask)
    if share <= 0.0 and bool(mask.all()):
        return None
    time = mask.shape[1]
    causal = torch.ones(time, time, dtype=torch.bool, device=mask.device).tril()
    drawn = uniform(seed, sample_ids, "masked/open", (time, time), device=mask.device) < share
    return full(mask) & (causal | drawn)[:, None]
