"""Parameters and floating-point operations of a network."""

from __future__ import annotations

from typing import Any

from torch import nn

from dihal.config.method import DenoiserConfig
from dihal.nn.layers import FEATURES, mlp_width
from dihal.nn.transformer import check_denoiser, time_channels

__all__ = ["count_parameters", "flops_per_token", "parameter_groups"]


def count_parameters(module: nn.Module, *, trainable_only: bool = True) -> int:
    """Return the number of parameters, each counted once; frozen ones only if asked for."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable_only)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW groups of the trainable parameters, in the module's own order.

    Weight decay is for matrices; vectors (norm scales, biases, the null condition) and embedding
    tables have none. An empty group is left out.
    """
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    matrices, others = [], []
    for parameter in module.parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and id(parameter) not in tables
            (matrices if decays else others).append(parameter)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def flops_per_token(
    config: DenoiserConfig,
    state_dim: int,
    condition_dim: int | None,
    context: int,
    *,
    output_dim: int | None = None,
    time_per_position: bool = False,
) -> float:
    """Return forward FLOPs per position of a sequence of ``context`` positions.

    Args:
        config: shape and mask.
        state_dim, condition_dim, output_dim: channels, as given to the network.
        context: positions of the sequence.
        time_per_position: a time for each position (regime `generate`) rather than one per sequence; time
            embedding and modulation then run for each position.

    A multiply-add counts as two. Matrix products only. Causal attention counts the (context + 1) / 2
    keys that a query sees on average, the other masks all of them. The backward pass costs about
    twice this.

    Raises:
        UsageError: a shape that cannot be built.
    """
    check_denoiser(config)
    width, time_dim = config.width, time_channels(config.width)
    adaptive = config.norm == "adaptive"
    inputs = state_dim * (1 + (config.self_conditioning > 0)) + (condition_dim or 0)
    per_block = 4 * width * width + 3 * width * mlp_width(width, config.mlp_ratio)
    seen = (context + 1) / 2 if config.mask == "causal" else context
    attention = 2 * seen * width
    outputs = state_dim if output_dim is None else output_dim
    per_position = (
        inputs * width + config.depth * (per_block + attention) + width * outputs + (condition_dim or 0) * outputs
    )
    modulated = time_dim * width * (6 * config.depth + 2) if adaptive else time_dim * width
    per_time = FEATURES * time_dim + time_dim * time_dim + modulated
    return 2.0 * (per_position + (per_time if time_per_position else per_time / context))
