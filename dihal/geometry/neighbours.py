"""Exact nearest neighbours of anchor tokens, and the local curvature around them.

Two steps, so that fp32 is enough. *Candidates*: k + 8 per anchor, from |x|^2 - 2 a.x of centred
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

_MARGIN = 8  # candidates beyond k that are re-ranked exactly
_GROUPS = 16  # points per group in the candidate search
_ANCHORS_AT_ONCE = 512  # bounds the matrix of scores
_GATHER_AT_ONCE = 32  # anchors whose candidates are gathered together: fits a core's cache


@dataclass(frozen=True, kw_only=True)
class LocalSpread:
    """Neighbourhoods of the anchors."""

    variance: Float[Tensor, "anchors"]
    """tr(Cov of the k nearest neighbours) / d, divisor k - 1, fp64."""
    nearest: Float[Tensor, "anchors"]
    """Squared distance to the nearest neighbour / d, fp64."""
    farthest: Float[Tensor, "anchors"]
    """Squared distance to the k-th neighbour / d, fp64."""


def _smallest(scores: Tensor, count: int) -> Tensor:
    """Columns of the ``count`` smallest entries of each row, exactly.

    The smallest entries lie in the ``count`` groups with the smallest minima, so only those are
    searched: about half the time of a plain top-k.
    """
    rows, columns = scores.shape
    per_group = columns // _GROUPS
    if per_group < 2 * count:
        return scores.topk(count, largest=False).indices
    body = scores[:, : per_group * _GROUPS]
    minima = body.unflatten(1, (_GROUPS, per_group)).amin(1)
    groups = minima.topk(count, largest=False, sorted=False).indices
    steps = torch.arange(_GROUPS, device=scores.device) * per_group
    members = (groups[:, None, :] + steps[None, :, None]).flatten(1)
    tail = torch.arange(per_group * _GROUPS, columns, device=scores.device).expand(rows, -1)
    members = torch.cat([members, tail], dim=1)
    return members.gather(1, scores.gather(1, members).topk(count, largest=False).indices)


def candidates(
    points: Float[Tensor, "points dim"], anchors: Int[Tensor, "anchors"], count: int
) -> Int[Tensor, "anchors {count}"]:
    """Indices of the ``count`` points nearest to each anchor by fp32 scores, the anchor itself excluded.

    ``points`` should be centred: the scores lose digits in proportion to the squared norms.
    """
    squared = torch.linalg.vector_norm(points, dim=1).square()
    found = []
    for block in anchors.split(_ANCHORS_AT_ONCE):
        scores = torch.addmm(squared[None, :], points[block], points.mT, alpha=-2)
        scores[torch.arange(len(block), device=block.device), block] = torch.inf
        found.append(_smallest(scores, count))
    return torch.cat(found)


def local_spread(points: Float[Tensor, "points dim"], anchors: Int[Tensor, "anchors"], k: int) -> LocalSpread:
    """Trace of the covariance of each anchor's k nearest neighbours.

    Args:
        points: (P, d), P > k, fp32 or fp64, centred.
        anchors: indices into ``points``.
        k: neighbours per anchor, >= 2; the anchor is not its own neighbour.
    """
    assert 2 <= k < len(points), "k must be at least 2 and below the number of points"
    indices = candidates(points, anchors, min(k + _MARGIN, len(points) - 1))
    variance, nearest, farthest = [], [], []
    for rows, block in zip(indices.split(_GATHER_AT_ONCE), anchors.split(_GATHER_AT_ONCE)):
        offset = points[rows]
        offset -= points[block, None]
        distance = torch.linalg.vector_norm(offset, dim=-1).square()
        chosen = distance.topk(k, largest=False, sorted=True)
        weight = torch.zeros_like(distance).scatter_(1, chosen.indices, 1.0)
        # Centre a second time: around an outlying anchor the spread is far smaller than the distance.
        offset -= torch.bmm(weight[:, None], offset) / k
        spread = torch.linalg.vector_norm(offset, dim=-1).square()
        variance.append((spread * weight).sum(1).double() / (k - 1))
        nearest.append(chosen.values[:, 0].double())
        farthest.append(chosen.values[:, -1].double())
    dim = points.shape[1]
    return LocalSpread(
        variance=torch.cat(variance) / dim, nearest=torch.cat(nearest) / dim, farthest=torch.cat(farthest) / dim
    )


def curvature(variance: Float[Tensor, "anchors"], mean_eigenvalue: float) -> Float[Tensor, "anchors"]:
    """-log of each local variance, floored at ``FLOOR * mean_eigenvalue`` (identical neighbours have none)."""
    return -torch.log(variance.clamp_min(FLOOR * mean_eigenvalue))
