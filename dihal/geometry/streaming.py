"""One pass over the backbone: what is kept of each layer, and nothing that grows with the text.

Per layer: second moments of kept and of dropped tokens (raw and rms coordinates; standardized
follows from raw), and the states of the pool. On a CPU a chunk's states of all layers live until the chunk
is consumed; those of the pilot (``PILOT_TOKENS``) together once. On a GPU several chunks (``HELD_BYTES``) pass a block
before any of them passes the next: with few tokens a layer is whole, and can be assessed, while the blocks above
are still to be run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from dihal.backbone.steps import Walk
from dihal.config import ScoreConfig
from dihal.geometry.parallel import layer_workers
from dihal.geometry.ranks import Ranks
from dihal.geometry.statistics import LayerStatistics, Seen
from dihal.geometry.windows import Chunk, Draw, plan_chunks

if TYPE_CHECKING:
    from dihal.backbone import Backbone

__all__ = ["HELD_BYTES", "LayerStatistics", "stream_statistics"]

HELD_BYTES = 2**29
"""States of one layer that a GPU holds to run their chunks block by block: 65,536 tokens of d = 4,096 in half precision."""

_BEHIND = 3
"""Pieces of work (a chunk through a block) after which a chunk's counts are read: the host runs ahead by as many."""


@dataclass(frozen=True, kw_only=True)
class _Places:
    """A chunk's tokens and where they go, on the device of the states."""

    input_ids: Tensor
    mask: Tensor | None
    """Padding; None: there is none."""
    first: Tensor
    rows: Tensor
    slots: Tensor
    where: Tensor | None
    """Real tokens among all of the chunk; None: all are."""

    @classmethod
    def of(cls, chunk: Chunk, pool: Tensor, device: torch.device) -> _Places:
        slots = torch.searchsorted(pool, chunk.index).clamp_max(len(pool) - 1)
        rows = (pool[slots] == chunk.index).nonzero().squeeze(1)
        full = bool(chunk.real.all())

        def there(tensor: Tensor) -> Tensor:
            # From pageable memory: the driver has taken a copy when this returns, and no kernel is waited for.
            return tensor.to(device, non_blocking=True)

        return cls(
            input_ids=there(chunk.input_ids),
            mask=None if full else there(chunk.real),
            first=there(chunk.first),
            rows=there(rows),
            slots=there(slots[rows]),
            where=None if full else there(chunk.real.flatten().nonzero().squeeze(1)),
        )

    def real(self, state: Tensor) -> Tensor:
        """(batch, time, d) -> (real tokens, d)."""
        flat = state.flatten(0, 1)
        return flat if self.where is None else flat[self.where]


def stream_statistics(
    backbone: Backbone,
    draw: Draw,
    pool: Int[Tensor, "pool"],
    config: ScoreConfig,
    advance: Callable[[int], None] | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
    whole: Callable[[LayerStatistics], None] | None = None,
) -> list[LayerStatistics]:
    """Run the backbone without its head and collect the statistics of h^0 .. h^(L-1).

    Args:
        backbone: the frozen LM.
        draw: the scored tokens.
        pool: indices of the pool among them, ascending.
        config: chunk size and sink policy.
        advance: called with the number of tokens of each chunk done, by whichever process.
        ranks: the processes that share the chunks. Each layer's statistics are whole on its owner and nowhere else.
        whole: called with each own layer once its statistics are whole: on a GPU and by one process while the blocks
            above are still to be run for the last time.

    Raises:
        UsageError: NaN or infinity in the states of a layer.
    """
    layers = [LayerStatistics(split, len(pool), config) for split in range(backbone.num_blocks)]
    plan = list(enumerate(plan_chunks(draw, config.batch_tokens)))
    told: set[int] = set()

    def tell(layer: LayerStatistics) -> None:
        if whole is not None and layer.split not in told:
            told.add(layer.split)
            whole(layer)

    def done(chunks: list[Chunk]) -> None:
        if advance is not None:
            for chunk in chunks:
                advance(len(chunk.index))

    pilot, rest = ([item for item in plan if item[1].pilot is which] for which in (True, False))
    if not _block_by_block(backbone):
        _by_chunks(backbone, pilot, layers, pool, ranks, done)
        for item in rest:
            _by_chunks(backbone, [item], layers, pool, ranks, done)
    else:
        if ranks.size == 1:
            _by_layers(backbone, [chunk for _, chunk in pilot], layers, pool, None if rest else tell)
            done([chunk for _, chunk in pilot])
        else:
            _by_chunks(backbone, pilot, layers, pool, ranks, done)
        done([chunk for number, chunk in rest if not ranks.owns(number)])
        groups = _groups([chunk for number, chunk in rest if ranks.owns(number)], backbone)
        for group in groups:
            last = ranks.size == 1 and group is groups[-1]
            _by_layers(backbone, group, layers, pool, tell if last else None)
            done(group)
    ranks.merge(layers)
    for layer in layers:
        if ranks.owns(layer.split):
            tell(layer)
    return layers


def _block_by_block(backbone: Backbone) -> bool:
    # A CPU overlaps nothing: there all layers of a chunk are added side by side instead.
    return backbone.device.type != "cpu"


def _groups(chunks: list[Chunk], backbone: Backbone) -> list[list[Chunk]]:
    """Chunks whose states of one layer are held together. The last group is a full one: there layers become whole early."""
    size = backbone.hidden_size * backbone.dtype.itemsize
    groups: list[list[Chunk]] = []
    held = 0
    for chunk in reversed(chunks):
        held += chunk.input_ids.numel() * size
        if not groups or held > HELD_BYTES:
            groups.append([])
            held = chunk.input_ids.numel() * size
        groups[-1].append(chunk)
    return [group[::-1] for group in reversed(groups)]


@torch.no_grad()
def _by_layers(
    backbone: Backbone,
    chunks: list[Chunk],
    layers: list[LayerStatistics],
    pool: Tensor,
    whole: Callable[[LayerStatistics], None] | None,
) -> None:
    """Run all chunks through a block before any through the next, and add their states.

    Statistics are added ``_BEHIND`` pieces of work late: then the host never waits with nothing begun.
    """
    places = [_Places.of(chunk, pool, backbone.device) for chunk in chunks]
    first = torch.cat([place.first for place in places])
    behind: deque[tuple[LayerStatistics, Seen, bool]] = deque()
    walks = [Walk(backbone, place.input_ids, place.mask) for place in places]

    def finish() -> None:
        layer, seen, last = behind.popleft()
        layer.finish(seen)
        if last and whole is not None:
            whole(layer)

    for layer in layers:
        for number, (walk, place) in enumerate(zip(walks, places)):
            if layer.split > 0:
                walk.step()
            if len(behind) >= _BEHIND:
                finish()
            if not chunks[0].pilot:
                behind.append(_begun(layer, place, walk, number + 1 == len(places)))
        if chunks[0].pilot:
            states = [place.real(walk.state) for walk, place in zip(walks, places)]
            layer.prepare(states, [chunk.first for chunk in chunks], first)
            behind.extend(_begun(layer, p, w, n + 1 == len(places)) for n, (w, p) in enumerate(zip(walks, places)))
    while behind:
        finish()


def _begun(layer: LayerStatistics, places: _Places, walk: Walk, last: bool) -> tuple[LayerStatistics, Seen, bool]:
    return layer, layer.begin(places.real(walk.state), places.first, places.rows, places.slots), last


def _by_chunks(
    backbone: Backbone,
    chunks: list[tuple[int, Chunk]],
    layers: list[LayerStatistics],
    pool: Tensor,
    ranks: Ranks,
    done: Callable[[list[Chunk]], None],
) -> None:
    """Run each of the (number, chunk) through all blocks, then add the states of all, several layers at a time.

    Of the pilot every process sees all states, before any is added.
    """
    held: list[dict[int, Tensor]] = []
    for number, chunk in chunks:
        own = _states(backbone, chunk) if ranks.owns(number) else {}
        held.append(_shared(own, chunk, backbone, ranks, number) if chunk.pilot else own)

    def prepare(layer: LayerStatistics) -> None:
        layer.prepare([states[layer.split] for states in held], [chunk.first for _, chunk in chunks])

    with layer_workers(backbone.device) as over:
        if chunks[0][1].pilot:
            list(over(prepare, layers))
        for (number, chunk), states in zip(chunks, held):
            if ranks.owns(number):
                places = _Places.of(chunk, pool, backbone.device)

                def add(layer: LayerStatistics, places: _Places = places, states: dict[int, Tensor] = states) -> None:
                    layer.add(states.pop(layer.split), places.first, places.rows, places.slots)

                list(over(add, layers))
            done([chunk])


def _shared(own: dict[int, Tensor], chunk: Chunk, backbone: Backbone, ranks: Ranks, number: int) -> dict[int, Tensor]:
    """The states of a chunk of the pilot on every process: each needs the medians and shifts that follow from them."""
    like = torch.empty(len(chunk.index), backbone.hidden_size, dtype=backbone.dtype, device=backbone.device)
    owner = ranks.owner(number)
    return {split: ranks.share(own.get(split), owner, like) for split in range(backbone.num_blocks)}


@torch.no_grad()
def _states(backbone: Backbone, chunk: Chunk) -> dict[int, Tensor]:
    """States of the real tokens of a chunk, (tokens, d), by split."""
    found: dict[int, Tensor] = {}
    full = bool(chunk.real.all())
    where = None if full else chunk.real.flatten().nonzero().squeeze(1).to(backbone.device)
    mask = None if full else chunk.real.to(backbone.device)

    def keep(split: int, state: Tensor) -> None:
        flat = state.flatten(0, 1)
        found[split] = flat if where is None else flat[where]

    backbone.visit(chunk.input_ids.to(backbone.device), range(backbone.num_blocks), keep, attention_mask=mask)
    return found
