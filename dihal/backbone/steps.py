"""A batch that passes one block at a time: so that several can pass a block before any of them passes the next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from dihal.backbone.checks import require_held, require_token_ids
from dihal.backbone.views import _view
from dihal.errors import UsageError
from dihal.types import State, TokenIds

if TYPE_CHECKING:
    from dihal.backbone.model import Backbone

__all__ = ["Walk"]


class _Record(nn.Module):
    """Stands where a block is, and notes what it would have been called with beside the state."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def forward(self, hidden: Tensor, *arguments: Any, **named: Any) -> Tensor:
        self.arguments = (arguments, named)
        return hidden


class Walk:
    """The states of a batch, h^0 first, each from the one before; without gradients. Final.

    The decoder's own forward runs once, with no block in it: masks, positions and rotary tables are what it gives each
    block, so states are those of one pass. To make them for every block anew, some decoders wait for the device.

    Args:
        backbone: the frozen LM.
        input_ids: (batch, time).
        attention_mask: padding.

    Attributes:
        split: l, the number of blocks passed.
        state: h^l, (batch, time, d).

    Raises:
        UsageError: ids or mask that do not fit; blocks below L-1 that are not loaded.
    """

    def __init__(
        self, backbone: Backbone, input_ids: TokenIds, attention_mask: Shaped[Tensor, "batch time"] | None = None
    ) -> None:
        require_token_ids(input_ids, backbone.vocab_size)
        require_held(backbone.held, backbone.num_blocks - 1)
        self.split = 0
        self._blocks = backbone.blocks[: backbone.num_blocks - 1]
        self._records = [_Record() for _ in self._blocks]
        parts = {backbone.layout.blocks: nn.ModuleList(self._records), backbone.layout.norm: nn.Identity()}
        view = _view(backbone.decoder, parts)
        shape = (input_ids.shape[0], input_ids.shape[1])
        with torch.no_grad():
            self.state: State = backbone._run(view, shape, attention_mask, None, None, input_ids=input_ids)

    def step(self) -> State:
        """Pass the next block; h^(l+1).

        Raises:
            UsageError: after h^(L-1).
        """
        if self.split == len(self._blocks):
            raise UsageError(f"the walk has come to h^{self.split}, the last state that enters a block.")
        arguments, named = self._records[self.split].arguments
        with torch.no_grad():
            output = self._blocks[self.split](self.state, *arguments, **named)
        # Some families' blocks return more beside the state.
        self.state = output[0] if isinstance(output, tuple) else output
        self.split += 1
        return self.state
