"""Parts of a decoder, run by the decoder's own forward.

A view is a shallow copy of the decoder module that shares every weight but holds another list of
blocks and, for a prefix, no final norm. Masks, positions, rotary tables, embedding scales and the
order of operations are the family's own code, so a split cannot differ from the whole. The user's
model is never touched: no hook is left on it, no attribute is exchanged, and threads do not meet.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dihal.backbone.layout import Layout

__all__ = ["prefix_view", "suffix_view"]


class _Skip(nn.Module):
    """Stands where a block below the split would be, so that the others keep their index."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden


class _Enter(nn.Module):
    """A block that is entered by a given state instead of what comes from below."""

    def __init__(self, block: nn.Module, state: Tensor):
        super().__init__()
        self.block = block
        self.state = state

    def forward(self, _: Tensor, *args: Any, **kwargs: Any) -> Any:
        # GPT-2 adds its positions to whatever enters the decoder: what comes from below is not the state.
        return self.block(self.state, *args, **kwargs)


class _Tap(nn.Module):
    """A block whose input is shown to a callback."""

    def __init__(self, block: nn.Module, show: Callable[[Tensor], None]):
        super().__init__()
        self.block = block
        self.show = show

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.show(hidden)
        return self.block(hidden, *args, **kwargs)


def _view(decoder: nn.Module, replaced: dict[str, nn.Module]) -> nn.Module:
    view = copy.copy(decoder)
    view.__dict__["_modules"] = {**decoder._modules, **replaced}
    # What was installed on the whole decoder must not run, or run the whole decoder, for a part of it.
    view.__dict__.pop("forward", None)
    view.__dict__["_compiled_call_impl"] = None
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        view.__dict__[hooks] = OrderedDict()
    return view


def prefix_view(
    decoder: nn.Module, layout: Layout, split: int, taps: dict[int, Callable[[Tensor], None]] | None = None
) -> nn.Module:
    """Embedding and blocks below ``split``; its first output is h^split.

    Args:
        decoder: the family's decoder module.
        layout: where its parts are.
        split: number of blocks that run.
        taps: for a block index below ``split``, who is shown the state entering that block.
    """
    taps = taps or {}
    blocks = list(getattr(decoder, layout.blocks))[:split]
    tapped = [_Tap(block, taps[index]) if index in taps else block for index, block in enumerate(blocks)]
    return _view(decoder, {layout.blocks: nn.ModuleList(tapped), layout.norm: nn.Identity()})


def suffix_view(decoder: nn.Module, layout: Layout, split: int, state: Tensor) -> nn.Module:
    """Blocks from ``split`` on and the final norm, entered by ``state``; to be run with ``inputs_embeds=state``."""
    blocks = list(getattr(decoder, layout.blocks))
    entered = [_Skip() for _ in range(split)] + [_Enter(blocks[split], state)] + blocks[split + 1 :]
    return _view(decoder, {layout.blocks: nn.ModuleList(entered)})
