"""Tiny models in float64, and random pairs of prompts for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dihal.circuits.types import Attention, PairBatch
from tests.kit import tiny_model


def exact_norms(model: Any) -> Any:
    """The model in float64; the library's RMSNorm computes in float32 whatever it is given."""

    def forward_of(module: Any) -> Any:
        def forward(x: Tensor) -> Tensor:
            scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
            return module.weight * (x * scale)

        return forward

    for module in model.double().modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = forward_of(module)
    return model


def float64_model(family: str = "llama", *, layers: int = 3, **sizes: Any) -> Any:
    return exact_norms(tiny_model(family, num_blocks=layers, **sizes))


def random_pairs(
    n: int = 3, time: int = 7, *, targets: int = 1, seed: int = 0, attention: Attention = "causal", first_id: int = 0
) -> PairBatch:
    """Random prompts, corrupted at one position, read at the last ones."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randint(3, 97, shape, generator=generator)

    clean = draw(n, time)
    corrupted = clean.clone()
    corrupted[:, 2] = (clean[:, 2] - 3 + draw(n) % 90 + 1) % 94 + 3
    return PairBatch(
        clean,
        corrupted,
        torch.arange(time - targets, time).expand(n, targets),
        draw(n, targets, 1),
        draw(n, targets, 1),
        torch.full((n, targets), 1 / targets),
        attention,
        torch.arange(first_id, first_id + n),
    )
