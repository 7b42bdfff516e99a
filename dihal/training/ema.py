"""Exponential moving average of the trainable weights, and of nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dihal.errors import UsageError

__all__ = ["Ema", "ema_decay"]


def ema_decay(decay: float, updates: int) -> float:
    """Decay of update number ``updates`` (from 0): min(decay, (1 + n) / (10 + n)).

    The warm-up keeps the random initial weights from lingering in the average of a short run.
    """
    return min(decay, (1 + updates) / (10 + updates))


def _own(tensor: Tensor) -> Tensor:
    """What this rank holds: all of it, or its shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Ema:
    """fp32 average of a module's trainable parameters.

    Args:
        module: whose parameters are followed; the average starts as a copy of them.
        decay: largest decay per update, in [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._averages = [parameter.detach().float().clone() for parameter in self._parameters]

    def _follow_device(self) -> None:
        # Made before the strategy moves the module; parameters keep their identity when they move.
        if self._averages and self._averages[0].device != self._parameters[0].device:
            self._averages = [average.to(self._parameters[0].device) for average in self._averages]

    @torch.no_grad()
    def update(self) -> None:
        """average += (1 - decay) (parameter - average); call once per optimiser step."""
        self._follow_device()
        decay = ema_decay(self.decay, self.updates)
        current = [_own(parameter.detach()).float() for parameter in self._parameters]
        torch._foreach_lerp_([_own(average) for average in self._averages], current, 1.0 - decay)
        self.updates += 1

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """The module holds the average inside the block and its own weights after it."""
        self._follow_device()
        parameters = [_own(parameter.detach()) for parameter in self._parameters]
        own = [parameter.clone() for parameter in parameters]
        torch._foreach_copy_(parameters, [_own(average) for average in self._averages])
        try:
            yield
        finally:
            torch._foreach_copy_(parameters, own)

    def state_dict(self) -> dict[str, Tensor]:
        """Averages by parameter name, fp32."""
        self._follow_device()
        return dict(zip(self._names, self._averages))

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], *, updates: int) -> None:
        """Restore the averages; entries that are no parameter of the module (its buffers) are passed over.

        Raises:
            UsageError: an average is missing or has another shape.
        """
        self._follow_device()
        for name, average in zip(self._names, self._averages):
            if name not in state or state[name].shape != average.shape:
                raise UsageError(
                    f"the averaged weights of the checkpoint do not fit this method at {name!r}. "
                    "Resume with the method configuration of the checkpoint."
                )
            average.copy_(state[name])
        self.updates = updates
