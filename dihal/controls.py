"""Controls: sources of h^l that nobody trained. They share the contract of :class:`dihal.methods.Method`."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from dihal.methods import positions_of
from dihal.spaces.hidden import HiddenSpace
from dihal.types import Padding, State, TokenIds

if TYPE_CHECKING:
    from dihal.backbone import Backbone

__all__ = ["Embedding", "Identity", "MeanState"]


class Identity(nn.Module):
    """The backbone's own prefix: the hybrid must equal the backbone exactly."""

    def __init__(self, split: int) -> None:
        super().__init__()
        self.split = split

    def new_cache(self, backbone: Backbone) -> Any:
        """Keys and values of the replaced blocks."""
        return backbone.new_cache(0, self.split)

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """The suffix as it is."""
        return contextlib.nullcontext()

    @torch.no_grad()
    def states(
        self,
        backbone: Backbone,
        input_ids: TokenIds,
        *,
        attention_mask: Padding | None = None,
        position_ids: Int[Tensor, "batch time"] | None = None,
        cache: Any = None,
        **_: Any,
    ) -> State:
        """h^l itself."""
        return backbone.prefix(
            input_ids, self.split, attention_mask=attention_mask, position_ids=position_ids, cache=cache
        )


class MeanState(nn.Module):
    """The same vector everywhere: the mean state (position 0 has its own mean)."""

    def __init__(self, space: HiddenSpace) -> None:
        super().__init__()
        self.split = space.split
        self.space = space

    def new_cache(self, backbone: Backbone) -> None:
        """Nothing to keep."""
        return None

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """The suffix as it is."""
        return contextlib.nullcontext()

    @torch.no_grad()
    def states(
        self,
        backbone: Backbone,
        input_ids: TokenIds,
        *,
        attention_mask: Padding | None = None,
        position_ids: Int[Tensor, "batch time"] | None = None,
        **_: Any,
    ) -> State:
        """E[h^l] at every position."""
        positions = _positions(input_ids, attention_mask, position_ids)
        z = torch.zeros(*input_ids.shape, self.space.dim, device=input_ids.device)
        return self.space.denormalise(z, positions).to(backbone.dtype)


class Embedding(nn.Module):
    """The token embeddings h^0, passed to block l as if the replaced blocks were not there."""

    def __init__(self, split: int) -> None:
        super().__init__()
        self.split = split

    def new_cache(self, backbone: Backbone) -> None:
        """Nothing to keep."""
        return None

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """The suffix as it is."""
        return contextlib.nullcontext()

    @torch.no_grad()
    def states(
        self,
        backbone: Backbone,
        input_ids: TokenIds,
        *,
        attention_mask: Padding | None = None,
        position_ids: Int[Tensor, "batch time"] | None = None,
        **_: Any,
    ) -> State:
        """h^0 in the place of h^l."""
        return backbone.embed(input_ids, position_ids=_positions(input_ids, attention_mask, position_ids))


def _positions(
    input_ids: TokenIds, attention_mask: Padding | None, position_ids: Int[Tensor, "batch time"] | None
) -> Int[Tensor, "batch time"]:
    if position_ids is not None:
        return position_ids
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    return positions_of(mask)[:, -input_ids.shape[1] :]
