"""FSDP2: weights, gradients, optimiser and average of the denoiser in shards, for bridges that do not fit.

``fully_shard`` (Zhao et al. 2023, in PyTorch's second form) gathers a block's weights when it runs.
Everything else that trains (adapters, learned schedules) is small, stays whole on every rank, and its
gradients are averaged here. Checkpoints hold whole tensors: they fit any number of ranks and either
strategy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import get_total_norm

__all__ = [
    "ShardedStrategy",
    "apart",
    "average_rest",
    "clip",
    "gradient_norm",
    "scattered",
    "shard",
    "unsynchronised",
    "whole",
]


class ShardedStrategy(DDPStrategy):
    """Processes and their group as for DDP, without its wrapper: the module has sharded itself."""

    def configure_ddp(self) -> None:
        """Nothing to wrap."""


def shard(method: nn.Module) -> None:
    """Shard the denoiser, block by block. Parameters become other objects: whoever holds the old ones is outdated.

    Args:
        method: has a ``denoiser`` with ``blocks``; on the device of this rank, alike on all ranks.
    """
    from torch.distributed.fsdp import fully_shard

    denoiser: Any = method.denoiser
    # The outermost part as well gives its weights back after a forward pass: validation changes them in between.
    for part in (*denoiser.blocks, denoiser):
        fully_shard(part, reshard_after_forward=True)


@contextlib.contextmanager
def unsynchronised(method: nn.Module) -> Iterator[None]:
    """Gradients of this micro-batch are kept, not reduced."""
    denoiser: Any = method.denoiser
    denoiser.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        denoiser.set_requires_gradient_sync(True)


def average_rest(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of parameters that are not sharded."""
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    if gradients:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        torch._foreach_copy_(
            gradients, [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in gradients]), gradients)]
        )


def apart(optimizer: torch.optim.Optimizer) -> None:
    """Split groups that hold both kinds of parameters: an update of many tensors at once takes one kind only."""
    groups = []
    for group in optimizer.param_groups:
        for kind in (True, False):
            parameters = [p for p in group["params"] if isinstance(p, DTensor) == kind]
            if parameters:
                groups.append({**group, "params": parameters})
    optimizer.param_groups[:] = groups


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """Norm of sharded and whole gradients together, the same on every rank."""
    sharded = [g for g in gradients if isinstance(g, DTensor)]
    rest = [g for g in gradients if not isinstance(g, DTensor)]
    norms = [get_total_norm(part) for part in (sharded, rest) if part]
    return torch.linalg.vector_norm(torch.stack([whole(norm) for norm in norms]))


def clip(gradients: list[Tensor], largest: float, norm: Tensor) -> None:
    """Scale gradients so that their norm is at most ``largest``."""
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    torch._foreach_mul_(local, (largest / (norm + 1e-6)).clamp(max=1.0))


def whole(tensor: Tensor) -> Tensor:
    """The tensor behind its shards; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def scattered(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors sharded as their counterparts; those without a sharded one stay as they are.

    Args:
        tensors: by parameter name, or by parameter name, ``/`` and the name of an optimiser's state.
        like: parameters by name.
    """
    found = {}
    for name, tensor in tensors.items():
        parameter = like.get(name.split("/")[0])
        if isinstance(parameter, DTensor) and tensor.ndim:
            # Every rank holds the whole tensor and takes its share: nothing is sent.
            placed = tensor.to(parameter.device_mesh.device_type)
            tensor = distribute_tensor(placed, parameter.device_mesh, parameter.placements, src_data_rank=None)
        found[name] = tensor
    return found
