"""One pass over the backbone: what is kept of each layer, and nothing that grows with the text.

Per layer: second moments of kept and of dropped tokens (raw and rms coordinates; standardized
follows from raw), and the states of the pool. A chunk's states of all layers live until the chunk
is consumed; those of the pilot (``PILOT_TOKENS``) together once.

**Sinks.** Position 0 of each window, and tokens whose norm exceeds ``norm_factor`` times the
layer's median norm. The median is that of the *pilot*, the first windows drawn, so it is known
before the first token is accumulated, and is the same for every chunk size. (With fewer tokens
than a pilot it is the median of all.) Dropped tokens go to accumulators of their own: what they do
to the proxies is reported without a second pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dihal.config import ScoreConfig
from dihal.errors import UsageError
from dihal.geometry.moments import Moments, work_dtype
from dihal.geometry.parallel import layer_workers
from dihal.geometry.ranks import Ranks
from dihal.geometry.windows import Chunk, Draw, plan_chunks

if TYPE_CHECKING:
    from dihal.backbone import Backbone

__all__ = ["LayerStatistics", "rms_scale", "stream_statistics"]


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))


def rms_scale(norms: Float[Tensor, "tokens"], dim: int) -> Float[Tensor, "tokens"]:
    """Factor sqrt(d) / |h| that divides a token by its root mean square; a zero token stays zero."""
    return dim**0.5 / norms.clamp_min(torch.finfo(norms.dtype).tiny)


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """A chunk's states of one layer, and what the host must know before it can add them."""

    x: Tensor
    norms: Tensor
    dropped: Tensor
    """Dropped tokens first, in their order; on a CPU only they."""
    rows: Tensor
    slots: Tensor
    counts: Tensor
    """Not finite, first, large but not first; on the host once ``known``."""
    known: torch.cuda.Event | None


class LayerStatistics:
    """What is known of the states of one layer. Final.

    Args:
        split: the layer.
        pool: number of pool tokens.
        config: sink policy.
    """

    def __init__(self, split: int, pool: int, config: ScoreConfig) -> None:
        self.split = split
        self.tokens = 0
        self.dropped_first = 0
        self.dropped_norm = 0
        self.pilot_median = float("nan")
        self.threshold = float("inf")
        self._drop_first = config.drop_first
        self._norm_factor = config.norm_factor
        self._pool_size = pool

    def prepare(self, states: list[Float[Tensor, "_ dim"]], first: list[Bool[Tensor, "_"]]) -> None:
        """Fix threshold and shifts from the pilot's states. Call once, before :meth:`add`."""
        norms = torch.cat([self._checked_norms(x) for x in states])
        ordinary = ~torch.cat(first).to(norms.device) if self._drop_first else torch.ones_like(norms, dtype=torch.bool)
        self.pilot_median = float(norms[ordinary].median()) if ordinary.any() else float(norms.median())
        self.threshold = self._norm_factor * self.pilot_median
        kept = ordinary & (norms <= self.threshold)
        x, norms = torch.cat(states)[kept], norms[kept]
        dtype = work_dtype(x.dtype, x.device)
        wide, count = x.to(norms.dtype), max(len(x), 1)
        raw, rms = wide.sum(0) / count, rms_scale(norms, x.shape[1]) @ wide / count
        self.kept = {"raw": Moments(raw, dtype), "rms": Moments(rms, dtype)}
        # Few tokens are dropped: they wait until a product of them is worth a matrix. In fp64 it does not matter
        # which of them wait together, and so not how chunks are shared among processes.
        few = {"wait": x.shape[1]} if x.is_cuda else {}
        self.dropped = {name: Moments(m.shift, torch.float64, **few) for name, m in self.kept.items()}
        self.pool = x.new_zeros(self._pool_size, x.shape[1])
        self.pool_norms = norms.new_zeros(self._pool_size)

    def _checked_norms(self, x: Tensor) -> Tensor:
        norms = _norms(x)
        bad = int((~norms.isfinite()).sum())
        if bad:
            self._refuse(bad, len(x))
        return norms

    def _refuse(self, bad: int, tokens: int) -> NoReturn:
        raise UsageError(
            f"the states of split {self.split} hold NaN or infinity in {bad} of {tokens} tokens of a chunk. "
            "Load the backbone with dtype float32 or bfloat16, or check its weights."
        )

    def add(
        self,
        x: Float[Tensor, "tokens dim"],
        first: Bool[Tensor, "tokens"],
        rows: Int[Tensor, "chosen"],
        slots: Int[Tensor, "chosen"],
    ) -> None:
        """Add a chunk's real tokens; ``x[rows]`` belong to the pool at ``slots``.

        Raises:
            UsageError: NaN or infinity in the states.
        """
        self.finish(self.begin(x, first, rows, slots))

    def begin(
        self,
        x: Float[Tensor, "tokens dim"],
        first: Bool[Tensor, "tokens"],
        rows: Int[Tensor, "chosen"],
        slots: Int[Tensor, "chosen"],
    ) -> _Seen:
        """First half of :meth:`add`: look at the tokens. Nothing waits for the device."""
        norms = _norms(x)
        first = first.to(x.device) if self._drop_first else torch.zeros_like(norms, dtype=torch.bool)
        large = norms > self.threshold
        counts = torch.stack([(~norms.isfinite()).sum(), first.sum(), (large & ~first).sum()])
        dropped, known = first | large, None
        if x.is_cuda:
            # The host reads the counts when they are there; it does not wait for them with nothing begun behind them.
            dropped = dropped.to(torch.uint8).argsort(descending=True, stable=True)
            counts = torch.empty(3, dtype=torch.int64, pin_memory=True).copy_(counts, non_blocking=True)
            known = torch.cuda.current_stream(x.device).record_event()
        else:
            dropped = dropped.nonzero().squeeze(1)
        return _Seen(x=x, norms=norms, dropped=dropped, rows=rows, slots=slots, counts=counts, known=known)

    def finish(self, seen: _Seen) -> None:
        """Second half of :meth:`add`. On a GPU it is best called when more work has been begun.

        Raises:
            UsageError: NaN or infinity in the states.
        """
        if seen.known is not None:
            seen.known.synchronize()
        bad, dropped_first, dropped_norm = seen.counts.tolist()
        x, norms = seen.x, seen.norms
        if bad:
            self._refuse(bad, len(x))
        self.tokens += len(x)
        self.dropped_first += dropped_first
        self.dropped_norm += dropped_norm
        self.pool[seen.slots] = x[seen.rows]
        self.pool_norms[seen.slots] = norms[seen.rows]
        where = seen.dropped[: dropped_first + dropped_norm]
        scale = rms_scale(norms, x.shape[1])
        self.kept["raw"].add_chosen(x, where)
        self.kept["rms"].add_chosen(x, where, scale)
        for moments in self.kept.values():
            moments.settle()
        if len(where):
            part = x.index_select(0, where)
            self.dropped["raw"].add(part)
            self.dropped["rms"].add(part, scale[where])

    def forget(self) -> None:
        """Give the memory back; another process has all of it."""
        del self.kept, self.dropped, self.pool, self.pool_norms

    @property
    def pool_kept(self) -> Bool[Tensor, "pool"]:
        """Pool tokens that this layer's sink policy keeps."""
        return self.pool_norms <= self.threshold


@dataclass(frozen=True, kw_only=True)
class _Places:
    """Where a chunk's tokens go, on the device of the states."""

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
        return cls(
            first=chunk.first.to(device),
            rows=rows.to(device),
            slots=slots[rows].to(device),
            where=None if full else chunk.real.flatten().nonzero().squeeze(1).to(device),
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
    plan = plan_chunks(draw, config.batch_tokens)
    waiting: list[tuple[Chunk, dict[int, Tensor]]] = []
    told: set[int] = set()

    def tell(layer: LayerStatistics) -> None:
        if whole is not None and layer.split not in told:
            told.add(layer.split)
            whole(layer)

    def prepare(layer: LayerStatistics) -> None:
        layer.prepare([held[layer.split] for _, held in waiting], [done.first for done, _ in waiting])

    def add(layer: LayerStatistics, places: _Places, state: Tensor) -> None:
        layer.add(state, places.first, places.rows, places.slots)

    device = backbone.device
    with layer_workers(device) as over:
        for number, chunk in enumerate(plan):
            mine = ranks.owns(number)
            if not mine and not chunk.pilot:
                if advance is not None:
                    advance(len(chunk.index))
                continue
            if device.type != "cpu" and not chunk.pilot:
                last = number + 1 == len(plan) and ranks.size == 1
                _stream(backbone, chunk, layers, _Places.of(chunk, pool, device), tell if last else None)
                if advance is not None:
                    advance(len(chunk.index))
                continue
            own = _states(backbone, chunk) if mine else {}
            waiting.append((chunk, _shared(own, chunk, backbone, ranks, number) if chunk.pilot else own))
            if chunk.pilot and number + 1 < len(plan) and plan[number + 1].pilot:
                continue
            if chunk.pilot:
                list(over(prepare, layers))
            first = number + 1 - len(waiting)
            for place, (done, held) in enumerate(waiting, first):
                if not ranks.owns(place):
                    continue
                places = _Places.of(done, pool, device)
                for _ in over(lambda layer, p=places, h=held: add(layer, p, h.pop(layer.split)), layers):
                    pass
                if advance is not None:
                    advance(len(done.index))
            waiting.clear()
    ranks.merge(layers)
    for layer in layers:
        if ranks.owns(layer.split):
            tell(layer)
    return layers


def _stream(
    backbone: Backbone,
    chunk: Chunk,
    layers: list[LayerStatistics],
    places: _Places,
    whole: Callable[[LayerStatistics], None] | None,
) -> None:
    """Add a chunk's states as they appear, each one block late: then the host never waits with nothing begun."""
    behind: list[tuple[LayerStatistics, _Seen]] = []

    def finish() -> None:
        layer, seen = behind.pop()
        layer.finish(seen)
        if whole is not None:
            whole(layer)

    def show(split: int, state: Tensor) -> None:
        seen = layers[split].begin(places.real(state), places.first, places.rows, places.slots)
        if behind:
            finish()
        behind.append((layers[split], seen))

    _visit(backbone, chunk, show)
    finish()


def _shared(own: dict[int, Tensor], chunk: Chunk, backbone: Backbone, ranks: Ranks, number: int) -> dict[int, Tensor]:
    """The states of a chunk of the pilot on every process: each needs the medians and shifts that follow from them."""
    like = torch.empty(len(chunk.index), backbone.hidden_size, dtype=backbone.dtype, device=backbone.device)
    owner = ranks.owner(number)
    return {split: ranks.share(own.get(split), owner, like) for split in range(backbone.num_blocks)}


@torch.no_grad()
def _visit(backbone: Backbone, chunk: Chunk, show: Callable[[int, Tensor], None]) -> None:
    """Run the backbone on a chunk and show the states entering each block."""
    mask = None if bool(chunk.real.all()) else chunk.real.to(backbone.device)
    backbone.visit(chunk.input_ids.to(backbone.device), range(backbone.num_blocks), show, attention_mask=mask)


def _states(backbone: Backbone, chunk: Chunk) -> dict[int, Tensor]:
    """States of the real tokens of a chunk, (tokens, d), by split."""
    found: dict[int, Tensor] = {}
    where = None if bool(chunk.real.all()) else chunk.real.flatten().nonzero().squeeze(1).to(backbone.device)

    def keep(split: int, state: Tensor) -> None:
        flat = state.flatten(0, 1)
        found[split] = flat if where is None else flat[where]

    _visit(backbone, chunk, keep)
    return found
