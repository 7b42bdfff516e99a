"""The optimiser, its learning rate as a function of the spent budget, and its state as named tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dihal.config import OptimConfig
from dihal.errors import UsageError
from dihal.nn import parameter_groups
from dihal.training.muon import MuonWithAdamW

__all__ = ["build_optimizer", "check_optim", "load_optimizer_state", "lr_factor", "optimizer_state"]


def check_optim(config: OptimConfig) -> None:
    """Refuse values outside their range.

    Raises:
        UsageError: naming the option and its range.
    """
    ranges = {
        "lr": (config.lr, 0.0, math.inf, "positive", config.lr > 0),
        "warmup": (config.warmup, 0.0, 1.0, "in [0, 1]", 0 <= config.warmup <= 1),
        "final": (config.final, 0.0, 1.0, "in [0, 1]", 0 <= config.final <= 1),
        "ema": (config.ema, 0.0, 1.0, "in [0, 1)", 0 <= config.ema < 1),
        "clip": (config.clip, 0.0, math.inf, "0 (off) or positive", config.clip >= 0),
        "weight_decay": (config.weight_decay, 0.0, math.inf, "0 or positive", config.weight_decay >= 0),
    }
    for name, (value, _, _, wanted, ok) in ranges.items():
        if not ok or not math.isfinite(value):
            raise UsageError(f"optim.{name} is {value}; it must be {wanted}.")
    if not all(0 <= beta < 1 for beta in config.betas):
        raise UsageError(f"optim.betas are {config.betas}; both must be in [0, 1).")


def lr_factor(progress: float, config: OptimConfig) -> float:
    """Learning rate relative to its peak: linear warm-up, then decay to ``final``.

    A pure function of the share of the budget that is spent, so that it needs no state, is the same
    on any number of devices, and always ends with the budget.

    Args:
        progress: share of the budget spent *after* the step this rate is for, in [0, 1].
        config: ``warmup``, ``decay`` and ``final``.
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < config.warmup:
        return progress / config.warmup
    if config.decay == "constant" or config.warmup >= 1.0:
        return 1.0
    rest = (progress - config.warmup) / (1.0 - config.warmup)
    shape = 1.0 - rest if config.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * rest))
    return config.final + (1.0 - config.final) * shape


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser over a module's trainable parameters; weight decay on matrices only.

    AdamW's fused kernel is used where every parameter lies on a CUDA device.
    """
    if config.name == "muon":
        return MuonWithAdamW(module, lr=config.lr, betas=tuple(config.betas), weight_decay=config.weight_decay)
    groups = parameter_groups(module, config.weight_decay)
    on_cuda = all(parameter.is_cuda for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, lr=config.lr, betas=tuple(config.betas), fused=True if on_cuda else None)


def _names(module: nn.Module, optimizer: torch.optim.Optimizer) -> Iterable[tuple[str, Tensor]]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield names[id(parameter)], parameter


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of an optimiser as ``<parameter name>/<state key>`` -> tensor.

    Names, not positions: a state survives another order of parameters and cannot be given to the
    wrong one in silence.
    """
    return {
        f"{name}/{key}": value if isinstance(value, Tensor) else torch.tensor(float(value))
        for name, parameter in _names(module, optimizer)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    """Restore :func:`optimizer_state`.

    Raises:
        UsageError: a parameter without state, a state without parameter, or another shape.
    """
    grouped: dict[str, dict[str, Tensor]] = {}
    for full_name, value in state.items():
        name, _, key = full_name.rpartition("/")
        grouped.setdefault(name, {})[key] = value
    ordered = list(_names(module, optimizer))
    expected = {name for name, _ in ordered}
    if grouped and set(grouped) != expected:
        missing, extra = sorted(expected - set(grouped)), sorted(set(grouped) - expected)
        raise UsageError(
            f"the optimiser state does not fit this method: missing {missing[:3]}, unexpected {extra[:3]}. "
            "Resume with the method configuration of the checkpoint."
        )
    for name, parameter in ordered:
        for key, value in grouped.get(name, {}).items():
            if value.ndim and value.shape != parameter.shape:
                raise UsageError(
                    f"optimiser state {name}/{key} has shape {tuple(value.shape)}, the parameter has "
                    f"{tuple(parameter.shape)}. Resume with the method configuration of the checkpoint."
                )
    packed = {index: grouped[name] for index, (name, _) in enumerate(ordered) if name in grouped}
    optimizer.load_state_dict({"state": packed, "param_groups": optimizer.state_dict()["param_groups"]})
