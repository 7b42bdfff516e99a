"""The three proxies and the score as pure functions. Definitions: docs of each function.

Every function takes leading batch dimensions, so that a bootstrap resample is one more row.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dihal.errors import unknown_name

__all__ = [
    "RANKS",
    "STIFFNESSES",
    "effective_rank",
    "global_stiffness",
    "mean_pairwise_cosine",
    "score",
    "spearman",
    "weighted_median",
    "z_scores",
]

Eigenvalues = Float[Tensor, "*batch dim"]
Scalar = Float[Tensor, "*batch"]


def _smallest_precision(e: Tensor, ridge: Tensor) -> Tensor:
    return -torch.log(e.amax(-1) + ridge)


def _mean_precision(e: Tensor, ridge: Tensor) -> Tensor:
    return torch.log((1 / (e + ridge[..., None])).mean(-1))


def _log_det(e: Tensor, ridge: Tensor) -> Tensor:
    return -torch.log(e + ridge[..., None]).mean(-1)


STIFFNESSES = {
    "smallest_precision": (
        _smallest_precision,
        "-log(e_1 + rho mu): log of the smallest eigenvalue of (S + rho mu I)^-1",
    ),
    "mean_precision": (_mean_precision, "log of the mean over i of 1 / (e_i + rho mu)"),
    "log_det": (_log_det, "log det (S + rho mu I)^-1 / d = -mean over i of log(e_i + rho mu)"),
}
"""Name -> (function of eigenvalues and ridge, formula). mu = tr(S) / d."""


def global_stiffness(eigenvalues: Eigenvalues, *, rho: float, kind: str = "smallest_precision") -> Scalar:
    """Stiffness of the regularised Gaussian score, in log units (nats).

    Every kind moves by -2 log a under h -> a h.

    Args:
        eigenvalues: of the covariance, any order, non-negative.
        rho: ridge in units of the mean eigenvalue, >= 0.
        kind: a key of :data:`STIFFNESSES`.

    Raises:
        UsageError: unknown kind.
    """
    if kind not in STIFFNESSES:
        raise unknown_name("stiffness", kind, STIFFNESSES)
    return STIFFNESSES[kind][0](eigenvalues, rho * eigenvalues.mean(-1))


def _entropy(e: Tensor) -> Tensor:
    share = e / e.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1)


def _participation(e: Tensor) -> Tensor:
    return 2 * torch.log(e.sum(-1)) - torch.log(e.square().sum(-1))


RANKS = {
    "entropy": (_entropy, "log exp(H(e / sum e)) = entropy of the normalised spectrum, in nats"),
    "participation": (_participation, "log of (sum e)^2 / sum e^2"),
}
"""Name -> (function of eigenvalues, formula)."""


def effective_rank(eigenvalues: Eigenvalues, *, kind: str = "entropy") -> Scalar:
    """Log effective rank, in [0, log d] (nats). Unchanged by h -> a h.

    Args:
        eigenvalues: of the covariance, any order, non-negative, not all zero.
        kind: a key of :data:`RANKS`.

    Raises:
        UsageError: unknown kind.
    """
    if kind not in RANKS:
        raise unknown_name("rank", kind, RANKS)
    return RANKS[kind][0](eigenvalues)


def weighted_median(values: Float[Tensor, "... n"], weights: Int[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """Median of ``values`` (of each row, or one list for all rows), each repeated ``weights`` times; the mean of the two middle ones where even.

    NaN where the weights of a row are all zero.
    """
    ascending, order = values.sort(-1)
    cumulative = weights.gather(-1, order.expand_as(weights)).cumsum(-1)
    total = cumulative[..., -1:]
    # 0-based ranks of the middle elements of the repeated list: (total - 1) // 2 and total // 2
    last = values.shape[-1] - 1
    ends = []
    for rank in (total - 1, total):
        middle = torch.div(rank, 2, rounding_mode="floor")
        index = torch.searchsorted(cumulative, middle, right=True).clamp_max(last)
        ends.append(ascending.expand(weights.shape).gather(-1, index))
    return torch.where(total > 0, (ends[0] + ends[1]) / 2, torch.nan).squeeze(-1)


def z_scores(
    values: Float[Tensor, "*batch layers"], candidates: Bool[Tensor, "layers"]
) -> Float[Tensor, "*batch layers"]:
    """(v - mean) / std over the candidate layers (divisor n); zero where candidates do not differ."""
    inside = values[..., candidates]
    mean = inside.mean(-1, keepdim=True)
    std = inside.std(-1, keepdim=True, correction=0)
    # Equal up to rounding is equal: a z-score of noise would decide the layer.
    flat = std <= 1e-9 * inside.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    return torch.where(flat, 0.0, (values - mean) / std.masked_fill(flat, 1.0))


def score(
    curvature: Float[Tensor, "*batch layers"],
    stiffness: Float[Tensor, "*batch layers"],
    rank: Float[Tensor, "*batch layers"],
    candidates: Bool[Tensor, "layers"],
) -> Float[Tensor, "*batch layers"]:
    """Score(l) = z(kappa) + z(s) - z(r); larger is more diffusion-friendly."""
    return z_scores(curvature, candidates) + z_scores(stiffness, candidates) - z_scores(rank, candidates)


def mean_pairwise_cosine(unit_sum_square: float, count: int) -> float:
    """Mean cosine over pairs of different tokens, from |sum of unit vectors|^2 and their number (>= 2)."""
    return (unit_sum_square - count) / (count * (count - 1))


def _ranks(values: Tensor) -> Tensor:
    # average rank of ties
    less = (values[None, :] < values[:, None]).sum(1)
    same = (values[None, :] == values[:, None]).sum(1)
    return less.double() + (same.double() - 1) / 2


def spearman(a: Float[Tensor, "n"], b: Float[Tensor, "n"]) -> float:
    """Spearman rank correlation, ties by average rank; NaN where one side is constant."""
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return float((x * y).sum() / scale) if scale > 0 else float("nan")
