"""Gaussian data: the one case whose denoiser and probability flow are known in closed form.

The reference against which samplers are measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dihal.diffusion.process import expand_time
from dihal.diffusion.schedule import Schedule
from dihal.types import State, Time

__all__ = ["GaussianData"]


@dataclass(frozen=True, eq=False)
class GaussianData:
    """Clean states drawn from N(mean, basis diag(variances) basis^T), independently per position.

    Args:
        schedule: noise schedule.
        mean: (dim,).
        variances: eigenvalues of the covariance, (dim,).
        basis: orthonormal eigenvectors in columns, (dim, dim).
    """

    schedule: Schedule
    mean: Float[Tensor, "dim"]
    variances: Float[Tensor, "dim"]
    basis: Float[Tensor, "dim dim"]

    def _centred(self, z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Coordinates along the eigenvectors of z_t - E z_t; alpha; eigenvalues of Cov z_t.
        time = expand_time(t, z_t)
        alpha, sigma = self.schedule.alpha(time), self.schedule.sigma(time)
        return (z_t - alpha * self.mean) @ self.basis, alpha, alpha**2 * self.variances + sigma**2

    def denoise(self, z_t: State, t: Time) -> State:
        """Return E[z | z_t] = m + alpha C (alpha^2 C + sigma^2)^-1 (z_t - alpha m)."""
        centred, alpha, variances = self._centred(z_t, t)
        return self.mean + (centred * alpha * self.variances / variances) @ self.basis.T

    def flow(self, z_t: State, t: Time, s: Time) -> State:
        """Return the exact solution at time ``s`` of the probability-flow ODE through ``z_t`` at time ``t``.

        The flow keeps a Gaussian's standardised coordinates: (z - alpha m) / sqrt(alpha^2 C + sigma^2).
        """
        centred, _, variances = self._centred(z_t, t)
        time = expand_time(s, z_t)
        alpha, sigma = self.schedule.alpha(time), self.schedule.sigma(time)
        scaled = centred * torch.sqrt((alpha**2 * self.variances + sigma**2) / variances)
        return alpha * self.mean + scaled @ self.basis.T
