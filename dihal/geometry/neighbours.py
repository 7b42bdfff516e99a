"""Exact nearest neighbours of anchor tokens, and the local curvature around them.

Two steps, so that fp32 is enough. *Candidates*: a few more than k per anchor, from |x|^2 - 2 a.x of centred
points (one matrix product); rounding there can only reorder points whose squared distances differ
by about 1e-6 of the squared norms. *Re-ranking*: candidates are gathered, the anchor subtracted
(exact to one rounding per channel) and their distances taken from the differences; the k smallest
are the neighbours. No d x d matrix is ever formed for an anchor.

On a GPU the product is one of bf16 numbers: each fp32 number x is hi + lo + r with hi, lo in bf16 and |r| <= 2^-17 |x|, and
hi.hi + hi.lo + lo.hi, summed in fp32, differs from a.x by at most 2^-15 sum_i |a_i x_i|, by chance (roundings of d channels
are independent) by about 2^-16 |a| |x| / sqrt(d): 3e-7 at d = 4,096. A third of the time of an fp32 product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dihal.geometry.moments import half_product

__all__ = ["FLOOR", "LocalSpread", "candidates", "curvature", "local_spread"]

FLOOR = 1e-8
"""Smallest local variance told apart from a duplicate, as a share of the mean eigenvalue of the layer.

A share, so that a scale h -> a h still moves the curvature by exactly -2 log a."""

_MARGIN = 4  # candidates beyond k that are re-ranked exactly
_GROUPS = 16  # points per group in the candidate search
_ANCHORS_AT_ONCE = {"cpu": 128, "cuda": 1024}  # bounds the matrix of scores; few launches
_GATHER_AT_ONCE = {"cpu": 2**18, "cuda": 2**27}  # numbers gathered together: a core's cache; few launches


@dataclass(frozen=True, kw_only=True)
class LocalSpread:
    """Neighbourhoods of the anchors."""

    variance: Float[Tensor, "anchors"]
    """tr(Cov of the k nearest neighbours) / d, divisor k - 1, fp64."""
    nearest: Float[Tensor, "anchors"]
    """Squared distance to the nearest neighbour / d, fp64."""
    farthest: Float[Tensor, "anchors"]
    """Squared distance to the k-th neighbour / d, fp64."""
    neighbours: Int[Tensor, "anchors k"]
    """Indices of the neighbours, nearest first."""
    spread: Float[Tensor, "anchors k"]
    """Squared distance of each neighbour to their mean, fp64."""
    distance: Float[Tensor, "anchors k"]
    """Squared distance of each neighbour to the anchor, fp64."""

    @property
    def influence(self) -> Float[Tensor, "anchors k"]:
        """Change of log variance per unit of weight added to each neighbour (see :func:`_influence`), fp64."""
        total = self.spread.sum(1, keepdim=True)
        share = self.spread / total.clamp_min(torch.finfo(torch.float64).tiny)
        return torch.where(total > 0, _influence(share, self.distance), 0.0)


def _smallest(scores: Tensor, count: int) -> Tensor:
    """Columns of the ``count`` smallest entries of each row, exactly.

    The smallest entries lie in the ``count`` groups with the smallest minima, so only those are
    searched: about half the time of a plain top-k.
    """
    rows, columns = scores.shape
    per_group = columns // _GROUPS
    if per_group < 2 * count:
        return scores.topk(count, largest=False, sorted=False).indices
    body = scores[:, : per_group * _GROUPS]
    minima = body.unflatten(1, (_GROUPS, per_group)).amin(1)
    groups = minima.topk(count, largest=False, sorted=False).indices
    steps = torch.arange(_GROUPS, device=scores.device) * per_group
    members = (groups[:, None, :] + steps[None, :, None]).flatten(1)
    tail = torch.arange(per_group * _GROUPS, columns, device=scores.device).expand(rows, -1)
    members = torch.cat([members, tail], dim=1)
    return members.gather(1, scores.gather(1, members).topk(count, largest=False, sorted=False).indices)


def candidates(
    points: Float[Tensor, "points dim"], anchors: Int[Tensor, "anchors"], count: int
) -> Int[Tensor, "anchors {count}"]:
    """Indices of the ``count`` points nearest to each anchor by fp32 scores, the anchor itself excluded.

    ``points`` should be centred: the scores lose digits in proportion to the squared norms.
    """
    squared = torch.linalg.vector_norm(points, dim=1).square()
    halves = _halves(points) if _splits(points) else None
    found = []
    for block in anchors.split(_ANCHORS_AT_ONCE["cuda" if points.is_cuda else "cpu"]):
        if halves is None:
            scores = torch.addmm(squared[None, :], points[block], points.mT, alpha=-2)
        else:
            scores = torch.add(squared[None, :], _split_product(halves, block), alpha=-2)
        scores[torch.arange(len(block), device=block.device), block] = torch.inf
        found.append(_smallest(scores, count))
    return torch.cat(found)


def _splits(points: Tensor) -> bool:
    return points.is_cuda and points.dtype == torch.float32


def _halves(points: Float[Tensor, "points dim"]) -> tuple[Tensor, Tensor]:
    """Two bf16 numbers whose sum is each point to 17 bits."""
    high = points.bfloat16()
    return high, torch.sub(points, high, out=torch.empty_like(high))


def _split_product(halves: tuple[Tensor, Tensor], block: Tensor) -> Float[Tensor, "block points"]:
    """Products of some points with all, from halves; that of the two low ones is below what is left out."""
    high, low = halves
    near_high, near_low = high.index_select(0, block), low.index_select(0, block)
    product = half_product(near_high, high.mT)
    return product.add_(half_product(near_high, low.mT)).add_(half_product(near_low, high.mT))


def _influence(share: Tensor, distance: Tensor) -> Tensor:
    """How log(tr Cov) moves when neighbour j counts 1 + w_j times, per w_j, to first order.

    Two effects. At a fixed radius the mean of |x_j - mean|^2 is re-weighted: (|x_j - mean|^2 / tr - 1) / k.
    And the k nearest reach less far: with m the local dimension, a share w / k more points shrinks
    squared lengths by 2 w / (k m). m is estimated from the neighbours' own distances (Levina and
    Bickel 2004, Eq. 8), at least 1.

    Args:
        share: |x_j - mean|^2 / sum over j, (anchors, k).
        distance: squared distance to the anchor, ascending, (anchors, k).
    """
    k = share.shape[1]
    ratio = distance / distance[:, -1:].clamp_min(torch.finfo(distance.dtype).tiny)
    inverse_dimension = (-0.5 * torch.log(ratio.clamp_min(1e-12)).sum(1, keepdim=True) / (k - 1)).clamp_max(1.0)
    return torch.where(distance[:, -1:] > 0, share - (1 + 2 * inverse_dimension) / k, 0.0)


def _measured_on_cpu(
    points: Tensor, near: Tensor, rows: Tensor, anchors: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The k nearest of the candidates, their squared distances to the anchor and to their own mean, each (anchors, k).

    Args:
        points: all points.
        near: the candidates, (anchors, candidates, dim); overwritten.
        rows: their indices, (anchors, candidates).
        anchors: indices of the anchors.
        k: neighbours.
    """
    near -= points[anchors, None]
    distance = torch.linalg.vector_norm(near, dim=-1).square()
    chosen = distance.topk(k, largest=False, sorted=True)
    weight = torch.zeros_like(distance).scatter_(1, chosen.indices, 1.0)
    # Centre a second time: around an outlying anchor the spread is far smaller than the distance.
    near -= torch.bmm(weight[:, None], near) / k
    spread = torch.linalg.vector_norm(near, dim=-1).square().gather(1, chosen.indices)
    return rows.gather(1, chosen.indices), chosen.values, spread


def _measured_on_gpu(
    points: Tensor, near: Tensor, rows: Tensor, anchors: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`_measured_on_cpu` in half of the passes over ``near``, which are what takes the time there.

    Distances are sums of squared differences all the same. That the mean is rounded at the size of the points, not of
    their differences, moves the sum of the spreads by k times the square of that: 1e-14 of the squared norms.
    """
    distance = _squared_distances(near, points[anchors])
    chosen = distance.topk(k, largest=False, sorted=True)
    neighbours = rows.gather(1, chosen.indices)
    mean = F.embedding_bag(neighbours, points, mode="mean")
    return neighbours, chosen.values, _squared_distances(near, mean).gather(1, chosen.indices)


def _squared_distances(near: Float[Tensor, "a c dim"], centre: Float[Tensor, "a dim"]) -> Float[Tensor, "a c"]:
    # Never by products: those of points near each other cancel.
    return torch.cdist(centre[:, None], near, compute_mode="donot_use_mm_for_euclid_dist").squeeze(1).square()


def local_spread(points: Float[Tensor, "points dim"], anchors: Int[Tensor, "anchors"], k: int) -> LocalSpread:
    """Trace of the covariance of each anchor's k nearest neighbours.

    Args:
        points: (P, d), P > k, fp32 or fp64, centred.
        anchors: indices into ``points``.
        k: neighbours per anchor, >= 2; the anchor is not its own neighbour.
    """
    assert 2 <= k < len(points), "k must be at least 2 and below the number of points"
    indices = candidates(points, anchors, min(k + _MARGIN, len(points) - 1))
    parts: list[tuple[Tensor, ...]] = []
    at_once = max(1, _GATHER_AT_ONCE["cuda" if points.is_cuda else "cpu"] // (indices.shape[1] * points.shape[1]))
    for rows, block in zip(indices.split(at_once), anchors.split(at_once)):
        # index_select copies whole rows; indexing with a matrix of indices takes three times as long.
        near = points.index_select(0, rows.flatten()).unflatten(0, rows.shape)
        measured = _measured_on_gpu if points.is_cuda else _measured_on_cpu
        parts.append(measured(points, near, rows, block, k))
    neighbours, near, spread = (torch.cat(columns) for columns in zip(*parts))
    near, spread = near.double(), spread.double()
    dim = points.shape[1]
    return LocalSpread(
        variance=spread.sum(1) / (k - 1) / dim,
        nearest=near[:, 0] / dim,
        farthest=near[:, -1] / dim,
        neighbours=neighbours,
        spread=spread,
        distance=near,
    )


def curvature(variance: Float[Tensor, "anchors"], mean_eigenvalue: float) -> Float[Tensor, "anchors"]:
    """-log of each local variance, floored at ``FLOOR * mean_eigenvalue`` (identical neighbours have none)."""
    return -torch.log(variance.clamp_min(FLOOR * mean_eigenvalue))
