"""Scoring (and evaluation) by several processes: each runs its share of the chunks; sums are added, layers are shared out.

The numbers are those of one process. A chunk is computed alike wherever it runs, its products are
added in fp64, and the pool is put together bit by bit; only the order of fp64 sums depends on the
number of processes (1e-15 relative).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dihal.config import BackboneConfig
from dihal.errors import UsageError

if TYPE_CHECKING:
    from dihal.geometry.moments import Moments
    from dihal.geometry.statistics import LayerStatistics

__all__ = ["Ranks", "joined", "on_own_device"]

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The processes that share the work; one by default.

    Attributes:
        rank: this process.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def owner(self, number: int) -> int:
        """Process that does the piece of work of this number."""
        return number % self.size

    def owns(self, number: int) -> bool:
        """Whether this process does it."""
        return self.owner(number) == self.rank

    def share(self, tensor: Tensor | None, owner: int, like: Tensor) -> Tensor:
        """The owner's tensor, everywhere; ``like`` tells the others its shape and type."""
        if self.size == 1:
            assert tensor is not None
            return tensor
        tensor = torch.empty_like(like) if tensor is None else tensor.contiguous()
        dist.broadcast(tensor, src=owner)
        return tensor

    def merge(self, layers: list[LayerStatistics]) -> None:
        """Bring each layer's statistics together on its owner; elsewhere the layer is emptied."""
        if self.size == 1:
            return
        for layer in layers:
            owner = self.owner(layer.split)
            self._merge(layer, owner)
            if owner != self.rank:
                layer.forget()

    def _merge(self, layer: LayerStatistics, owner: int) -> None:
        accumulators: list[Moments] = [*layer.kept.values(), *layer.dropped.values()]
        counts = [layer.tokens, layer.dropped_first, layer.dropped_norm, *(m.count for m in accumulators)]
        total = torch.tensor(counts, dtype=torch.int64, device=layer.pool.device)
        dist.all_reduce(total)
        layer.tokens, layer.dropped_first, layer.dropped_norm, *counts = total.tolist()
        for moments, count in zip(accumulators, counts, strict=True):
            if count:
                for part in moments.sums():
                    dist.reduce(part, dst=owner)
            moments.count = count
        # Every place of the pool was filled by one process and is zero elsewhere: bytes are added, nothing is rounded.
        for part in (layer.pool, layer.pool_norms):
            dist.reduce(part.view(torch.uint8), dst=owner)

    def gather(self, own: dict[int, Item], count: int) -> list[Item]:
        """Pieces 0 .. count - 1, everywhere, from those that each process owns."""
        if self.size == 1:
            return [own[number] for number in range(count)]
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, own)
        return [parts[self.owner(number)][number] for number in range(count)]


@contextlib.contextmanager
def joined() -> Iterator[tuple[Ranks, str | None]]:
    """Join the processes that torchrun started: (ranks, device of this one). Alone: (one rank, None).

    Raises:
        UsageError: fewer GPUs than processes on this machine.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        yield Ranks(), None
        return
    device = "cpu"
    if torch.cuda.is_available():
        local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= there:
            raise UsageError(
                f"process {local} of this machine has no GPU: there are {there}. Lower --nproc-per-node to that."
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    try:
        yield Ranks(rank=dist.get_rank(), size=dist.get_world_size()), device
    finally:
        dist.destroy_process_group()


def on_own_device(chosen: BackboneConfig, device: str | None) -> BackboneConfig:
    """Put the backbone on the device of this process; None: there is one process, which may choose.

    Raises:
        UsageError: one GPU is named for several processes.
    """
    if device is None:
        return chosen
    if chosen.device.startswith("cuda:"):
        raise UsageError(
            f"backbone.device={chosen.device} names one GPU, but there are several processes. Set backbone.device=auto: "
            "each process takes its own GPU."
        )
    return replace(chosen, device=device) if chosen.device in ("auto", "cuda") else chosen
