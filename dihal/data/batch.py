"""What a data loader yields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from jaxtyping import Int
from torch import Tensor

from dihal.types import Mask, TokenIds

__all__ = ["Batch"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences with what is needed to count, mask and name them."""

    input_ids: TokenIds
    """Token ids, int64."""
    attention_mask: Mask
    """True for real tokens; training windows hold no padding."""
    document_ids: TokenIds
    """Index of each token's document in its split, int64; -1 at padding."""
    loss_mask: Mask
    """True where the next-token prediction *from* this position counts: the next token is in the window, belongs
    to the same document and is not padding."""
    sample_ids: Int[Tensor, "batch"]
    """Training: index of the sequence in the whole run (the key of its noise), int64. Evaluation: window index."""
    full: bool = False
    """No position is padding. Known on the host, so that nobody has to ask the device."""

    def __len__(self) -> int:
        """Number of sequences."""
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """Copy to a device. `non_blocking` needs pinned memory to overlap anything."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Copy into page-locked memory; called by the loader's pinning thread."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{name: function(v) if isinstance(v, Tensor) else v for name, v in values.items()})
