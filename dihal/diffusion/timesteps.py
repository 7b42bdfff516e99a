"""Training times, drawn from counters: the same for a sample whatever the batch split, device count or resume."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dihal.config.method import TimeConfig
from dihal.errors import UsageError, unknown_name
from dihal.random import normal, uniform

__all__ = ["LAWS", "sample_times"]

LAWS = ("uniform", "low_discrepancy", "logit_normal")
_GOLDEN = (math.sqrt(5) - 1) / 2
_SMALLEST = 2.0**-24


def _check(config: TimeConfig, batch_size: int) -> None:
    if config.law not in LAWS:
        raise unknown_name("time law", config.law, LAWS)
    if not 0.0 <= config.terminal_fraction <= 1.0:
        raise UsageError(f"terminal_fraction is {config.terminal_fraction}; it is a share, in [0, 1].")
    if config.law == "logit_normal" and not config.std > 0:
        raise UsageError(f"std of the logit-normal times is {config.std}; it must be positive.")
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; it is the number of sequences of the global batch, at least 1.")


def _stride(batch_size: int) -> int:
    # Coprime to the batch size and near the golden section of it: then the grid points of any run of
    # neighbours (a device's share, a micro-batch) are themselves spread over [0, 1].
    start = round(batch_size * _GOLDEN)
    candidates = (start + sign * step for step in range(batch_size + 1) for sign in (1, -1))
    return next(k for k in candidates if k >= 1 and math.gcd(k, batch_size) == 1)


def sample_times(
    config: TimeConfig,
    *,
    seed: int,
    step: int,
    sample_ids: Int[Tensor, "batch"],
    batch_index: Int[Tensor, "batch"],
    batch_size: int,
) -> Float[Tensor, "batch"]:
    """Return training times in (0, 1] as float32.

    A share ``terminal_fraction`` = f of the sequences gets t = 1 exactly; the law describes the
    rest. `uniform` and `low_discrepancy` map one uniform number u: t = 1 where u >= 1 - f, else
    t = u / (1 - f). With `low_discrepancy` the u of a global batch are one randomly shifted grid
    of spacing 1 / batch_size, so the number of terminal sequences is floor or ceil of
    f * batch_size and the other times are again an even grid over [0, 1].

    Args:
        config: the law.
        seed: seed of the run.
        step: optimiser step; keys the grid's shift.
        sample_ids: global index of each sequence in the run; keys the other laws.
        batch_index: index of each sequence in the global batch, in [0, batch_size).
        batch_size: sequences in the global batch, over all devices and accumulated micro-batches.

    Raises:
        UsageError: unknown law or a parameter out of range.
    """
    _check(config, batch_size)
    kept = 1.0 - config.terminal_fraction
    if config.law == "low_discrepancy":
        shift = uniform(seed, torch.tensor([step]), "time/shift", dtype=torch.float64).item()
        rank = (batch_index * _stride(batch_size)) % batch_size
        u = torch.frac(rank.to(torch.float64) / batch_size + shift)
    else:
        u = uniform(seed, sample_ids, "time", dtype=torch.float64)
    if config.law == "logit_normal":
        t = torch.sigmoid(config.mean + config.std * normal(seed, sample_ids, "time/normal", dtype=torch.float64))
    else:
        t = u / max(kept, _SMALLEST)
    # t = 0 itself has no noise to learn from and, for some targets, a division by sigma = 0.
    return torch.where(u >= kept, 1.0, t).to(torch.float32).clamp(_SMALLEST, 1.0)
