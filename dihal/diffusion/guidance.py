"""Classifier-free guidance of clean-state estimates (Ho and Salimans 2022, Eq. 6, in x0 form)."""

from __future__ import annotations

from dihal.diffusion.samplers import Denoise
from dihal.types import State, Time

__all__ = ["evaluations_per_estimate", "guided"]


def evaluations_per_estimate(weight: float) -> int:
    """Return how often the network runs for one guided estimate: 1 without guidance, else 2."""
    return 1 if weight in (0.0, 1.0) else 2


def guided(conditional: Denoise, unconditional: Denoise, weight: float) -> Denoise:
    """Return the denoiser x_u + weight (x_c - x_u).

    Weight 1 is ``conditional`` itself and weight 0 ``unconditional`` itself: neither costs a
    second evaluation. Guidance is linear in the estimate, so doing it on x0 equals doing it on
    eps, v or flow at the same z_t.
    """
    if weight == 1.0:
        return conditional
    if weight == 0.0:
        return unconditional

    def denoise(z_t: State, t: Time) -> State:
        without = unconditional(z_t, t)
        return without + weight * (conditional(z_t, t) - without)

    return denoise
