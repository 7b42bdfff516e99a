"""Keys and values of a range of blocks."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache

from dihal.errors import UsageError
from dihal.nn.cache import StaticPlace, StaticSlot

__all__ = ["BlockCache", "StaticBlockCache"]


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


class StaticBlockCache(Cache):
    """Keys and values of a range of blocks in room of fixed size, written in place (see `dihal.nn.cache.StaticPlace`).

    Masks and positions are given to every pass by whoever makes it: nothing is counted here, so that a pass can be
    captured as a CUDA graph. Every row stands at the same position; no padding, no sliding window.
    """

    is_compileable = True

    def __init__(self, place: StaticPlace):
        super().__init__(layers=[])
        self._place = place
        self._slots: dict[int, StaticSlot] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a block's new keys and values; return the whole room."""
        if layer_idx not in self._slots:
            self._slots[layer_idx] = StaticSlot(self._place)
        return self._slots[layer_idx].write(key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions are given."""
        return 0
