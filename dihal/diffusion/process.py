"""The noising process and exact conversions between what a network may predict.

Each parametrisation is a fixed linear combination a z + b eps:

========  ===========  ===========  =====================================
name      a            b            meaning
========  ===========  ===========  =====================================
``x0``    1            0            clean state z
``eps``   0            1            noise
``v``     -sigma       alpha        alpha eps - sigma z
``flow``  d alpha/dt   d sigma/dt   dz_t/dt along z_t = alpha z + sigma eps
========  ===========  ===========  =====================================

Together with z_t = alpha z + sigma eps this is a 2x2 system with determinant
``alpha b - sigma a``; nothing assumes alpha^2 + sigma^2 = 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dihal.config.method import ProcessConfig
from dihal.diffusion.schedule import Schedule, build_schedule
from dihal.errors import UsageError, unknown_name
from dihal.types import State, Time

__all__ = ["PARAMETRISATIONS", "Process", "build_process", "expand_time"]

Coefficients = Callable[[Schedule, Tensor], tuple[Tensor, Tensor]]

PARAMETRISATIONS: dict[str, Coefficients] = {
    "x0": lambda schedule, t: (torch.ones_like(t), torch.zeros_like(t)),
    "eps": lambda schedule, t: (torch.zeros_like(t), torch.ones_like(t)),
    "v": lambda schedule, t: (-schedule.sigma(t), schedule.alpha(t)),
    "flow": lambda schedule, t: (schedule.alpha_dot(t), schedule.sigma_dot(t)),
}


def expand_time(t: Time, like: Float[Tensor, "batch time *rest"]) -> Float[Tensor, "batch ..."]:
    """Return ``t`` with trailing axes of length 1, so that it broadcasts against ``like``.

    (batch,) becomes (batch, 1, 1) and (batch, time) becomes (batch, time, 1). The two are told
    apart by their number of axes, never by sizes: batch == time == dim is no special case.

    Raises:
        UsageError: ``t`` is neither, or its sizes are not those of ``like``.
    """
    if t.ndim not in (1, 2) or t.shape != like.shape[: t.ndim]:
        raise UsageError(
            f"time has shape {tuple(t.shape)}; for a state of shape {tuple(like.shape)} "
            f"it must be {tuple(like.shape[:1])} (per sequence) or {tuple(like.shape[:2])} (per position)."
        )
    return t.reshape(*t.shape, *([1] * (like.ndim - t.ndim)))


@dataclass(frozen=True)
class Process:
    """A schedule and what the network predicts. Pure functions of (state, noise, time).

    States are (batch, time, dim), times (batch,) or (batch, time). Results have the wider dtype of
    state and time, so bf16 states with fp32 times are computed in fp32.

    Where a quantity does not determine the answer the result is not finite: ``to_x0`` of ``eps``
    where alpha = 0, and ``to_eps`` of ``x0`` or ``from_x0`` where sigma = 0.
    """

    schedule: Schedule
    parametrisation: str = "x0"

    def __post_init__(self) -> None:
        """Check the name."""
        if self.parametrisation not in PARAMETRISATIONS:
            raise unknown_name("parametrisation", self.parametrisation, PARAMETRISATIONS)

    def _coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        time = expand_time(t, like)
        a, b = PARAMETRISATIONS[self.parametrisation](self.schedule, time)
        return self.schedule.alpha(time), self.schedule.sigma(time), a, b

    def noise(self, z: State, t: Time, eps: State) -> State:
        """Return z_t = alpha(t) z + sigma(t) eps."""
        time = expand_time(t, z)
        return self.schedule.alpha(time) * z + self.schedule.sigma(time) * eps

    def target(self, z: State, eps: State, t: Time) -> State:
        """Return what the network should output for clean state ``z`` and noise ``eps``."""
        if self.parametrisation == "x0":
            return z
        if self.parametrisation == "eps":
            return eps
        _, _, a, b = self._coefficients(t, z)
        return a * z + b * eps

    def to_x0(self, out: State, z_t: State, t: Time) -> State:
        """Return the clean state that the network output ``out`` at ``z_t`` stands for."""
        if self.parametrisation == "x0":
            return out  # also where sigma = 0 and the general formula is 0 / 0
        alpha, sigma, a, b = self._coefficients(t, z_t)
        return (b * z_t - sigma * out) / (alpha * b - sigma * a)

    def to_eps(self, out: State, z_t: State, t: Time) -> State:
        """Return the noise that the network output ``out`` at ``z_t`` stands for."""
        if self.parametrisation == "eps":
            return out
        alpha, sigma, a, b = self._coefficients(t, z_t)
        return (alpha * out - a * z_t) / (alpha * b - sigma * a)

    def from_x0(self, x0: State, z_t: State, t: Time) -> State:
        """Return the network output that stands for the clean state ``x0`` at ``z_t``; inverse of ``to_x0``."""
        if self.parametrisation == "x0":
            return x0
        alpha, sigma, a, b = self._coefficients(t, z_t)
        return (b * z_t - (alpha * b - sigma * a) * x0) / sigma


def build_process(config: ProcessConfig) -> Process:
    """Return the process that the configuration names.

    Raises:
        UsageError: unknown schedule or parametrisation, or `eps` with a schedule whose alpha
            vanishes at t = 1: pure noise says nothing about the clean state there, so neither
            one-step sampling nor training at t = 1 would be defined.
    """
    schedule = build_schedule(config)
    process = Process(schedule, config.parametrisation)
    if process.parametrisation == "eps" and schedule.alpha(torch.ones(1)).item() == 0:
        raise UsageError(
            f"parametrisation 'eps' cannot start from pure noise under schedule {config.schedule!r} (alpha(1) = 0). "
            "Use parametrisation 'v', 'x0' or 'flow', or schedule 'log_linear'."
        )
    return process
