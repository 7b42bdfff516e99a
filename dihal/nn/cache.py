"""Keys and values of positions that a denoiser has already seen."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["DenoiserCache", "StaticDenoiserCache", "StaticPlace", "StaticSlot"]

Heads = Float[Tensor, "batch heads total head_dim"]
New = Float[Tensor, "batch heads new head_dim"]


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


class StaticSlot:
    """Room for the keys and values of one block, written in place: shapes never change, so that a pass can be a CUDA graph."""

    def __init__(self, place: StaticPlace) -> None:
        self._place = place
        self._keys: Heads | None = None
        self._values: Heads | None = None

    @property
    def made(self) -> bool:
        """Whether there is room: the first pass makes it."""
        return self._keys is not None

    def write(self, keys: New, values: New) -> tuple[Heads, Heads]:
        """Put new keys and values (batch, heads, new, head_dim) at the positions of this pass; return the room within reach."""
        if self._keys is None or self._values is None:
            batch, heads, _, size = keys.shape
            self._keys = keys.new_zeros(batch, heads, self._place.length, size)
            self._values = values.new_zeros(batch, heads, self._place.length, values.shape[-1])
        self._keys.index_copy_(2, self._place.current, keys)
        self._values.index_copy_(2, self._place.current, values)
        reach = self._place.reach
        return self._keys[:, :, :reach], self._values[:, :, :reach]


class StaticPlace:
    """Which positions a pass writes, as a tensor that a captured pass reads anew each time.

    Args:
        length: positions there is room for.
        device: where.
    """

    def __init__(self, length: int, device: torch.device) -> None:
        self.length = length
        self.reach = length
        """Leading positions that a pass reads; no pass may stand beyond them. What is not there is masked."""
        self.next = torch.zeros(1, dtype=torch.int64, device=device)
        """The position that a pass over one token writes."""
        self.current = self.next
        """The positions of the pass that runs now."""
        self._every = torch.arange(length, device=device)
        self._spans: dict[int, Tensor] = {}

    def prompt(self, tokens: int) -> None:
        """The next pass is over the first ``tokens`` positions."""
        self.current = self._every[:tokens]

    def token(self) -> None:
        """The passes that follow are over one token each, at :attr:`next`."""
        self.current = self.next

    def span(self, start: int, count: int) -> None:
        """The passes that follow are over ``count`` positions from ``start`` on; a captured one is moved there."""
        if count not in self._spans:
            self._spans[count] = torch.empty(count, dtype=torch.int64, device=self.next.device)
        self.current = self._spans[count]
        self.current.copy_(self._every[start : start + count])

    def mask(self, known: Bool[Tensor, "batch new"] | None = None) -> Bool[Tensor, "rows 1 new reach"]:
        """True where a position of this pass sees one of the room.

        Args:
            known: None: the mask `causal`. Else `mixed`: every position before this pass is known, and these of it are.
        """
        every = self._every[: self.reach]
        if known is None:
            return (every[None, :] <= self.current[:, None])[None, None]
        order = torch.arange(known.shape[1], device=known.device)
        among = ~known[:, :, None] | (known[:, None, :] & (order[None, :] <= order[:, None])[None])
        room = torch.zeros(*known.shape, self.reach, dtype=torch.bool, device=known.device)
        before = every < self.current[0]
        return (room.index_copy(2, self.current, among) | before)[:, None]


class StaticDenoiserCache:
    """A :class:`DenoiserCache` of fixed size; under the mask `causal` one per evaluation of the denoiser.

    Under `mixed` one serves them all: the positions of a pass are written again by the next, those before it stay.
    """

    def __init__(self, place: StaticPlace) -> None:
        self.place = place
        self.compiled = False
        """Passes run compiled, each for its shapes (see :mod:`dihal.nn.compiled`), as soon as there is room."""
        self._slots: dict[int, StaticSlot] = {}

    def slot(self, block: int) -> StaticSlot:
        """Room of a block."""
        if block not in self._slots:
            self._slots[block] = StaticSlot(self.place)
        return self._slots[block]

    def made(self, blocks: int) -> bool:
        """Whether the first ``blocks`` blocks have their room."""
        return all(block in self._slots and self._slots[block].made for block in range(blocks))
