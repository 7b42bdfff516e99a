"""What a run would cost, before it runs: parameters, steps, FLOPs, memory."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from dihal.backbone import Backbone
from dihal.config import TrainConfig
from dihal.config.cli import dump
from dihal.errors import UsageError
from dihal.masked import MaskedLM
from dihal.meter import Meter
from dihal.methods import AnyMethod
from dihal.nn import count_parameters
from dihal.training.budget import Plan, Spent
from dihal.training.memory import Memory, estimate_memory, reads_suffix

__all__ = ["Memory", "estimate_memory", "flops_per_token", "parameters", "print_plan", "require_affordable"]

_GIB = 1 << 30


def parameters(backbone: Backbone, method: AnyMethod) -> dict[str, int]:
    """Trainable and frozen parameters; the frozen ones are the backbone's."""
    return {
        "trainable_parameters": count_parameters(method),
        "frozen_parameters": backbone.parameter_count(),
    }


def flops_per_token(config: TrainConfig, backbone: Backbone, method: AnyMethod) -> dict[str, float]:
    """FLOPs of one denoised position in training by part of ``dihal.meter.PARTS``, counted as training counts them.

    Exact under `replace` where the suffix is read from the start, else with the mean over the run. Under `generate`
    the space's own products are left out.
    """
    objective, batch, length = config.method.objective, config.data.batch_size, config.data.sequence_length
    if isinstance(method, MaskedLM):
        return method.flops_per_token(backbone, batch=batch, length=length)
    split, denoiser, positions = method.split, config.method.denoiser, batch * length
    times = positions if denoiser.mask == "mixed" else batch
    meter = Meter(backbone)
    meter.prefix(split, batch=batch, new=length)
    if denoiser.self_conditioning > 0:
        meter.denoiser(method.denoiser, batch=batch, new=length, times=times, part="self_conditioning")
    null = objective.condition_dropout > 0
    meter.denoiser(method.denoiser, batch=batch, new=length, times=times, backward=True, null=null)
    if objective.metric == "fisher":
        gradient = "input" if objective.state > 0 else "none"
        meter.product(backbone.hidden_size, backbone.hidden_size, positions, part="metric", gradient=gradient)
    for weight in (objective.own, objective.read):
        if weight > 0:
            meter.head(positions, backward=True, part="own_head")
    if reads_suffix(config):
        read = Meter(backbone)
        adapters = [] if method.adapters is None else method.adapters.parameters()
        read.suffix(split, batch=batch, new=length, backward=True, adapters=adapters)
        read.head(positions, backward=True)
        if objective.kl > 0:
            read.suffix(split, batch=batch, new=length, part="teacher_suffix")
            read.head(positions)
        share = (1 - objective.suffix_start) / objective.suffix_every
        meter.merge({part: share * value for part, value in read.flops.items()})
    return {part: value / positions for part, value in meter.flops.items()}


def require_affordable(plan: Plan, spent: Spent, step: float) -> None:
    """Refuse a budget of FLOPs that does not pay for one optimiser step of ``step`` FLOPs after the preparation.

    Raises:
        UsageError: with both numbers.
    """
    if plan.flops is not None and spent.step == 0 and spent.total_flops + step > plan.flops:
        raise UsageError(
            f"budget.flops is {plan.flops:.4g}; measuring the normalisation took {spent.total_flops:.4g} and one "
            f"optimiser step takes {step:.4g}. Raise the budget, or lower method.normalisation_tokens or "
            "data.batch_size."
        )


def print_plan(
    config: TrainConfig,
    plan: Plan,
    backbone: Backbone,
    method: AnyMethod,
    flops: dict[str, float],
    *,
    console: Console | None = None,
) -> None:
    """Print the resolved configuration, parameters, budget and memory estimate.

    ``flops`` are those of :func:`flops_per_token`.
    """
    console = console or Console()
    console.print(dump(config), highlight=False, markup=False, soft_wrap=True)
    counts = parameters(backbone, method)
    memory = estimate_memory(config, backbone, method)
    table = Table(title="plan", show_header=False, title_justify="left")
    table.add_column("quantity")
    table.add_column("value", justify="right")
    table.add_row("backbone", f"{backbone.reference.id} ({backbone.num_blocks} blocks, d = {backbone.hidden_size})")
    table.add_row("split", f"{config.method.split}")
    table.add_row("trainable parameters", f"{counts['trainable_parameters']:,}")
    table.add_row("frozen parameters", f"{counts['frozen_parameters']:,}")
    table.add_section()
    table.add_row("budget", config.budget.name)
    table.add_row("optimiser steps", f"{plan.steps:,}")
    table.add_row("sequences per step", f"{plan.sequences_per_step:,}")
    table.add_row("tokens per step", f"{plan.tokens_per_step:,}")
    table.add_row("tokens", f"{plan.tokens:,} of {config.budget.tokens:,}")
    table.add_row("seconds", "no limit" if plan.seconds is None else f"at most {plan.seconds:,.0f}")
    for name, value in flops.items():
        table.add_row(f"FLOPs, {name}", f"{value * plan.tokens:.3g}")
    total = sum(flops.values())
    table.add_row("FLOPs, all", f"{total * plan.tokens:.3g}")
    if plan.flops is not None:
        affordable = int(plan.flops / (total * plan.tokens_per_step))
        table.add_row("FLOPs, budget", f"{plan.flops:.3g} (about {min(affordable, plan.steps):,} steps)")
    table.add_section()
    for name, size in memory.parts.items():
        table.add_row(f"memory, {name}", f"{size / _GIB:.3f} GiB")
    table.add_row("memory per process, estimate", f"{memory.total / _GIB:.3f} GiB")
    console.print(table)
