"""Arguments of a backbone's methods, checked before a library says something unclear about them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dihal.errors import UsageError

__all__ = [
    "default_positions",
    "require_block_range",
    "require_cache",
    "require_held",
    "require_kept",
    "require_length",
    "require_mask",
    "require_split",
    "require_state",
    "require_token_ids",
]


def require_split(split: int, num_blocks: int) -> int:
    """Return the split, or refuse one outside 0 .. L-1."""
    if isinstance(split, bool) or not isinstance(split, int) or not 0 <= split < num_blocks:
        raise UsageError(
            f"split {split!r} is out of range: this backbone has {num_blocks} blocks, valid splits are 0 to {num_blocks - 1}."
        )
    return split


def require_block_range(first: int, last: int, num_blocks: int) -> None:
    """Refuse a range of blocks first .. last-1 that is not inside the backbone."""
    if not 0 <= first <= last <= num_blocks:
        raise UsageError(
            f"blocks {first} to {last} (exclusive) are out of range: this backbone has {num_blocks} blocks."
        )


def require_token_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Refuse anything but integer ids of shape (batch, time) inside the vocabulary."""
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise UsageError(
            f"input_ids of shape {tuple(input_ids.shape)}: expected (batch, time), both at least 1. "
            "For one sequence use input_ids[None]."
        )
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise UsageError(f"input_ids are {input_ids.dtype}: expected token ids as int64. Use input_ids.long().")
    # On a GPU the check would wait for the device at every call.
    if input_ids.device.type == "cpu":
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= vocab_size:
            raise UsageError(
                f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}. "
                "Tokenise with the backbone's own tokenizer."
            )


def require_state(state: Tensor, hidden_size: int) -> None:
    """Refuse anything but a floating-point state of shape (batch, time, dim)."""
    if state.ndim != 3 or state.shape[-1] != hidden_size or not state.is_floating_point():
        raise UsageError(
            f"state of shape {tuple(state.shape)} and type {state.dtype}: expected floating point (batch, time, {hidden_size})."
        )


def require_mask(attention_mask: Tensor | None, batch: int, total: int) -> None:
    """Refuse a padding mask that does not cover cached and new tokens."""
    if attention_mask is not None and tuple(attention_mask.shape) != (batch, total):
        raise UsageError(
            f"attention_mask of shape {tuple(attention_mask.shape)}: expected ({batch}, {total}), "
            "one entry per cached and per new token."
        )


def default_positions(attention_mask: Tensor | None, time: int) -> Tensor | None:
    """Positions of the last ``time`` tokens: real tokens counted from 0, padding at its neighbour's position.

    Shape (batch, time); None without a mask, where the decoder counts from the cache's length itself.
    """
    if attention_mask is None:
        return None
    return (attention_mask.long().cumsum(-1) - 1).clamp_(min=0)[:, -time:]


def require_length(total: int, limit: int | None) -> None:
    """Refuse more tokens than a model with learned positions has positions for."""
    if limit is not None and total > limit:
        raise UsageError(f"{total} tokens, but this backbone has learned positions for {limit}. Use shorter sequences.")


def require_cache(cache: Any, first: int, last: int) -> None:
    """Refuse a cache of other blocks than those that run."""
    if cache is not None and cache.range != (first, last):
        held, end = cache.range
        raise UsageError(
            f"this cache holds blocks {held} to {end} (exclusive), blocks {first} to {last} are run. "
            f"Make it with new_cache({first}, {last})."
        )


def require_held(held: int | None, split: int | None) -> None:
    """Refuse to run blocks that were not loaded; ``split`` None: anything above the split."""
    if held is None or (split is not None and split <= held):
        return
    wanted = "the suffix and the head" if split is None else f"{split} blocks"
    raise UsageError(
        f"only the embedding and the {held} lowest blocks were loaded, {wanted} are to be run. "
        "Load the backbone with more blocks, or whole (blocks=None)."
    )


def require_kept(kept: int, time: int) -> None:
    """Refuse to keep the logits of more positions than there are."""
    if not 0 <= kept <= time:
        raise UsageError(f"logits_to_keep {kept} is out of range: 0 (all) to {time} positions.")
