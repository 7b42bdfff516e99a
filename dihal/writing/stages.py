"""Spaces whose own parts are trained first (an autoencoder), within the same budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dihal.errors import UsageError
from dihal.spaces.base import Space

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.data import Batch

__all__ = ["Stages", "untouched"]


class Stages(nn.Module):
    """Knows which stage a space is in; a buffer, so that a resumed run knows it too."""

    done: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("done", torch.zeros((), dtype=torch.int64))
        self._done: bool | None = None
        self._held: list[Batch] = []

    def hold(self, space: Space, batches: Iterable[Batch]) -> None:
        """Keep the batches with which a space of two stages is measured again between them."""
        if space.stage_share() > 0 and not self._held:
            self._held = list(batches)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._done = None

    def first(
        self,
        space: Space,
        backbone: Backbone,
        progress: float,
        *,
        training: bool,
        begin: Callable[[list[Batch]], None],
    ) -> bool:
        """Whether the space's own parts are still trained. The first training step after them measures the space again.

        ``begin`` is then called with the batches it was measured on.

        Raises:
            UsageError: it cannot be measured again, because no batches were held.
        """
        share = space.stage_share()
        if share == 0.0:
            return False
        if self._done is None:  # the device is asked once
            self._done = bool(self.done)
        if self._done or not training or progress < share:
            return not self._done
        if not self._held:
            raise UsageError(
                "the second stage measures the space again and needs batches: call fit_normalisation (or, after a "
                "resume, fit_metric) before training."
            )
        space.refit(backbone, self._held)
        begin(self._held)
        self._held = []
        self._done = True
        self.done.fill_(1)
        return False


def untouched(module: nn.Module, space: Space) -> Float[Tensor, ""]:
    """Zero, with a gradient of zero for all that the first stage does not train.

    An optimiser's state is then complete from the first step, and no process waits for a gradient.
    """
    own = {id(parameter) for parameter in space.parameters()}
    rest = [p for p in module.parameters() if p.requires_grad and id(p) not in own]
    return torch.stack([parameter.sum() for parameter in rest]).sum() * 0.0
