"""What is known of a sequence in training, and the keys of its noise."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from dihal.config.spaces import KnownConfig
from dihal.random import uniform
from dihal.types import Mask

__all__ = ["draw_known", "position_keys", "settled"]

_MAX_POSITIONS = 1 << 20
"""Positions that a key leaves room for: key = sample id * this + position."""


def position_keys(
    sample_ids: Int[Tensor, " batch"], position_ids: Int[Tensor, "batch time"]
) -> Int[Tensor, "batch time"]:
    """Key of each position's random numbers: neither the batch nor the block it is in changes them."""
    return sample_ids.unsqueeze(-1) * _MAX_POSITIONS + position_ids


def settled(token_known: Mask) -> Mask:
    """Where the state is known: h^l_i is a function of x_1..x_i, so all tokens up to a position must be known."""
    return token_known.long().cumprod(-1).bool()


def draw_known(
    config: KnownConfig,
    mask: Mask,
    position_ids: Int[Tensor, "batch time"],
    sample_ids: Int[Tensor, " batch"],
    *,
    seed: int,
) -> tuple[Mask, Mask]:
    """Draw what a training sequence gives: (state known, token known but state not), disjoint.

    The length of the prefix is uniform on the integers from ``prefix_min`` to ``prefix_max`` of the real tokens; at
    least one token stays unknown. A share ``infill`` of the sequences also gives the end, after a gap of uniform
    length of at least one token; a share ``scattered`` gives each later token with a probability that is itself
    uniform. Such tokens continue the known prefix where they follow it without a gap.

    Args:
        config: shares.
        mask: real tokens; padding is neither known nor given.
        position_ids: 0 at the first real token of each row.
        sample_ids: key of each sequence's draws.
        seed: of the run.
    """
    length = mask.sum(-1)
    draws = uniform(seed, sample_ids, "known", (4,), dtype=torch.float64).to(mask.device)
    lowest = torch.minimum(length - 1, torch.full_like(length, config.prefix_min)).clamp_min(0)
    highest = torch.maximum(lowest, torch.minimum(length - 1, (config.prefix_max * length).long()))
    prefix = lowest + (draws[:, 0] * (highest - lowest + 1)).long()
    given = torch.zeros_like(mask)
    if config.infill > 0:
        # A gap of 1 .. (rest - 1) tokens; where only one token is left, it is the gap and nothing is given.
        gap = 1 + (draws[:, 1] * (length - prefix - 1).clamp_min(1)).long()
        filled = (draws[:, 2] < config.infill)[:, None]
        given = given | (filled & (position_ids >= (prefix + gap)[:, None]))
    if config.scattered > 0:
        chosen = (draws[:, 2] >= config.infill) & (draws[:, 2] < config.infill + config.scattered)
        each = uniform(seed, sample_ids, "known/scattered", (mask.shape[1],)).to(mask.device)
        free = position_ids >= prefix[:, None]
        picked = chosen[:, None] & free & (each < draws[:, 3:4])
        # At least one token stays unknown: the last one.
        given = given | (picked & (position_ids < (length - 1)[:, None]))
    tokens = (position_ids < prefix[:, None]) | given
    known = settled(tokens | ~mask) & mask
    return known, given & mask & ~known
