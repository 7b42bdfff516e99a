"""Exact nearest neighbours of anchor tokens, and the local curvature around them.

Two steps, so that fp32 is enough. *Candidates*: a few more than k per anchor, from |x|^2 - 2 a.x of centred
points (one matrix product); rounding there can only reorder points whose squared distances differ
by about 1e-6 of the squared norms. *Re-ranking*: candidates are gathered, the anchor subtracted
(exact to one rounding per channel) and their distances taken from the differences; the k smallest
are the neighbours. No d x d matrix is ever formed for an anchor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["FLOOR", "LocalSpread", "candidates", "curvature", "local_spread"]

FLOOR = 1e-8
"""Smallest local variance told apart from a duplicate, as a share of the mean eigenvalue of the layer.

A share, so that a scale h -> a h still moves the curvature by exactly -2 log a."""

_MARGIN = 4  # candidates beyond k that are re-ranked exactly
_GROUPS = 16  # points per group in the candidate search
_ANCHORS_AT_ONCE = {"cpu": 128, "cuda": 1024}  # bounds the matrix of scores; few launches
_GATHER_AT_ONCE = {"cpu": 2**18, "cuda": 2**25}  # numbers gathered together: a core's cache; few launches


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
    found = []
    for block in anchors.split(_ANCHORS_AT_ONCE["cuda" if points.is_cuda else "cpu"]):
        scores = torch.addmm(squared[None, :], points[block], points.mT, alpha=-2)
        scores[torch.arange(len(block), device=block.device), block] = torch.inf
        found.append(_smallest(scores, count))
    return torch.cat(found)


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
        offset = points.index_select(0, rows.flatten()).unflatten(0, rows.shape)
        offset -= points[block, None]
        distance = torch.linalg.vector_norm(offset, dim=-1).square()
        chosen = distance.topk(k, largest=False, sorted=True)
        weight = torch.zeros_like(distance).scatter_(1, chosen.indices, 1.0)
        # Centre a second time: around an outlying anchor the spread is far smaller than the distance.
        offset -= torch.bmm(weight[:, None], offset) / k
        spread = torch.linalg.vector_norm(offset, dim=-1).square().gather(1, chosen.indices)
        parts.append((rows.gather(1, chosen.indices), chosen.values, spread))
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
