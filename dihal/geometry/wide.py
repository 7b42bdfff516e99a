"""Stiffness and rank of wide covariances: e_1 by a filtered block, the rank by norms or log-determinants.

All coordinates of a layer at once, in fp32 (what the sums of products are good to), and nothing but a few small
matrices is waited for: the ranks are numbers on the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dihal.config import ScoreConfig
from dihal.geometry.functionals import entropy
from dihal.geometry.moments import spectrum
from dihal.geometry.proxies import effective_rank
from dihal.geometry.subspace import Largest, Size, largest_values

__all__ = ["Extremes", "extremes", "log_rank", "rank_with_sinks"]

_CONVERGED = 1e-2
"""Relative residual up to which a Ritz value stands for an eigenvalue where sinks are compared."""


@dataclass(frozen=True, kw_only=True)
class Extremes:
    """What is known of the large end of several spectra, on the host, fp64.

    Attributes:
        largest: e_1 of each matrix.
        traces: sum of all eigenvalues of each.
        squares: sum of all eigenvalues squared of each.
        found: the block they come from.
    """

    largest: list[float]
    traces: list[float]
    squares: list[float]
    found: Largest

    def top(self, i: int) -> Tensor:
        """The converged largest values, falling, at least one."""
        values, residuals = self.found.values[i], self.found.residuals[i]
        converged = int((residuals <= _CONVERGED * values.clamp_min(0)).long().cumprod(0).sum())
        return torch.cat([torch.tensor([self.largest[i]], dtype=torch.float64), values[1 : max(converged, 1)]])


def extremes(
    covariances: list[Float[Tensor, "dim dim"]], start: Largest | None = None, *, error: float | None = None
) -> Extremes:
    """e_1, trace and Frobenius norm of each covariance.

    Args:
        covariances: fp32.
        start: what was found of matrices much like them.
        error: relative error of e_1 that is enough (see :func:`largest_values`); None: about 1e-6.
    """
    size = Size(covariances)
    found = largest_values(covariances, None if start is None else start.block, size=size, error=error)
    settled = found.settled.tolist()
    largest = [
        float(found.values[i, 0]) if settled[i] else float(spectrum(covariance)[0])
        for i, covariance in enumerate(covariances)
    ]
    return Extremes(largest=largest, traces=size.traces, squares=size.squares, found=found)


def log_rank(covariance: Float[Tensor, "dim dim"], known: Extremes, i: int, config: ScoreConfig) -> Float[Tensor, ""]:
    """Log effective rank, fp64; NaN where it must be solved for."""
    if config.rank == "participation":
        return torch.tensor(2 * math.log(known.traces[i]) - math.log(known.squares[i]), dtype=torch.float64)
    found = entropy(covariance, known.largest[i] * covariance.shape[0] / known.traces[i])
    return effective_rank(spectrum(covariance).double(), kind=config.rank) if found is None else found


def rank_with_sinks(
    rank: Float[Tensor, ""],
    without: Extremes,
    both: Extremes,
    i: int,
    covariance: Float[Tensor, "dim dim"],
    config: ScoreConfig,
) -> Float[Tensor, ""]:
    """Log effective rank of kept and dropped tokens together; for comparison only.

    The participation ratio needs a norm. For the entropy, a few dropped tokens add a few directions: the converged
    largest values are taken; below the last of them the known spectrum goes on, scaled to the trace, so that its sum of
    e log e follows from the known rank. Good to about 0.02 (a test).

    Args:
        rank: without the sinks.
        without: extremes without them.
        both: extremes with them.
        i: which of the matrices.
        covariance: with the sinks.
        config: definition of the rank.
    """
    if config.rank == "participation":
        return log_rank(covariance, both, i, config)
    top, trace = both.top(i), torch.tensor(both.traces[i], dtype=torch.float64)
    known, total = without.found.values[i], torch.tensor(without.traces[i], dtype=torch.float64)
    replaced = known[known > top[-1]]
    rest, left = (trace - top.sum()).clamp_min(0), total - replaced.sum()
    scale = (rest / left.clamp_min(1e-9 * total)).clamp_min(1e-30)
    # sum of e log e: of the known spectrum less what is replaced, scaled, and of the values in their place.
    fixed = (top * top.log()).sum() - scale * (replaced * replaced.log()).sum() + rest * scale.log()
    fixed = fixed + scale * total * total.log()
    return float(trace.log() - fixed / trace) + float(scale * total / trace) * rank
