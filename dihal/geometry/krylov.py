"""What is known of a spectrum without solving for it: a few matrix-vector products instead of d^3.

Lanczos' recurrence (Golub and Van Loan 2013, Sec. 10.1) on several matrices at once, because on a GPU
each small operation costs a launch. In fp32; the small tridiagonal problems are solved on the host.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from dihal.geometry.moments import spectrum

__all__ = ["largest_eigenvalues", "spectra_with_sinks"]

_STAGES = (32, 64, 128, 256)
"""Steps after which the host looks whether the largest values have converged."""
_RESIDUAL = 1e-4
"""Relative residual at which a value is taken: it bounds the error, which is of the order of its square."""


def _start(matrices: Tensor) -> Tensor:
    """The column of the largest variance, and a little of everything."""
    count, dim = matrices.shape[:2]
    place = matrices.diagonal(dim1=1, dim2=2).argmax(1)
    column = matrices[torch.arange(count, device=matrices.device), place]
    wave = torch.cos(torch.arange(dim, device=matrices.device, dtype=torch.float64).square() * 0.7390851)
    column = column / column.norm(dim=1, keepdim=True).clamp_min(1e-30)
    start = column + 0.1 * (wave / wave.norm()).to(matrices.dtype)
    return start / start.norm(dim=1, keepdim=True)


def _ritz(alphas: list[Tensor], betas: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Ritz values, ascending, and their residuals, (matrices, steps), on the host."""
    numbers = torch.stack([*alphas, *betas]).double().cpu()
    diagonal, beside = numbers[: len(alphas)].mT, numbers[len(alphas) :].mT
    small = torch.diag_embed(diagonal) + torch.diag_embed(beside[:, :-1], 1) + torch.diag_embed(beside[:, :-1], -1)
    values, vectors = torch.linalg.eigh(small)
    return values, (vectors[:, -1] * beside[:, -1:]).abs()


def largest_eigenvalues(covariances: list[Float[Tensor, "dim dim"]]) -> Float[Tensor, "matrices"]:
    """e_1 of each matrix, to about 1e-6 relative, fp64 on the host.

    A Ritz value lies within its residual of an eigenvalue (Parlett 1998, Theorem 4.5.1). Lost orthogonality repeats
    values that have converged and harms none, so nothing is orthogonalised again. Where the last stage has not
    converged, the whole spectrum is computed.
    """
    dim = covariances[0].shape[0]
    if dim <= _STAGES[0]:
        return torch.stack([spectrum(matrix)[0].cpu() for matrix in covariances])
    matrices = torch.stack([matrix.float() for matrix in covariances])
    vector, before = _start(matrices), torch.zeros_like(matrices[:, 0])
    beta = torch.zeros(len(matrices), 1, device=matrices.device)
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    for stage in (stage for stage in _STAGES if stage < dim):
        while len(alphas) < stage:
            image = torch.bmm(matrices, vector[:, :, None]).squeeze(2)
            alpha = (image * vector).sum(1, keepdim=True)
            image = image - alpha * vector - beta * before
            beta = image.norm(dim=1, keepdim=True)
            before, vector = vector, image / beta.clamp_min(1e-30)
            alphas.append(alpha.squeeze(1))
            betas.append(beta.squeeze(1))
        values, residuals = _ritz(alphas, betas)
        if bool((residuals[:, -1] <= _RESIDUAL * values[:, -1]).all()):
            return values[:, -1]
    settled = residuals[:, -1] <= _RESIDUAL * values[:, -1]
    exact = [values[i, -1] if settled[i] else spectrum(matrix)[0].cpu() for i, matrix in enumerate(covariances)]
    return torch.stack(exact)


_TOP = 48
"""Steps of the recurrence where sinks are added to a known spectrum."""


def spectra_with_sinks(
    known: list[Float[Tensor, "dim"]], covariances: list[Float[Tensor, "dim dim"]]
) -> list[Float[Tensor, "dim"]]:
    """Approximate eigenvalues of covariances that differ by a few tokens from ones whose spectrum is known.

    A few dropped tokens add a few directions. The largest eigenvalues are found by Lanczos, with full
    orthogonalisation so that none is repeated; those that have converged are taken. Below the last of them the known
    spectrum goes on, scaled to the trace. Good to about 0.02 in the log effective rank (a test), which is
    enough to say what the sinks do; the proxies themselves never come from here.

    Args:
        known: eigenvalues without the sinks, falling.
        covariances: with them.
    """
    matrices = torch.stack([matrix.float() for matrix in covariances])
    steps = min(_TOP, matrices.shape[1] - 1)
    basis = _start(matrices)[:, None]
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    for _ in range(steps):
        image = torch.bmm(matrices, basis[:, -1, :, None])
        alphas.append((basis[:, -1] * image.squeeze(2)).sum(1))
        for _ in range(2):  # twice is enough (Kahan and Parlett)
            image = image - torch.bmm(basis.mT, torch.bmm(basis, image))
        betas.append(image.squeeze(2).norm(dim=1))
        basis = torch.cat([basis, image.mT / betas[-1].clamp_min(1e-30)[:, None, None]], dim=1)
    values, residuals = _ritz(alphas, betas)
    traces = matrices.diagonal(dim1=1, dim2=2).double().sum(1).cpu()
    return [_joined(*item).to(matrices.device) for item in zip(known, values.flip(1), residuals.flip(1), traces)]


def _joined(known: Tensor, ritz: Tensor, residual: Tensor, trace: Tensor) -> Tensor:
    """Converged largest values, then the known spectrum in proportion to what is left of the trace."""
    known = known.double().cpu()
    converged = int((residual <= 1e-2 * ritz.clamp_min(0)).long().cumprod(0).sum())
    top = ritz[: max(converged, 1)]
    rest = (trace - top.sum()).clamp_min(0)
    # As many values as there are left; the ones that the largest have taken the place of are the largest known.
    below = known[known * (rest / known.sum().clamp_min(1e-300)).clamp_max(1.0) <= top[-1]][: len(known) - len(top)]
    below = torch.cat([below, below.new_zeros(len(known) - len(top) - len(below))])
    return torch.cat([top, below * (rest / below.sum().clamp_min(1e-300))])
