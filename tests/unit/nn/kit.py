"""Tiny denoisers with weights away from their zero initialisation, so that every path carries signal."""

from __future__ import annotations

import torch

from dihal.config.method import DenoiserConfig
from dihal.nn import DenoiserTransformer

STATE, CONDITION = 12, 10


def tiny(seed=0, state_dim=STATE, condition_dim=CONDITION, *, output_dim=None, disturb=True, **options):
    torch.manual_seed(seed)
    config = DenoiserConfig(**({"width": 32, "depth": 2, "heads": 4} | options))
    model = DenoiserTransformer(config, state_dim, condition_dim, output_dim=output_dim).eval()
    if disturb:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def inputs(batch=2, time=7, seed=0, state_dim=STATE, condition_dim=CONDITION):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, time, state_dim, generator=generator),
        torch.rand(batch, generator=generator),
        torch.randn(batch, time, condition_dim, generator=generator),
    )
