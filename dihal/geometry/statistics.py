"""What is kept of one layer while the text streams by.

**Sinks.** Position 0 of each window, and tokens whose norm exceeds ``norm_factor`` times the
layer's median norm. The median is that of the *pilot*, the first windows drawn, so it is known
before the first token is accumulated, and is the same for every chunk size. (With fewer tokens
than a pilot it is the median of all.) Dropped tokens go to accumulators of their own: what they do
to the proxies is reported without a second pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dihal.config import ScoreConfig
from dihal.errors import UsageError
from dihal.geometry.moments import Moments, native_half, work_dtype

__all__ = ["LayerStatistics", "Seen", "rms_scale"]


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))


def rms_scale(norms: Float[Tensor, "tokens"], dim: int) -> Float[Tensor, "tokens"]:
    """Factor sqrt(d) / |h| that divides a token by its root mean square; a zero token stays zero."""
    # The smallest norm whose factor is a finite number: infinity times zero is none.
    return dim**0.5 / norms.clamp_min(dim**0.5 * torch.finfo(norms.dtype).tiny)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A chunk's states of one layer, and what the host must know before it can add them."""

    x: Tensor
    norms: Tensor
    dropped: Tensor
    """Dropped tokens first, in their order; on a CPU only they."""
    rows: Tensor
    slots: Tensor
    counts: Tensor
    """Finite, first, large but not first; on the host once ``known``."""
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
        self._median = torch.tensor(torch.nan)
        self._threshold = torch.tensor(torch.inf, dtype=torch.float64)
        self._drop_first = config.drop_first
        self._norm_factor = config.norm_factor
        self._pool_size = pool

    def prepare(
        self,
        states: list[Float[Tensor, "_ dim"]],
        first: list[Bool[Tensor, "_"]],
        there: Bool[Tensor, "_"] | None = None,
    ) -> None:
        """Fix threshold and shifts from the pilot's states. Call once, before :meth:`add`.

        Args:
            states: of the pilot's chunks.
            first: who is at position 0 of a window, on the host.
            there: the same in one, on the device of the states: then nothing in half precision waits for that.
        """
        norms = torch.cat([_norms(x) for x in states])
        others = len(norms) - sum(int(part.sum()) for part in first)
        leave_out = self._drop_first and others > 0
        outside = (torch.cat(first).to(norms.device) if there is None else there) if leave_out else None
        count = others if leave_out else len(norms)
        ascending = (norms if outside is None else norms.masked_fill(outside, torch.inf)).sort().values
        self._median = ascending[(count - 1) // 2]
        self._threshold = self._norm_factor * self._median.double()
        dim, dtype = states[0].shape[1], work_dtype(states[0].dtype, norms.device)
        shifts = {name: norms.new_zeros(dim) for name in ("raw", "rms")}
        if not native_half(dtype, norms.device):
            ordinary = torch.full_like(norms, not self._drop_first, dtype=torch.bool) if outside is None else ~outside
            shifts = self._shifts(torch.cat(states), norms, ordinary)
        self.kept = {name: Moments(shift, dtype) for name, shift in shifts.items()}
        # Few tokens are dropped: they wait until a product of them is worth a matrix. In fp64 it does not matter
        # which of them wait together, and so not how chunks are shared among processes.
        few = {"wait": dim} if norms.is_cuda else {}
        self.dropped = {name: Moments(m.shift, torch.float64, **few) for name, m in self.kept.items()}
        self.pool = states[0].new_zeros(self._pool_size, dim)
        self.pool_norms = norms.new_zeros(self._pool_size)

    def _shifts(self, states: Tensor, norms: Tensor, ordinary: Tensor) -> dict[str, Tensor]:
        """Mean of the pilot's kept tokens, raw and rms."""
        bad = int((~norms.isfinite()).sum())
        if bad:
            self._refuse(bad, len(states))
        kept = ordinary & (norms <= self._threshold)
        x, norms = states[kept], norms[kept]
        wide, count = x.to(norms.dtype), max(len(x), 1)
        return {"raw": wide.sum(0) / count, "rms": rms_scale(norms, x.shape[1]) @ wide / count}

    @property
    def pilot_median(self) -> float:
        """Median norm of the pilot's tokens; NaN before :meth:`prepare`."""
        return float(self._median)

    @property
    def threshold(self) -> float:
        """Norm above which a token is dropped."""
        return float(self._threshold)

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
    ) -> Seen:
        """First half of :meth:`add`: look at the tokens. Nothing waits for the device."""
        norms = _norms(x)
        first = first.to(x.device) if self._drop_first else torch.zeros_like(norms, dtype=torch.bool)
        large = norms > self._threshold
        # Norms are not negative: what is not below infinity is that or none. Few launches: there is one of each a chunk.
        counts = torch.stack([norms < torch.inf, first, large > first]).sum(1)
        dropped, known = first | large, None
        if x.is_cuda:
            # The host reads the counts when they are there; it does not wait for them with nothing begun behind them.
            dropped = dropped.to(torch.uint8).argsort(descending=True, stable=True)
            counts = torch.empty(3, dtype=torch.int64, pin_memory=True).copy_(counts, non_blocking=True)
            known = torch.cuda.current_stream(x.device).record_event()
        else:
            dropped = dropped.nonzero().squeeze(1)
        return Seen(x=x, norms=norms, dropped=dropped, rows=rows, slots=slots, counts=counts, known=known)

    def finish(self, seen: Seen) -> None:
        """Second half of :meth:`add`. On a GPU it is best called when more work has been begun, on the stream of :meth:`begin`.

        There dropped tokens are zeros in the states for as long as they are added, and then what they were.

        Raises:
            UsageError: NaN or infinity in the states.
        """
        if seen.known is not None:
            seen.known.synchronize()
        finite, dropped_first, dropped_norm = seen.counts.tolist()
        x, norms = seen.x, seen.norms
        if finite < len(x):
            self._refuse(len(x) - finite, len(x))
        self.tokens += len(x)
        self.dropped_first += dropped_first
        self.dropped_norm += dropped_norm
        self.pool.index_copy_(0, seen.slots, x.index_select(0, seen.rows))
        self.pool_norms.index_copy_(0, seen.slots, norms.index_select(0, seen.rows))
        where = seen.dropped[: dropped_first + dropped_norm]
        part = x.index_select(0, where) if len(where) else None
        if self.kept["raw"].unshifted:
            self._add_unshifted(x, where, part)
        else:
            self.kept["raw"].add_chosen(x, where)
            self.kept["rms"].add_chosen(x, where, rms_scale(norms, x.shape[1]))
            for moments in self.kept.values():
                moments.settle()
        if part is not None:
            self.dropped["raw"].add(part)
            self.dropped["rms"].add(part, rms_scale(norms.index_select(0, where), x.shape[1]))

    def _add_unshifted(self, x: Tensor, where: Tensor, part: Tensor | None) -> None:
        """Kept tokens in as few passes as there are: dropped ones become zeros, which stay zeros."""
        count, dim = x.shape[0] - where.shape[0], x.shape[1]
        # The blocks go on with the states themselves, on the same stream: what is theirs is back before they look. A copy
        # of all would be 134 MB a chunk of 8,192 tokens for a few rows.
        if part is not None:
            x.index_fill_(0, where, 0.0)
        self.kept["raw"].add_beside_zeros(x, count)
        # One kernel: mean square and quotient in fp32, rounded once.
        self.kept["rms"].add_beside_zeros(F.rms_norm(x, (dim,), eps=torch.finfo(torch.float32).tiny), count)
        if part is not None:
            x.index_copy_(0, where, part)

    def forget(self) -> None:
        """Give the memory back; another process has all of it."""
        del self.kept, self.dropped, self.pool, self.pool_norms

    @property
    def pool_kept(self) -> Bool[Tensor, "pool"]:
        """Pool tokens that this layer's sink policy keeps."""
        return self.pool_norms <= self._threshold
