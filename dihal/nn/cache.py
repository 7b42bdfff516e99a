"""Keys and values of positions that a denoiser has already seen."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["DenoiserCache"]

Heads = Float[Tensor, "batch heads total head_dim"]


class DenoiserCache:
    """Rotated keys and values per block, each (batch, heads, positions, head_dim).

    Under the mask `causal` it belongs to one evaluation of the denoiser along the sampler: keys and
    values depend on the noised states and times they were computed from, so a sampler of N
    evaluations per token keeps N caches. Under `mixed` it holds known positions only, which look the
    same in every evaluation: one cache serves them all. Pass the same cache to each call; the call
    appends its positions, or the leading ``keep=`` of them.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[Heads, Heads]] = []

    @property
    def length(self) -> int:
        """Number of positions held."""
        return self._entries[0][0].shape[2] if self._entries else 0

    def past(self, block: int) -> tuple[Heads, Heads] | None:
        """Return keys and values of a block, or None while it has none."""
        return self._entries[block] if block < len(self._entries) else None

    def store(self, block: int, keys: Heads, values: Heads) -> None:
        """Hold a block's keys and values, old and new positions together; blocks come in order."""
        if block < len(self._entries):
            self._entries[block] = (keys, values)
        else:
            assert block == len(self._entries), "blocks are stored in order"
            self._entries.append((keys, values))

    def crop(self, length: int) -> None:
        """Forget all positions from ``length`` on."""
        self._entries = [(keys[:, :, :length], values[:, :, :length]) for keys, values in self._entries]

    def reorder(self, rows: Int[Tensor, "new_batch"]) -> None:
        """Replace the batch by the given rows of it (beam search, finished sequences)."""
        self._entries = [(keys[rows], values[rows]) for keys, values in self._entries]
