"""Who attends to whom."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from dihal.errors import UsageError, unknown_name

__all__ = ["MASKS", "block_visibility", "visibility"]

MASKS = ("causal", "bidirectional", "mixed")


def visibility(
    kind: str,
    length: int,
    total: int,
    device: torch.device,
    *,
    padding: Bool[Tensor, "batch total"] | None = None,
    known: Bool[Tensor, "batch length"] | None = None,
) -> tuple[Bool[Tensor, "rows 1 length total"] | None, bool]:
    """Return (mask, is_causal) for scaled dot-product attention; a mask is True where a query sees a key.

    The ``length`` queries are the last of the ``total`` keys. None means that no mask is needed,
    or that the kernel's own causal mask (``is_causal``) is the whole of it.

    - `causal`: a position sees itself and what is before it.
    - `bidirectional`: every position sees every position.
    - `mixed`: known positions see known positions up to themselves, never an unknown one;
      unknown positions see everything. Keys before the queries (a cache's) are known ones.

    Padded keys (``padding`` False) are seen by nobody but themselves: a row is never empty, so a
    padded row yields a finite number that nobody reads.

    Raises:
        UsageError: unknown kind; `known` missing under `mixed` or given under another kind.
    """
    if kind not in MASKS:
        raise unknown_name("mask", kind, MASKS)
    if (known is not None) != (kind == "mixed"):
        raise UsageError(
            "the mask 'mixed' needs known= (batch, time), True where a position's state is given."
            if kind == "mixed"
            else f"known= has no meaning under the mask {kind!r}; leave it out or configure mask: mixed."
        )
    if kind == "bidirectional" and padding is None:
        return None, False
    if kind == "causal" and padding is None and length == total:
        return None, True
    if kind == "causal" and padding is None and length == 1:
        return None, False
    query = torch.arange(total - length, total, device=device)[:, None]
    key = torch.arange(total, device=device)[None, :]
    if kind == "causal":
        seen = (key <= query)[None]
    elif kind == "bidirectional":
        seen = torch.ones(1, length, total, dtype=torch.bool, device=device)
    else:
        past = known.new_ones(known.shape[0], total - length)
        seen = ~known[:, :, None] | (torch.cat([past, known], dim=1)[:, None, :] & (key <= query)[None])
    if padding is not None:
        seen = (seen & padding[:, None, :]) | (key == query)[None]
    return seen[:, None], False


def block_visibility(
    known: Bool[Tensor, "batch length"], padding: Bool[Tensor, "batch length"] | None = None
) -> BlockMask:
    """The mask `mixed` of :func:`visibility`, without a cache, as FlexAttention takes it: blocks that nobody sees are skipped.

    Made once per pass; every block of the network reads the same one.
    """
    batch, length = known.shape
    real = torch.ones_like(known) if padding is None else padding

    # Lambda: the library counts the arguments, and run-time shape checks would hide those of a function.
    return create_block_mask(
        lambda row, _, query, key: (
            ((~known[row, query] | (known[row, key] & (key <= query))) & real[row, key]) | (key == query)
        ),
        batch,
        None,
        length,
        length,
        device=str(known.device),
    )
