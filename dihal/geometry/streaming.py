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
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dihal.config import ScoreConfig
from dihal.errors import UsageError
from dihal.geometry.moments import Moments, work_dtype
from dihal.geometry.parallel import LayerMap, layer_workers
from dihal.geometry.windows import Chunk, Draw, plan_chunks

if TYPE_CHECKING:
    from dihal.backbone import Backbone

__all__ = ["LayerStatistics", "rms_scale", "stream_statistics"]


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))


def rms_scale(norms: Float[Tensor, "tokens"], dim: int) -> Float[Tensor, "tokens"]:
    """Factor sqrt(d) / |h| that divides a token by its root mean square; a zero token stays zero."""
    return dim**0.5 / norms.clamp_min(torch.finfo(norms.dtype).tiny)


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
        self.dropped = {"raw": Moments(raw, dtype), "rms": Moments(rms, dtype)}
        self.pool = x.new_zeros(self._pool_size, x.shape[1])
        self.pool_norms = norms.new_zeros(self._pool_size)

    def _checked_norms(self, x: Tensor) -> Tensor:
        norms = _norms(x)
        bad = int((~norms.isfinite()).sum())
        if bad:
            raise UsageError(
                f"the states of split {self.split} hold NaN or infinity in {bad} of {len(x)} tokens of a chunk. "
                "Load the backbone with dtype float32 or bfloat16, or check its weights."
            )
        return norms

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
        norms = self._checked_norms(x)
        self.tokens += len(x)
        self.pool[slots] = x[rows]
        self.pool_norms[slots] = norms[rows]
        first = first.to(x.device) if self._drop_first else torch.zeros_like(norms, dtype=torch.bool)
        large = norms > self.threshold
        self.dropped_first += int(first.sum())
        self.dropped_norm += int((large & ~first).sum())
        dropped = first | large
        scale = rms_scale(norms, x.shape[1])
        for accumulators, chosen in ((self.kept, ~dropped), (self.dropped, dropped)):
            where = chosen.nonzero().squeeze(1)
            part = x.index_select(0, where)
            accumulators["raw"].add(part)
            accumulators["rms"].add(part, scale[where])

    @property
    def pool_kept(self) -> Bool[Tensor, "pool"]:
        """Pool tokens that this layer's sink policy keeps."""
        return self.pool_norms <= self.threshold


def _consume(
    layers: list[LayerStatistics], chunk: Chunk, states: dict[int, Tensor], pool: Tensor, over: LayerMap
) -> None:
    slots = torch.searchsorted(pool, chunk.index).clamp_max(len(pool) - 1)
    rows = (pool[slots] == chunk.index).nonzero().squeeze(1)
    slots = slots[rows]
    for _ in over(lambda layer: layer.add(states.pop(layer.split), chunk.first, rows, slots), layers):
        pass


def stream_statistics(
    backbone: Backbone,
    draw: Draw,
    pool: Int[Tensor, "pool"],
    config: ScoreConfig,
    advance: Callable[[int], None] | None = None,
) -> list[LayerStatistics]:
    """Run the backbone without its head and collect the statistics of h^0 .. h^(L-1).

    Args:
        backbone: the frozen LM.
        draw: the scored tokens.
        pool: indices of the pool among them, ascending.
        config: chunk size and sink policy.
        advance: called with the number of tokens of each chunk done.

    Raises:
        UsageError: NaN or infinity in the states of a layer.
    """
    layers = [LayerStatistics(split, len(pool), config) for split in range(backbone.num_blocks)]
    plan = plan_chunks(draw, config.batch_tokens)
    waiting: list[tuple[Chunk, dict[int, Tensor]]] = []

    def prepare(layer: LayerStatistics) -> None:
        layer.prepare([held[layer.split] for _, held in waiting], [done.first for done, _ in waiting])

    with layer_workers(backbone.device) as over:
        for number, chunk in enumerate(plan):
            waiting.append((chunk, _states(backbone, chunk)))
            if chunk.pilot and number + 1 < len(plan) and plan[number + 1].pilot:
                continue
            if chunk.pilot:
                list(over(prepare, layers))
            for done, held in waiting:
                _consume(layers, done, held, pool, over)
                if advance is not None:
                    advance(len(done.index))
            waiting.clear()
    return layers


@torch.no_grad()
def _states(backbone: Backbone, chunk: Chunk) -> dict[int, Tensor]:
    """States of the real tokens of a chunk, (tokens, d), by split."""
    full = bool(chunk.real.all())
    ids = chunk.input_ids.to(backbone.device)
    mask = None if full else chunk.real.to(backbone.device)
    states = backbone.states(ids, range(backbone.num_blocks), attention_mask=mask)
    if mask is None:
        return {split: state.flatten(0, 1) for split, state in states.items()}
    where = mask.flatten().nonzero().squeeze(1)
    return {split: states.pop(split).flatten(0, 1)[where] for split in list(states)}
