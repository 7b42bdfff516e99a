"""Writing with keys and values in room of fixed size: on a GPU every pass is a CUDA graph.

At small batch a pass over a block is bound by reading weights once; thousands of kernels started one by one from
Python take several times that. The columns being written lie at the same addresses in every evaluation of a block,
and in every block of the same size, so that a pass is captured once and replayed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dihal.backbone.cache import StaticBlockCache
from dihal.backbone.views import prefix_view, suffix_view
from dihal.backbone.weights import attention_window
from dihal.errors import UsageError
from dihal.nn.cache import StaticDenoiserCache, StaticPlace
from dihal.types import State, TokenIds
from dihal.writing.context import Context

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.writer import Writer

__all__ = ["StaticContext"]

_WARM = 2  # passes before capture: libraries make their handles and workspaces


class _Captured:
    """A function of tensors: run as it is at first, captured at the second call, replayed from then on.

    What comes once (the text given, the last short block) is not worth a capture.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._called = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor | None] = []
        self._output: Tensor | None = None

    def __call__(self, *given: Tensor | None) -> Tensor:
        if not self._called:
            self._called = True
            return self._function(*given)
        if self._graph is None:
            self._capture(given)
        for held, value in zip(self._inputs, given, strict=True):
            if held is not None:
                held.copy_(value)
        assert self._graph is not None
        assert self._output is not None
        self._graph.replay()
        return self._output.clone()  # the next replay writes over it

    def _capture(self, given: tuple[Tensor | None, ...]) -> None:
        self._inputs = [None if value is None else value.clone() for value in given]
        device = next(value.device for value in self._inputs if value is not None)
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(_WARM):
                self._function(*self._inputs)
        torch.cuda.current_stream(device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = self._function(*self._inputs)


class StaticContext(Context):
    """A :class:`~dihal.writing.context.Context` whose passes have fixed addresses.

    Args:
        writer, backbone, batch, branches, reads_suffix, precision, costs: as there.
        room: columns there is room for.
        graph: capture passes; None: on CUDA.

    Raises:
        UsageError: a backbone with sliding windows; a graph without CUDA.
    """

    def __init__(
        self, writer: Writer, backbone: Backbone, *, room: int, graph: bool | None = None, **options: Any
    ) -> None:
        super().__init__(writer, backbone, cached=True, **options)
        on_cuda = backbone.device.type == "cuda"
        if graph and not on_cuda:
            raise UsageError(f"a CUDA graph needs a CUDA device, the backbone is on {backbone.device}.")
        if any(math.isfinite(attention_window(backbone, block)) for block in range(backbone.num_blocks)):
            raise UsageError(
                f"room of fixed size has full attention only, and {backbone.reference.id!r} has windows: "
                "set writing.static to false."
            )
        self._graphs = on_cuda if graph is None else graph
        self._place = StaticPlace(room, backbone.device)
        self._blocks = StaticBlockCache(self._place)
        self._caches = {name: StaticDenoiserCache(self._place) for name in self.branches}
        self._captured: dict[tuple[Any, ...], _Captured] = {}

    def _keys(self, count: int) -> int:
        return self._place.length  # a pass computes scores for all of the room, and masks what is not there

    def _run(self, name: str, function: Callable[..., Tensor], *given: Tensor | None) -> Tensor:
        count = next(value for value in given if value is not None).shape[1]
        self._place.span(self.length, count)
        if not self._graphs:
            return function(*given)
        key = (name, *(None if value is None else (value.shape, value.dtype) for value in given))
        if key not in self._captured:
            self._captured[key] = _Captured(function)
        return self._captured[key](*given)

    def _given(self, rows: int) -> dict[str, Any]:
        place = self._place
        return {
            "attention_mask": place.mask(),
            "position_ids": place.current[None].expand(rows, -1),
            "past_key_values": self._blocks,
            "use_cache": True,
        }

    def _prefix(self, tokens: TokenIds, keep: bool) -> State:
        def run(tokens: Tensor) -> Tensor:
            view = prefix_view(self.backbone.decoder, self.backbone.layout, self.writer.split)
            return view(input_ids=tokens, **self._given(len(tokens)))[0]

        return self._run("prefix", run, tokens)

    def _suffix(self, states: State, keep: bool) -> State:
        def run(states: Tensor) -> Tensor:
            view = suffix_view(self.backbone.decoder, self.backbone.layout, self.writer.split, states)
            return view(inputs_embeds=states, **self._given(len(states)))[0]

        return self._run("suffix", run, states.to(self.backbone.dtype))

    def _denoiser(self, branch: str, keep: bool, *given: Tensor | None) -> Tensor:
        def run(inputs: Tensor, *rest: Tensor | None) -> Tensor:
            t, condition, drop, known, previous = rest
            return self.writer.denoiser(
                inputs,
                t,
                condition,
                position_ids=self._place.current[None].expand(len(inputs), -1),
                drop_condition=drop,
                known=known,
                self_condition=previous,
                cache=self._caches[branch],
            )

        return self._run(f"denoiser {branch}", run, *given)
