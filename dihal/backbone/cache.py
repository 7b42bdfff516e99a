"""Keys and values of a range of blocks."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache

from dihal.errors import UsageError

__all__ = ["BlockCache"]


class BlockCache(DynamicCache):
    """A transformers cache of which only blocks ``first_block .. last_block - 1`` are ever filled.

    The library sizes masks and counts positions by asking block 0, or the first block with full
    attention. When that block is outside the range it would answer 0 for ever, so such questions
    are answered by a block of the same kind inside the range.
    """

    def __init__(self, config: Any, first_block: int, last_block: int):
        super().__init__(config=config)
        self.first_block = first_block
        self.last_block = last_block
        # Without blocks there are no keys to count: a prefix at split 0 still needs positions.
        self._seen_by_none = 0

    @property
    def range(self) -> tuple[int, int]:
        """First block, and one past the last."""
        return self.first_block, self.last_block

    def _inside(self, layer_idx: int) -> int:
        if self.first_block <= layer_idx < self.last_block or len(self.layers) < self.last_block:
            return layer_idx
        sliding = self.is_sliding
        kind = sliding[layer_idx]
        return next((i for i in range(self.first_block, self.last_block) if sliding[i] == kind), self.first_block)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, whichever block is asked."""
        if self.first_block == self.last_block:
            return self._seen_by_none
        return super().get_seq_length(self._inside(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that a query of this length will see."""
        if self.first_block == self.last_block:
            return self._seen_by_none + query_length, 0
        return super().get_mask_sizes(query_length, self._inside(layer_idx))

    @property
    def length(self) -> int:
        """Tokens seen so far: the position of the next one in an unpadded row."""
        return self.get_seq_length(self.first_block)

    def note_tokens(self, count: int) -> None:
        """Count tokens that passed where no block keeps them; the backbone calls it."""
        if self.first_block == self.last_block:
            self._seen_by_none += count

    def truncate(self, length: int) -> None:
        """Forget every token from ``length`` on.

        Raises:
            UsageError: a sliding window has already dropped tokens that would be needed.
        """
        if not 0 <= length <= self.length:
            raise UsageError(f"cannot truncate a cache of {self.length} tokens to {length}.")
        if self.first_block == self.last_block:
            self._seen_by_none = length
        for layer in self.layers[self.first_block : self.last_block]:
            if not layer.is_initialized:
                continue
            removed = layer.get_seq_length() - length
            if removed and layer.is_sliding and layer.keys.shape[-2] < layer.get_seq_length():
                raise UsageError(
                    f"the sliding window of {layer.sliding_window} tokens has dropped what a truncated cache needs. "
                    "Start a new cache."
                )
            kept = layer.keys.shape[-2] - removed
            layer.keys = layer.keys[..., :kept, :]
            layer.values = layer.values[..., :kept, :]
            if layer.is_sliding:
                layer.cumulative_length = length

    def reorder(self, rows: Tensor) -> None:
        """Take the given rows of the batch, in that order (beam search, or dropping finished rows)."""
        self.reorder_cache(rows)
