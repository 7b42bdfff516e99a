"""Greedy decoding with caches of fixed size: on a GPU one CUDA graph per token.

At small batch a token of an 8B model is bound by reading its weights once, a few milliseconds; thousands
of kernels started one by one from Python take several times that. With keys and values in room of fixed
size, and the position in a tensor, every token runs the same kernels on the same addresses: they are
captured once and replayed.

For the hybrid and for the backbone itself alike, so that the two can be compared. `generate()` of the
hybrid stays the general way: sampling, padding, beams, end tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from dihal.backbone.cache import StaticBlockCache
from dihal.backbone.views import suffix_view
from dihal.backbone.weights import attention_window
from dihal.errors import UsageError
from dihal.method_parts import StaticSamplingCache
from dihal.nn.cache import StaticPlace
from dihal.types import State, TokenIds

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.methods import Method

__all__ = ["StaticDecoder"]

_WARM = 3  # passes before capture: libraries make their handles and workspaces


class StaticDecoder:
    """Writes the most likely continuation of prompts of one length.

    Args:
        backbone: the frozen model.
        method: a trained bridge of the regime `replace`; None: the backbone by itself.
        batch: prompts written at a time.
        length: positions there is room for, prompt and continuation.
        steps, sampler: of the bridge; None: its own.
        graph: capture a token as a CUDA graph; None: on CUDA.

    Raises:
        UsageError: a backbone with sliding windows, a graph without CUDA.
    """

    def __init__(
        self,
        backbone: Backbone,
        method: Method | None = None,
        *,
        batch: int,
        length: int,
        steps: int | None = None,
        sampler: str | None = None,
        graph: bool | None = None,
    ) -> None:
        on_cuda = backbone.device.type == "cuda"
        if graph and not on_cuda:
            raise UsageError(
                f"a CUDA graph needs a CUDA device, the backbone is on {backbone.device}. Give graph=False."
            )
        if any(math.isfinite(attention_window(backbone, block)) for block in range(backbone.num_blocks)):
            raise UsageError(f"a cache of fixed size has full attention only, {backbone.reference.id!r} has windows.")
        self.backbone, self.method = backbone, method
        self.batch, self.length = batch, length
        self.steps, self.sampler = steps, sampler
        self._place = StaticPlace(length, backbone.device)
        self._blocks = StaticBlockCache(self._place)
        self._bridge = StaticSamplingCache(self._place)
        self._token = torch.zeros(batch, 1, dtype=torch.int64, device=backbone.device)
        self._graphed = on_cuda if graph is None else graph
        self._graph: torch.cuda.CUDAGraph | None = None

    def _features(self, input_ids: TokenIds) -> State:
        """After the final norm, (batch, new, d)."""
        backbone, place = self.backbone, self._place
        positions = place.current[None].expand(input_ids.shape[0], -1)
        given = {
            "attention_mask": place.mask(),
            "position_ids": positions,
            "past_key_values": self._blocks,
            "use_cache": True,
        }
        if self.method is None:
            return backbone.decoder(input_ids=input_ids, **given)[0]
        state = self.method.states(
            backbone,
            input_ids,
            position_ids=positions,
            steps=self.steps,
            sampler=self.sampler,
            cache=self._bridge,
        )
        with self.method.reading():
            view = suffix_view(backbone.decoder, backbone.layout, self.method.split, state)
            return view(inputs_embeds=state, **given)[0]

    def _next(self, input_ids: TokenIds) -> Int[Tensor, "batch 1"]:
        return self.backbone.head(self._features(input_ids)[:, -1:]).argmax(-1)

    def _one(self) -> None:
        """One token: reads and writes tensors at fixed addresses only."""
        self._token.copy_(self._next(self._token))
        self._place.next.add_(1)

    def _capture(self) -> Callable[[], None]:
        if not self._graphed:
            return self._one
        if self._graph is None:
            token, position = self._token.clone(), self._place.next.clone()

            def back() -> None:
                self._token.copy_(token)
                self._place.next.copy_(position)

            # The keys that these passes write are written again, with the same values, by the real ones.
            side = torch.cuda.Stream(self.backbone.device)
            side.wait_stream(torch.cuda.current_stream(self.backbone.device))
            with torch.cuda.stream(side):
                for _ in range(_WARM):
                    self._one()
                    back()
            torch.cuda.current_stream(self.backbone.device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._one()
            back()
            self._graph = graph
        return self._graph.replay

    @torch.no_grad()
    def prefill(self, input_ids: Int[Tensor, "batch prompt"]) -> None:
        """Read the prompts; the first token of their continuations is then known.

        Raises:
            UsageError: another batch, or longer than the room.
        """
        batch, time = input_ids.shape
        if batch != self.batch or not 0 < time < self.length:
            raise UsageError(
                f"prompts of shape {tuple(input_ids.shape)}, but this decoder was made for a batch of {self.batch} and "
                f"{self.length} positions. Make another one."
            )
        self._place.prompt(time)
        self._token.copy_(self._next(input_ids.to(self.backbone.device)))
        self._place.token()
        self._place.next.fill_(time)
        self._filled = time

    @torch.no_grad()
    def write(self, new_tokens: int) -> Int[Tensor, "batch new"]:
        """The next tokens after :meth:`prefill`, or after what was written last.

        Raises:
            UsageError: more than there is room for.
        """
        if self._filled + new_tokens > self.length:
            raise UsageError(f"{self.length} positions, {self._filled + new_tokens} are needed. Make a longer decoder.")
        step = self._capture()
        written = torch.empty(self.batch, new_tokens, dtype=torch.int64, device=self.backbone.device)
        for number in range(new_tokens):
            written[:, number] = self._token[:, 0]
            step()
        self._filled += new_tokens
        return written
