"""What is written already: known columns, with the keys and values that backbone and denoiser keep of them.

A known position depends on nothing that comes after it: not in the frozen stack, which is causal, and not in the
denoiser, whose mask `mixed` hides unknown positions from known ones and which reads known states at t = 0, whatever
is being denoised. So known columns run once, and every later pass (of the denoiser, of the blocks that encode tokens
again, of the blocks that read states) runs over the columns being written alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dihal.meter import Meter
from dihal.nn.cache import DenoiserCache
from dihal.types import Mask, PerPosition, State, TokenIds

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.writer import Writer

__all__ = ["Context", "Costs"]

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(kw_only=True)
class Costs:
    """What writing has executed.

    Attributes:
        nfe: calls of the denoiser on unknown positions, guidance included; with blocks, summed over them.
        encodes: passes of tokens through the blocks below the split (or their embedding), without those of known text.
        reads: passes of states through the blocks from the split on, without those of known text.
        blocks: blocks written.
        meter: FLOPs of everything, known text included.
    """

    meter: Meter
    nfe: int = 0
    encodes: int = 0
    reads: int = 0
    blocks: int = 0

    def add(self, other: Costs) -> None:
        """Count what another one has counted, too."""
        self.meter.merge(other.meter.flops)
        self.nfe += other.nfe
        self.encodes += other.encodes
        self.reads += other.reads
        self.blocks += other.blocks


class Context:
    """Known columns 0 .. length - 1, and passes over the columns that follow.

    Args:
        writer: the method.
        backbone: the frozen model.
        batch: rows.
        cached: keep keys and values; off: every pass runs over all columns. The results agree up to rounding.
        branches: names of the denoiser's passes (one; two with guidance); ``"unconditional"`` sees nothing of what is known.
        reads_suffix: states are read by the frozen stack.
        precision: of the denoiser's products.
        costs: counters to add to.
    """

    casts_once = True
    """Weights cast by autocast are kept until the text is written."""

    def __init__(
        self,
        writer: Writer,
        backbone: Backbone,
        *,
        batch: int,
        cached: bool,
        branches: tuple[str, ...],
        reads_suffix: bool,
        precision: str,
        costs: Costs,
    ) -> None:
        self.writer = writer
        self.backbone = backbone
        self.batch = batch
        self.cached = cached
        self.branches = branches
        self.reads_suffix = reads_suffix
        self.precision = precision
        self.costs = costs
        self.length = 0
        split = writer.split
        self._tokens: list[Tensor] = []
        self._states: list[Tensor] = []
        self._inputs: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in branches}
        self._last: Tensor | None = None
        """Features of the suffix at the last known column: they predict the first unknown token."""
        if cached:
            self._prefix_cache = backbone.new_cache(0, split)
            self._suffix_cache = backbone.new_cache(split, backbone.num_blocks)
            self._denoiser_caches = {name: DenoiserCache() for name in branches}

    @property
    def needs_states(self) -> bool:
        """Whether h^split of tokens is needed at all, by the space or by the suffix."""
        return self.writer.space.needs_state() or self.reads_suffix

    def positions(self, count: int) -> Int[Tensor, "batch time"]:
        """Positions of the ``count`` columns that follow."""
        device = self.backbone.device
        return torch.arange(self.length, self.length + count, device=device).expand(self.batch, count)

    def _keys(self, count: int) -> int:
        return self.length + count

    # -- passes over the columns that follow, what is before them held in caches

    def _prefix(self, tokens: TokenIds, keep: bool) -> State:
        positions = self.positions(tokens.shape[1])
        out = self.backbone.prefix(tokens, self.writer.split, position_ids=positions, cache=self._prefix_cache)
        if not keep:
            self._prefix_cache.truncate(self.length)
        return out

    def _suffix(self, states: State, keep: bool) -> State:
        positions = self.positions(states.shape[1])
        out = self.backbone.suffix_features(states, self.writer.split, position_ids=positions, cache=self._suffix_cache)
        if not keep:
            self._suffix_cache.truncate(self.length)
        return out

    def _denoiser(
        self,
        branch: str,
        keep: bool,
        inputs: Tensor,
        t: Tensor,
        condition: Tensor,
        drop: Tensor,
        known: Tensor,
        previous: Tensor | None,
    ) -> Tensor:
        return self.writer.denoiser(
            inputs,
            t,
            condition,
            drop_condition=drop,
            known=known,
            self_condition=previous,
            cache=self._denoiser_caches[branch],
            keep=inputs.shape[1] if keep else 0,
        )

    # -- the same, counted

    def states(self, tokens: TokenIds, *, keep: bool = False) -> State | None:
        """h^split of tokens in the columns that follow, or None where nobody needs it; ``keep``: they are known now."""
        if not self.needs_states:
            return None
        backbone, split, count = self.backbone, self.writer.split, tokens.shape[1]
        meter = self.costs.meter
        if self.cached:
            out = self._prefix(tokens, keep)
            meter.prefix(split, batch=self.batch, new=count, keys=self._keys(count))
        else:
            whole = torch.cat([*self._tokens, tokens], dim=1)
            out = backbone.prefix(whole, split)[:, self.length :]
            meter.prefix(split, batch=self.batch, new=whole.shape[1])
        self.costs.encodes += not keep
        return out

    def features(self, states: State, *, keep: bool = False) -> State:
        """Features, before the head, that predict the tokens of the columns that follow, whose states these are.

        Column i is predicted from the states before it: from h_{i-1} on. Column 0 is predicted by nothing: zeros.
        """
        backbone, split, count = self.backbone, self.writer.split, states.shape[1]
        meter, adapters = self.costs.meter, tuple(self.writer.lora)
        with self.writer.reading():
            if self.cached:
                out = self._suffix(states, keep)
                meter.suffix(split, batch=self.batch, new=count, keys=self._keys(count), adapters=adapters)
            else:
                whole = torch.cat([*self._states, states.to(backbone.dtype)], dim=1)
                out = backbone.suffix_features(whole, split)[:, self.length :]
                meter.suffix(split, batch=self.batch, new=whole.shape[1], adapters=adapters)
        first = torch.zeros_like(out[:, :1]) if self._last is None else self._last
        if keep:
            self._remember(out[:, -1:])
        else:
            self.costs.reads += 1
        return torch.cat([first, out[:, :-1]], dim=1)

    def denoise(
        self,
        branch: str,
        inputs: Float[Tensor, "batch time input_dim"],
        t: PerPosition,
        condition: State,
        drop: Bool[Tensor, "batch time"],
        known: Mask,
        previous: Float[Tensor, "batch time input_dim"] | None,
        *,
        keep: bool = False,
    ) -> Float[Tensor, "batch time output_dim"]:
        """One call of the denoiser on the columns that follow, in fp32; ``keep``: they are known now, in every row.

        ``inputs``, ``condition``, ``drop`` and ``previous`` of known positions must be the same in every call.
        """
        denoiser, meter = self.writer.denoiser, self.costs.meter
        device, count = inputs.device, inputs.shape[1]
        low = torch.autocast(
            device.type,
            dtype=torch.bfloat16,
            enabled=self.precision == "bfloat16",
            cache_enabled=self.casts_once,
        )
        if self.cached:
            with low:
                out = self._denoiser(branch, keep, inputs, t, condition, drop, known, previous)
            meter.denoiser(denoiser, batch=self.batch, new=count, keys=self._keys(count), times=t.numel())
        else:
            held = self._inputs[branch]
            if keep:
                held.append((inputs, condition, drop))
                return inputs.new_zeros(
                    *inputs.shape[:2], denoiser.output_dim
                )  # nobody reads the output at known columns
            past = (self.batch, self.length)
            joined = [torch.cat(parts, dim=1) for parts in zip(*held, (inputs, condition, drop), strict=True)]
            t = torch.cat([t.new_zeros(past), t], dim=1)
            known = torch.cat([known.new_ones(past), known], dim=1)
            if previous is not None:
                previous = torch.cat([previous.new_zeros(*past, previous.shape[-1]), previous], dim=1)
            with low:
                out = denoiser(joined[0], t, joined[1], drop_condition=joined[2], known=known, self_condition=previous)
            meter.denoiser(denoiser, batch=self.batch, new=t.shape[1], times=t.numel())
            out = out[:, self.length :]
        self.costs.nfe += not keep
        return out.float()

    def _remember(self, last: State) -> None:
        self._last = last

    def compiled(self, function: Function) -> Function:
        """A function of a module's top level, compiled where passes are."""
        return function

    def block(
        self, function: Callable[..., tuple[Tensor, ...]], depends: tuple[Hashable, ...], *given: Tensor
    ) -> tuple[Tensor, ...]:
        """Call what denoises the columns that follow.

        Args:
            function: reads of what changes from block to block only ``given`` and what is asked of this context.
            depends: everything else that its outputs depend on.
            given: tensors, the first of shape (batch, columns).
        """
        return function(*given)

    def extend(self, tokens: TokenIds) -> None:
        """Take tokens in as known columns, in every row."""
        if tokens.shape[1] == 0:
            return
        states = self._take_in(tokens)
        if not self.cached:
            self._tokens.append(tokens)
            if states is not None:
                self._states.append(states)
        self.length += tokens.shape[1]

    def close(self) -> None:
        """The text is written."""

    def _take_in(self, tokens: TokenIds) -> State | None:
        """Keys, values and last features of known columns; returns their states."""
        count = tokens.shape[1]
        writer, space = self.writer, self.writer.space
        positions = self.positions(count)
        states = self.states(tokens, keep=True)
        if self.reads_suffix:
            self.features(states, keep=True)
        clean = space.encode(self.backbone, tokens, position_ids=positions, state=states)
        self.costs.meter.space(space, "encode", batch=self.batch, new=count)
        condition = writer.condition(self.backbone, tokens, positions)
        known = torch.ones_like(tokens, dtype=torch.bool)
        t = torch.zeros_like(known, dtype=torch.float32)
        for branch in self.branches:
            blind = branch == "unconditional"
            inputs = space.known_input(clean)
            inputs = torch.zeros_like(inputs) if blind else inputs
            drop = torch.full_like(known, blind)
            self.denoise(branch, inputs, t, condition, drop, known, None, keep=True)
        return states
