"""Noise schedules: how much signal alpha(t) and noise sigma(t) are in z_t = alpha z + sigma eps.

Time runs from t = 0 (clean) to t = 1 (noise). log-SNR(t) = log(alpha^2 / sigma^2) falls strictly.
Every method maps a tensor of times to a tensor of the same shape, elementwise, and is exact at
the end points.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from dihal.config.method import ProcessConfig
from dihal.diffusion.learned import LearnedGumbel, Warp
from dihal.errors import UsageError, unknown_name

__all__ = ["SCHEDULES", "Cosine", "Linear", "LogLinear", "Schedule", "Tan", "build_schedule"]

Values = Float[Tensor, "*shape"]

_QUARTER = math.pi / 2


@runtime_checkable
class Schedule(Protocol):
    """What a schedule offers. Implementations are final."""

    def alpha(self, t: Values) -> Values:
        """Signal coefficient, in [0, 1]."""
        ...

    def sigma(self, t: Values) -> Values:
        """Noise coefficient, in [0, 1]."""
        ...

    def log_snr(self, t: Values) -> Values:
        """log(alpha^2 / sigma^2), in nats; +-inf where a coefficient vanishes."""
        ...

    def time(self, log_snr: Values) -> Values:
        """Inverse of ``log_snr``."""
        ...

    def alpha_dot(self, t: Values) -> Values:
        """d alpha / dt."""
        ...

    def sigma_dot(self, t: Values) -> Values:
        """d sigma / dt."""
        ...


@dataclass(frozen=True)
class Cosine:
    """Variance preserving: alpha = cos(pi t / 2), sigma = sin(pi t / 2) (Salimans and Ho 2022, Sec. 4)."""

    def alpha(self, t: Values) -> Values:
        """cos(pi t / 2)."""
        # As a sine of 1 - t: exactly 0 at t = 1, where the cosine of a rounded pi / 2 is not.
        return torch.sin(_QUARTER * (1 - t))

    def sigma(self, t: Values) -> Values:
        """sin(pi t / 2)."""
        return torch.sin(_QUARTER * t)

    def log_snr(self, t: Values) -> Values:
        """-2 log tan(pi t / 2)."""
        return 2 * (torch.log(self.alpha(t)) - torch.log(self.sigma(t)))

    def time(self, log_snr: Values) -> Values:
        """(2 / pi) atan(exp(-log_snr / 2))."""
        return (torch.atan(torch.exp(-log_snr / 2)) / _QUARTER).clamp(0, 1)

    def alpha_dot(self, t: Values) -> Values:
        """-(pi / 2) sigma."""
        return -_QUARTER * self.sigma(t)

    def sigma_dot(self, t: Values) -> Values:
        """(pi / 2) alpha."""
        return _QUARTER * self.alpha(t)


@dataclass(frozen=True)
class Linear:
    """Straight path of flow matching: alpha = 1 - t, sigma = t (Lipman et al. 2023; Liu et al. 2023)."""

    def alpha(self, t: Values) -> Values:
        """1 - t."""
        return 1 - t

    def sigma(self, t: Values) -> Values:
        """t."""
        return t.clone()

    def log_snr(self, t: Values) -> Values:
        """2 log((1 - t) / t)."""
        return 2 * (torch.log1p(-t) - torch.log(t))

    def time(self, log_snr: Values) -> Values:
        """sigmoid(-log_snr / 2)."""
        return torch.sigmoid(-log_snr / 2)

    def alpha_dot(self, t: Values) -> Values:
        """-1."""
        return -torch.ones_like(t)

    def sigma_dot(self, t: Values) -> Values:
        """1."""
        return torch.ones_like(t)


@dataclass(frozen=True)
class LogLinear:
    """Variance preserving with log-SNR linear in t, from ``log_snr_max`` to its negative.

    alpha^2 = sigmoid(log-SNR), sigma^2 = sigmoid(-log-SNR) (Kingma et al. 2021, Sec. 3). Neither
    coefficient vanishes: at t = 1 a share sigmoid(-log_snr_max) of the signal's variance is left.
    """

    log_snr_max: float = 10.0

    def __post_init__(self) -> None:
        """Check the range."""
        if not (math.isfinite(self.log_snr_max) and self.log_snr_max > 0):
            raise UsageError(f"log_snr_max is {self.log_snr_max}; it must be a positive finite number, e.g. 10.")

    def alpha(self, t: Values) -> Values:
        """sqrt(sigmoid(log_snr))."""
        return torch.sqrt(torch.sigmoid(self.log_snr(t)))

    def sigma(self, t: Values) -> Values:
        """sqrt(sigmoid(-log_snr))."""
        return torch.sqrt(torch.sigmoid(-self.log_snr(t)))

    def log_snr(self, t: Values) -> Values:
        """log_snr_max (1 - 2 t)."""
        return self.log_snr_max * (1 - 2 * t)

    def time(self, log_snr: Values) -> Values:
        """(1 - log_snr / log_snr_max) / 2."""
        return (1 - log_snr / self.log_snr_max) / 2

    def alpha_dot(self, t: Values) -> Values:
        """-log_snr_max alpha sigma^2."""
        return -self.log_snr_max * self.alpha(t) * torch.sigmoid(-self.log_snr(t))

    def sigma_dot(self, t: Values) -> Values:
        """log_snr_max sigma alpha^2."""
        return self.log_snr_max * self.sigma(t) * torch.sigmoid(self.log_snr(t))


@dataclass(frozen=True)
class Tan:
    """Variance preserving: sigma / alpha = d tan(pi t / 2), the cosine schedule with its noise scaled by d.

    alpha = 1 / sqrt(1 + d^2 tan^2(pi t / 2)); log-SNR is the cosine's less 2 log d (the shifted cosine of Hoogeboom et al. 2023,
    "simple diffusion"; for text: the tan-d schedule of TEncDM, arXiv 2402.19097).
    """

    shift: float = 1.0

    def __post_init__(self) -> None:
        """Check the range."""
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise UsageError(f"shift is {self.shift}; it must be a positive finite number, e.g. 5; 1 is `cosine`.")

    def _parts(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # cos, d sin, and the root of the sum of their squares: no tangent, which is infinite at t = 1.
        cosine, sine = torch.sin(_QUARTER * (1 - t)), self.shift * torch.sin(_QUARTER * t)
        return cosine, sine, torch.sqrt(cosine**2 + sine**2)

    def alpha(self, t: Values) -> Values:
        """cos / sqrt(cos^2 + d^2 sin^2) of pi t / 2."""
        cosine, _, root = self._parts(t)
        return cosine / root

    def sigma(self, t: Values) -> Values:
        """d sin / sqrt(cos^2 + d^2 sin^2) of pi t / 2."""
        _, sine, root = self._parts(t)
        return sine / root

    def log_snr(self, t: Values) -> Values:
        """-2 log(d tan(pi t / 2))."""
        cosine, sine, _ = self._parts(t)
        return 2 * (torch.log(cosine) - torch.log(sine))

    def time(self, log_snr: Values) -> Values:
        """(2 / pi) atan(exp(-log_snr / 2) / d)."""
        return (torch.atan(torch.exp(-log_snr / 2) / self.shift) / _QUARTER).clamp(0, 1)

    def alpha_dot(self, t: Values) -> Values:
        """-(pi / 2) d^2 sin / (cos^2 + d^2 sin^2)^(3/2)."""
        _, sine, root = self._parts(t)
        return -_QUARTER * self.shift * sine / root**3

    def sigma_dot(self, t: Values) -> Values:
        """(pi / 2) d cos / (cos^2 + d^2 sin^2)^(3/2)."""
        cosine, _, root = self._parts(t)
        return _QUARTER * self.shift * cosine / root**3


SCHEDULES: dict[str, Callable[[ProcessConfig], Schedule]] = {
    "cosine": lambda config: Cosine(),
    "linear": lambda config: Linear(),
    "log_linear": lambda config: LogLinear(config.log_snr_max),
    "tan": lambda config: Tan(config.shift),
    "gumbel": lambda config: LearnedGumbel(config.gumbel_loc, config.gumbel_scale),
}


def build_schedule(config: ProcessConfig) -> Schedule:
    """Return the schedule that ``config.schedule`` names, warped where ``config.warp`` says so.

    A learned schedule is an ``nn.Module``: who trains it registers it, and adds its ``fit_loss`` to the loss.

    Raises:
        UsageError: unknown name, a parameter out of range, or a warp of a schedule that learns by itself.
    """
    if config.schedule not in SCHEDULES:
        raise unknown_name("schedule", config.schedule, SCHEDULES)
    schedule = SCHEDULES[config.schedule](config)
    if not config.warp:
        return schedule
    if isinstance(schedule, LearnedGumbel):
        raise UsageError(
            "schedule 'gumbel' learns its noise levels already: set method.process.warp to false, or use 'cosine'."
        )
    return Warp(schedule)
