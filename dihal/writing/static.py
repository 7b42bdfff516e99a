"""Writing with keys and values in room of fixed size: on a GPU a block is one CUDA graph, and so is its being taken in.

All steps of a block are captured together: denoiser, solver, noise and, with projection, reading, drawing and encoding
again. Times of the steps and coefficients of the solver are numbers of the host and so constants of the graph; what
changes from block to block is copied in (tokens, masks, keys of the noise) or stands at a fixed address (positions,
keys and values of what is written). So a block costs one launch, and nothing waits for the device inside it.

Compiled, the blocks within are a third as many kernels (see `dihal.nn.compiled`).

Graphs, room and weights in bf16 are kept from one text to the next of the same writer and size, until weights change.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.func import functional_call

from dihal.backbone.cache import StaticBlockCache, query_groups, static_decoder
from dihal.backbone.views import prefix_view, suffix_view
from dihal.backbone.weights import attention_window
from dihal.errors import UsageError
from dihal.meter import Meter
from dihal.nn.cache import StaticDenoiserCache, StaticPlace
from dihal.nn.compiled import for_its_shapes
from dihal.spaces.simplex import SimplexSpace
from dihal.types import State, TokenIds
from dihal.writing import graphs
from dihal.writing.context import Context, Costs, Function

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.writer import Writer

__all__ = ["Room", "StaticContext", "reach_of", "room_of"]

_LEAST_REACH = 64


def reach_of(positions: int) -> int:
    """How many positions of the room a pass reads that needs so many: a few sizes, at most a quarter too much.

    Every size is a graph of its own, and every position read beyond the needed ones is read for nothing.
    """
    step = max(_LEAST_REACH, 2 ** (positions.bit_length() - 1) // 4)
    return step * math.ceil(positions / step)


def _versions(writer: Writer, backbone: Backbone) -> Hashable:
    """Changes with what graphs hold as addresses or as numbers: weights, and what is measured or computed from them."""
    own = [*writer.parameters(), *writer.buffers()]
    return (
        tuple((part.data_ptr(), 0 if part.is_inference() else part._version) for part in own),
        tuple(part.data_ptr() for part in backbone.model.parameters()),
    )


def _low_weights(network: nn.Module) -> dict[str, Tensor]:
    """Names of the denoiser's weights that autocast would cast in every pass, and room for them in bf16."""
    found = {}
    for layer, module in network.named_modules():
        if isinstance(module, nn.Linear):
            found |= {f"{layer}.{name}": weight for name, weight in module.named_parameters(recurse=False)}
    found.pop("head.bias", None)  # its dtype is that of the residual stream
    return {n: torch.empty_like(weight, dtype=torch.bfloat16, requires_grad=False) for n, weight in found.items()}


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """What a room is made for, beside its length."""

    batch: int
    branches: tuple[str, ...]
    precision: str
    compiled: bool


class Room:
    """What is kept from one text to the next: keys and values, graphs, and the denoiser's weights in bf16.

    Args:
        writer, backbone: not held.
        kind: batch, branches, precision, and whether passes run compiled.
        length: positions.
    """

    def __init__(self, writer: Writer, backbone: Backbone, *, kind: _Kind, length: int) -> None:
        self.place = StaticPlace(length, backbone.device)
        self.blocks = StaticBlockCache(self.place)
        self.caches = {name: StaticDenoiserCache(self.place) for name in kind.branches}
        self.last: Tensor | None = None
        """Features of the suffix at the last known column."""
        self.compiles = kind.compiled
        """Until something does not compile, or cannot be captured so."""
        recorder = graphs.recorder(backbone.device)
        self.graphs = None if recorder is None else graphs.Graphs(recorder, self.simpler)
        self.costs: dict[Hashable, Costs] = {}
        """What a function of :attr:`graphs` costs: a replay counts nothing."""
        # Blocks compiled in place by whoever trains would be compiled again for other weights.
        low = kind.precision == "bfloat16" and (kind.compiled or not writer.denoiser.compiled)
        self.weights = _low_weights(writer.denoiser) if low else {}
        self._made_for = (kind, _versions(writer, backbone))
        self._backbone = weakref.ref(backbone)

    def fits(self, writer: Writer, backbone: Backbone, *, kind: _Kind, length: int) -> bool:
        """Whether it can be used again."""
        wanted = (kind, _versions(writer, backbone))
        return self._backbone() is backbone and length <= self.place.length and wanted == self._made_for

    def simpler(self, error: RuntimeError) -> bool:
        """Compile nothing from now on, with a warning; False: nothing was compiled."""
        if not self.compiles:
            return False
        self.compiles = False
        self.set_compiled(False)
        reason = graphs.reason_of(error)
        warnings.warn(f"this cannot be a CUDA graph of compiled blocks, it runs uncompiled: {reason}", stacklevel=2)
        return True

    def set_compiled(self, on: bool) -> None:
        """Whether the passes that follow run compiled."""
        for held in (self.blocks, *self.caches.values()):
            held.compiled = on and self.compiles

    def refresh(self, writer: Writer) -> None:
        """Make the weights in bf16 those of now."""
        if self.weights:
            now = dict(writer.denoiser.named_parameters())
            torch._foreach_copy_(list(self.weights.values()), [now[name].detach() for name in self.weights])


_ROOMS: weakref.WeakKeyDictionary[Writer, Room] = weakref.WeakKeyDictionary()


def room_of(writer: Writer) -> Room | None:
    """What this writer has kept since its last text."""
    return _ROOMS.get(writer)


class StaticContext(Context):
    """A :class:`~dihal.writing.context.Context` whose passes have fixed addresses.

    Args:
        writer, backbone, batch, branches, reads_suffix, precision, costs: as there.
        room: columns there is room for.
        compiled: passes over as many columns as a block run compiled.

    Raises:
        UsageError: a backbone with sliding windows.
    """

    casts_once = False  # autocast's own copies would be gone when a graph that reads them is replayed

    def __init__(self, writer: Writer, backbone: Backbone, *, room: int, compiled: bool, **options: Any) -> None:
        super().__init__(writer, backbone, cached=True, **options)
        if any(math.isfinite(attention_window(backbone, block)) for block in range(backbone.num_blocks)):
            raise UsageError(
                f"room of fixed size has full attention only, and {backbone.reference.id!r} has windows: "
                "set writing.static to false."
            )
        kind = _Kind(batch=self.batch, branches=self.branches, precision=self.precision, compiled=compiled)
        size = {"kind": kind, "length": reach_of(room)}
        # Taken out while it is used: what a text that fails leaves behind is used by no other.
        kept = _ROOMS.pop(writer, None)
        reusable = kept is not None and kept.fits(writer, backbone, **size)
        self._room = kept if kept is not None and reusable else Room(writer, backbone, **size)
        self._room.refresh(writer)
        self._decoder = static_decoder(backbone.decoder, backbone.layout, self._room.blocks)
        self._groups = query_groups(backbone.config)
        self._mask: Tensor | None = None
        """Of the backbone's passes over the present columns: made once where they are captured together."""
        # Its noise comes from torch's generators, which are set from the host for every run of positions.
        self._by_pass = isinstance(writer.space, SimplexSpace)
        self._inside = False

    def close(self) -> None:
        """Keep the room for the next text."""
        _ROOMS[self.writer] = self._room

    def positions(self, count: int) -> Int[Tensor, "batch time"]:
        """Positions of the columns of this pass."""
        current = self._room.place.current
        assert len(current) == count, "a pass is over the columns that the room was moved to"
        return current[None].expand(self.batch, -1)

    def _keys(self, count: int) -> int:
        return self._room.place.reach  # a pass computes scores for all that it reads, and masks what is not there

    # -- what is captured

    def _move(self, count: int) -> None:
        self._room.place.reach = reach_of(self.length + count)
        self._room.place.span(self.length, count)

    def _captured(self, key: tuple[Hashable, ...], function: graphs.Function, *given: Tensor) -> tuple[Tensor, ...]:
        if self._inside:
            return function(*given)

        def fresh(*values: Tensor) -> tuple[Tensor, ...]:
            self._mask = None
            return function(*values)

        shapes = tuple((value.shape, value.dtype) for value in given)
        whole = (*key, shapes, self.length == 0, self._room.place.reach, self.reads_suffix)
        # The prompt is taken in once, at a length of its own: it is not compiled.
        self._room.set_compiled(key != ("extend",) or self.length > 0)
        try:
            found, once = self._counted(whole, fresh, *given)
        except RuntimeError as error:
            if not self._room.simpler(error):
                raise
            found, once = self._counted(whole, fresh, *given)
        self.costs.add(self._room.costs.setdefault(whole, once))
        return found

    def _counted(
        self, whole: tuple[Hashable, ...], function: graphs.Function, *given: Tensor
    ) -> tuple[tuple[Tensor, ...], Costs]:
        captures = self._room.graphs
        mine, self.costs, self._inside = self.costs, Costs(meter=Meter(self.backbone)), True
        try:
            found = function(*given) if captures is None else captures(whole, function, *given)
            return found, self.costs
        finally:
            self.costs, self._inside = mine, False

    def block(
        self, function: Callable[..., tuple[Tensor, ...]], depends: tuple[Hashable, ...], *given: Tensor
    ) -> tuple[Tensor, ...]:
        """One graph, from the second time on."""
        self._move(given[0].shape[1])
        if self._by_pass:
            return function(*given)
        return self._captured(("block", *depends), function, *given)

    def extend(self, tokens: TokenIds) -> None:
        """Take tokens in as known columns, in every row."""
        if tokens.shape[1] == 0:
            return
        self._move(tokens.shape[1])

        def take_in(tokens: Tensor) -> tuple[Tensor, ...]:
            self._take_in(tokens)
            return ()

        self._captured(("extend",), take_in, tokens)
        if self.reads_suffix:
            self._last = self._room.last
        self.length += tokens.shape[1]

    def _remember(self, last: State) -> None:
        if self._room.last is None:
            self._room.last = torch.empty_like(last)  # at the first call, before anything is captured
        self._room.last.copy_(last)
        self._last = self._room.last

    def compiled(self, function: Function) -> Function:
        """Compiled for its shapes, where the passes are."""
        return for_its_shapes(function) if self._room.blocks.compiled else function

    # -- passes

    def _pass(self, name: str, function: Callable[..., Tensor], *given: Tensor) -> Tensor:
        if not self._by_pass:
            return function(*given)
        (out,) = self._captured((name,), lambda *values: (function(*values),), *given)
        return out

    def _given(self, rows: int) -> dict[str, Any]:
        place = self._room.place
        if self._mask is None:
            seen = place.mask()
            # Added to the scores as it is: of truth values every block would make this again.
            mask = torch.zeros_like(seen, dtype=self.backbone.dtype).masked_fill_(~seen, -torch.inf)
            self._mask = mask.repeat(1, 1, self._groups, 1)
        return {
            "attention_mask": self._mask,
            "position_ids": place.current[None].expand(rows, -1),
            "past_key_values": self._room.blocks,
            "use_cache": True,
        }

    def _prefix(self, tokens: TokenIds, keep: bool) -> State:
        def run(tokens: Tensor) -> Tensor:
            view = prefix_view(self._decoder, self.backbone.layout, self.writer.split)
            return view(input_ids=tokens, **self._given(len(tokens)))[0]

        return self._pass("prefix", run, tokens)

    def _suffix(self, states: State, keep: bool) -> State:
        def run(states: Tensor) -> Tensor:
            view = suffix_view(self._decoder, self.backbone.layout, self.writer.split, states)
            return view(inputs_embeds=states, **self._given(len(states)))[0]

        return self._pass("suffix", run, states.to(self.backbone.dtype))

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
        def run(inputs: Tensor, t: Tensor, condition: Tensor, drop: Tensor, known: Tensor, *rest: Tensor) -> Tensor:
            named = {
                "position_ids": self._room.place.current[None].expand(len(inputs), -1),
                "drop_condition": drop,
                "known": known,
                "self_condition": rest[0] if rest else None,
                "cache": self._room.caches[branch],
            }
            return functional_call(self.writer.denoiser, self._room.weights, (inputs, t, condition), named)

        given = (inputs, t, condition, drop, known)
        return self._pass(f"denoiser {branch}", run, *given, *(() if previous is None else (previous,)))
