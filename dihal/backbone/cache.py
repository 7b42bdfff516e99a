"""Keys and values of a range of blocks."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, Cache, DynamicCache

from dihal.backbone.layout import Layout
from dihal.errors import UsageError
from dihal.nn.cache import StaticPlace, StaticSlot
from dihal.nn.compiled import for_its_shapes

__all__ = ["BlockCache", "StaticBlockCache", "query_groups", "static_decoder"]

_GROUPED = "dihal_grouped"


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
        self.compiled = False
        """Blocks of a :func:`static_decoder` run compiled, as soon as there is room for their keys."""

    def slot(self, block: int) -> StaticSlot:
        """Room of a block."""
        if block not in self._slots:
            self._slots[block] = StaticSlot(self._place)
        return self._slots[block]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a block's new keys and values; return the whole room."""
        return self.slot(layer_idx).write(key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions are given."""
        return 0


class _OneBlock:
    """Keys and values of one block, whichever index it says it has: equal blocks then share what is compiled."""

    def __init__(self, slot: StaticSlot):
        self._slot = slot

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self._slot.write(key_states, value_states)

    def get_seq_length(self, *_: Any) -> int:
        return 0


def _run_block(block: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return block.forward(hidden, *args, **kwargs)


class _StaticBlock(nn.Module):
    """A block whose keys and values have room of fixed size."""

    def __init__(self, block: nn.Module, index: int, cache: StaticBlockCache):
        super().__init__()
        self.block = block
        self.index = index
        self.cache = cache

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        slot = self.cache.slot(self.index)
        if not (self.cache.compiled and slot.made):
            return self.block(hidden, *args, **kwargs)
        own = _OneBlock(slot)
        args = tuple(own if value is self.cache else value for value in args)
        kwargs = {name: own if value is self.cache else value for name, value in kwargs.items()}
        return for_its_shapes(_run_block)(self.block, hidden, args, kwargs)


def _grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Queries that share keys stand one after the other as so many more queries: no key or value is repeated.

    Args:
        module: not used.
        query: (batch, heads, time, head_dim).
        key, value: (batch, heads / groups, total, head_dim).
        attention_mask: (rows, 1, groups * time, total), added to the scores: each group's, one after the other.
        scaling: of the scores.
    """
    batch, heads, time, size = query.shape
    query = query.reshape(batch, key.shape[1], -1, size)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return mixed.reshape(batch, heads, time, value.shape[-1]).transpose(1, 2).contiguous(), None


AttentionInterface.register(_GROUPED, _grouped_attention)


def query_groups(config: Any) -> int:
    """Heads of queries that a :func:`static_decoder` lets share keys; its mask holds their rows one after the other."""
    heads = getattr(config, "num_attention_heads", 1)
    shared = heads // (getattr(config, "num_key_value_heads", None) or heads)
    plain = config._attn_implementation == "sdpa" and getattr(config, "attn_logit_softcapping", None) is None
    return shared if plain else 1


def _grouped(block: nn.Module) -> nn.Module:
    """A copy that shares every weight, and whose attention repeats no keys."""
    made = copy.copy(block)
    # What is compiled in place knows nothing of the copy.
    made.__dict__["_compiled_call_impl"] = None
    replaced: dict[str, nn.Module] = {}
    for name, child in block.named_children():
        if getattr(child, "num_key_value_groups", 1) > 1:
            attention = copy.copy(child)
            attention.config = copy.copy(child.config)
            attention.config._attn_implementation = _GROUPED
            replaced[name] = attention
    made.__dict__["_modules"] = {**block._modules, **replaced}
    return made


def static_decoder(decoder: nn.Module, layout: Layout, cache: StaticBlockCache) -> nn.Module:
    """A shallow copy of a decoder for passes that write into ``cache``; takes masks as :func:`query_groups` says.

    Args:
        decoder: the family's decoder module; untouched.
        layout: where its parts are.
        cache: of all its blocks.
    """
    grouped = query_groups(decoder.config) > 1
    blocks = list(getattr(decoder, layout.blocks))
    static = [_StaticBlock(_grouped(block) if grouped else block, i, cache) for i, block in enumerate(blocks)]
    made = copy.copy(decoder)
    made.__dict__["_modules"] = {**decoder._modules, layout.blocks: nn.ModuleList(static)}
    return made
