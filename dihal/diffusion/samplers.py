"""Samplers: plain functions from a denoiser and noise to a clean state.

One contract: ``denoise(z_t, t) -> x0 estimate`` with t of shape (batch,). Every sampler walks a
falling grid of times and knows the network only through that contract. A step that ends at t = 0
returns the x0 estimate itself, whatever the sampler; so one step evaluates once, at the first
time of the grid, and returns that estimate.

Coefficients are computed in float64 on the host (times are the same for the whole batch) and
enter as numbers: no device synchronisation, no rounding of times. States are at least float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from dihal.diffusion.process import Process
from dihal.diffusion.schedule import Schedule
from dihal.errors import UsageError, unknown_name
from dihal.types import State, Time

__all__ = [
    "SAMPLERS",
    "Denoise",
    "Noise",
    "Sampler",
    "ancestral",
    "ddim",
    "dpmpp_2m",
    "euler",
    "evaluation_times",
    "heun",
    "level_grid",
    "nfe",
    "sample",
    "time_grid",
]

Denoise = Callable[[State, Time], State]
"""Noised state and time (batch,) -> estimate of the clean state."""

Noise = Callable[[int], State]
"""Index of a step -> standard normal noise of the state's shape."""

Sampler = Callable[[Denoise, Schedule, State, Sequence[float], Noise | None], State]


def time_grid(steps: int, t_start: float = 1.0, t_end: float = 0.0) -> list[float]:
    """Return ``steps + 1`` equally spaced times from ``t_start`` down to ``t_end``.

    Raises:
        UsageError: fewer than one step, or not 0 <= t_end < t_start <= 1.
    """
    if steps < 1:
        raise UsageError(f"a sampler needs at least 1 step, {steps} were asked for.")
    if not 0.0 <= t_end < t_start <= 1.0:
        raise UsageError(f"sampling runs from t_start down to t_end within [0, 1]; got {t_start} and {t_end}.")
    return [t_start + (t_end - t_start) * i / steps for i in range(steps)] + [t_end]


def level_grid(schedule: Schedule, steps: int, *, center: float, scale: float) -> list[float]:
    """Return ``steps + 1`` times from 1 down to 0; those in between are quantiles of a logistic law of the log-SNR.

    The noise levels at which something is decided get the steps, whatever the schedule of training was. The idea is
    CDCD's (Dieleman et al. 2022, arXiv 2211.15089), whose warp spaces noise levels evenly in what is decided
    at them; here it is two numbers that training need not know.

    Args:
        schedule: turns levels into times.
        steps: see ``nfe``.
        center: median log-SNR.
        scale: of the law; half of the steps lie within 1.1 times this of the centre.

    Raises:
        UsageError: fewer than one step, a scale that is not positive, or levels that the schedule does not have.
    """
    if steps < 1:
        raise UsageError(f"a sampler needs at least 1 step, {steps} were asked for.")
    if not scale > 0:
        raise UsageError(f"the scale of steps over log-SNR must be positive, not {scale}.")
    share = torch.arange(1, steps, dtype=torch.float64) / steps
    levels = center + scale * (share.log() - (1 - share).log())
    if isinstance(schedule, nn.Module):
        levels = levels.to(next(schedule.parameters()).device)
    times = [1.0, *schedule.time(levels).tolist(), 0.0]
    if not all(before > after for before, after in pairwise(times)):
        raise UsageError(
            f"steps at log-SNR {levels.min():.1f} to {levels.max():.1f} leave the schedule of this checkpoint. "
            "Move the centre, or take a smaller scale or fewer steps."
        )
    return times


def _at(function: Callable[[Tensor], Tensor], t: float) -> float:
    return function(torch.tensor(t, dtype=torch.float64)).item()


def _estimate(denoise: Denoise, z: Tensor, t: float) -> Tensor:
    return denoise(z, torch.full((z.shape[0],), t, dtype=z.dtype, device=z.device))


def _velocity(schedule: Schedule, x0: Tensor, z: Tensor, t: float) -> Tensor:
    # alpha' x0 + sigma' eps with eps = (z - alpha x0) / sigma. Finite for every t > 0.
    slope = _at(schedule.sigma_dot, t) / _at(schedule.sigma, t)
    return (_at(schedule.alpha_dot, t) - slope * _at(schedule.alpha, t)) * x0 + slope * z


def _exponential_step(schedule: Schedule, x0: Tensor, z: Tensor, t: float, s: float) -> Tensor:
    # Exact solution of the probability-flow ODE from t to s for a constant x0 estimate. In this form it
    # holds where alpha(t) = 0 too, and no log-SNR appears that could be infinite.
    ratio = _at(schedule.sigma, s) / _at(schedule.sigma, t)
    return ratio * z + (_at(schedule.alpha, s) - ratio * _at(schedule.alpha, t)) * x0


def euler(denoise: Denoise, schedule: Schedule, z: State, times: Sequence[float], noise: Noise | None = None) -> State:
    """Explicit Euler on the probability-flow ODE dz/dt = alpha' x0 + sigma' eps. First order, deterministic."""
    for t, s in pairwise(times):
        x0 = _estimate(denoise, z, t)
        z = x0 if s == 0 else z + (s - t) * _velocity(schedule, x0, z, t)
    return z


def heun(denoise: Denoise, schedule: Schedule, z: State, times: Sequence[float], noise: Noise | None = None) -> State:
    """Heun's trapezoidal rule on the same ODE (Karras et al. 2022, Alg. 1). Second order, two evaluations a step.

    The step to t = 0, where the velocity is 0 / 0, is the plain estimate and costs one.
    """
    for t, s in pairwise(times):
        x0 = _estimate(denoise, z, t)
        if s == 0:
            return x0
        velocity = _velocity(schedule, x0, z, t)
        ahead = z + (s - t) * velocity
        velocity = velocity + _velocity(schedule, _estimate(denoise, ahead, s), ahead, s)
        z = z + 0.5 * (s - t) * velocity
    return z


def ddim(denoise: Denoise, schedule: Schedule, z: State, times: Sequence[float], noise: Noise | None = None) -> State:
    """Deterministic DDIM (Song et al. 2021, Eq. 12 with eta = 0): the ODE exactly, per step, for a frozen x0. First order."""
    for t, s in pairwise(times):
        x0 = _estimate(denoise, z, t)
        z = x0 if s == 0 else _exponential_step(schedule, x0, z, t, s)
    return z


def ancestral(
    denoise: Denoise, schedule: Schedule, z: State, times: Sequence[float], noise: Noise | None = None
) -> State:
    """Draw each z_s from q(z_s | z_t, x0 estimate) (Ho et al. 2020, Eq. 6-7; general alpha, sigma: Kingma et al. 2021, Eq. 25-27).

    Needs ``noise``; step i uses ``noise(i)``. The last step to t = 0 draws nothing.
    """
    for index, (t, s) in enumerate(pairwise(times)):
        x0 = _estimate(denoise, z, t)
        if s == 0:
            return x0
        if noise is None:
            raise UsageError("the sampler 'ancestral' with more than one step draws noise: pass noise=, or use 'ddim'.")
        alpha_s, sigma_s = _at(schedule.alpha, s), _at(schedule.sigma, s)
        variance_t = _at(schedule.sigma, t) ** 2
        forward = _at(schedule.alpha, t) / alpha_s
        # Variance that going from s to t adds; not negative because the log-SNR falls with time.
        added = max(variance_t - (forward * sigma_s) ** 2, 0.0)
        mean = (forward * sigma_s**2 / variance_t) * z + (alpha_s * added / variance_t) * x0
        z = mean + math.sqrt(added * sigma_s**2 / variance_t) * noise(index).to(z.dtype)
    return z


def dpmpp_2m(
    denoise: Denoise, schedule: Schedule, z: State, times: Sequence[float], noise: Noise | None = None
) -> State:
    """DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++", Alg. 2). Second order, one evaluation a step.

    Extrapolates the estimate linearly in half the log-SNR from the two latest evaluations. The
    first step is first order, as published; so is the one after a start at alpha = 0, whose
    log-SNR is infinitely far away, and the one to t = 0.
    """
    previous, width_before = None, math.inf
    for t, s in pairwise(times):
        x0 = _estimate(denoise, z, t)
        if s == 0:
            return x0
        width = 0.5 * (_at(schedule.log_snr, s) - _at(schedule.log_snr, t))
        extrapolated = x0
        if previous is not None and math.isfinite(width_before):
            extrapolated = x0 + (0.5 * width / width_before) * (x0 - previous)
        z = _exponential_step(schedule, extrapolated, z, t, s)
        previous, width_before = x0, width
    return z


SAMPLERS: dict[str, Sampler] = {
    "euler": euler,
    "heun": heun,
    "ddim": ddim,
    "ancestral": ancestral,
    "dpmpp_2m": dpmpp_2m,
}


def _sampler(name: str) -> Sampler:
    if name not in SAMPLERS:
        raise unknown_name("sampler", name, SAMPLERS)
    return SAMPLERS[name]


def nfe(name: str, steps: int) -> int:
    """Return how often ``sample(name, ..., steps=steps)`` down to t = 0 evaluates the denoiser.

    Raises:
        UsageError: unknown sampler, or fewer than one step.
    """
    _sampler(name)
    time_grid(steps)
    return 2 * steps - 1 if name == "heun" else steps


def evaluation_times(name: str, times: Sequence[float]) -> list[float]:
    """Return the times at which a sampler evaluates the denoiser along a grid that ends at 0, in that order.

    On the host: to read them off the tensors that the denoiser is given would wait for the device at every step.

    Raises:
        UsageError: unknown sampler.
    """
    _sampler(name)
    return [time for pair in pairwise(times) for time in pair][:-1] if name == "heun" else list(times[:-1])


def sample(
    name: str,
    denoise: Denoise,
    process: Process,
    z_1: State,
    *,
    steps: int,
    noise: Noise | None = None,
    t_start: float = 1.0,
    t_end: float = 0.0,
) -> State:
    """Return the state at ``t_end`` reached from ``z_1`` at ``t_start``.

    Args:
        name: an entry of ``SAMPLERS``.
        denoise: ``(z_t, t (batch,)) -> x0 estimate``; the caller turns network outputs into x0.
        process: gives the schedule.
        z_1: state at ``t_start``; standard normal noise where t_start = 1. Computed in its dtype, at least float32.
        steps: number of steps; see ``nfe`` for evaluations.
        noise: ``step index -> standard normal state``; needed by `ancestral` when it takes more than one step.
        t_start, t_end: ends of the walk. With t_end = 0 the last step is the plain x0 estimate.

    Raises:
        UsageError: unknown sampler, impossible grid, or noise missing.
    """
    sampler = _sampler(name)
    times = time_grid(steps, t_start, t_end)
    return sampler(denoise, process.schedule, z_1.to(torch.promote_types(z_1.dtype, torch.float32)), times, noise)
