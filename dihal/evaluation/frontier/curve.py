"""Curves in the plane of entropy and likelihood: a value at an entropy, and the area.

A curve joins the points of one row at one number of steps in the order of temperature by straight lines. Every
function works on many resamples of the curve at once: arrays are (resamples, points).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from dihal.errors import UsageError

__all__ = ["area", "at_entropy"]

_STRIPS = 256
"""Midpoints of the integral behind the area."""


def at_entropy(
    entropy: Float[np.ndarray, "resamples points"],
    nll: Float[np.ndarray, "resamples points"],
    value: Float[np.ndarray, "resamples points"],
    at: float,
) -> Float[np.ndarray, " resamples"]:
    """Return ``value`` where the curve has entropy ``at``, linear between neighbouring points; NaN outside their range.

    A curve that passes the entropy more than once counts where its NLL is lowest. Nothing is extrapolated; a single
    point counts at its own entropy only.
    """
    index, weight = _crossing(entropy, nll, at)
    rows = np.arange(len(entropy))
    following = np.minimum(index + 1, entropy.shape[1] - 1)
    found = (1 - weight) * value[rows, index] + weight * value[rows, following]
    return np.where(np.isnan(weight), np.nan, found)


def _crossing(entropy: np.ndarray, nll: np.ndarray, at: float) -> tuple[np.ndarray, np.ndarray]:
    """First point of the segment that counts, and the weight of its second; NaN where no segment reaches ``at``."""
    if entropy.shape[1] == 1:
        inside = np.isclose(entropy[:, 0], at, rtol=0, atol=1e-9)
        return np.zeros(len(entropy), dtype=int), np.where(inside, 0.0, np.nan)
    left, right = entropy[:, :-1], entropy[:, 1:]
    step = right - left
    weight = np.divide(at - left, step, out=np.zeros_like(left), where=step != 0)
    inside = (np.minimum(left, right) <= at) & (at <= np.maximum(left, right))
    height = np.where(inside, (1 - weight) * nll[:, :-1] + weight * nll[:, 1:], np.inf)
    index = height.argmin(1)
    rows = np.arange(len(entropy))
    return index, np.where(np.isfinite(height[rows, index]), weight[rows, index], np.nan)


def area(
    entropy: Float[np.ndarray, "resamples points"],
    nll: Float[np.ndarray, "resamples points"],
    *,
    low: float,
    high: float,
    reference: float,
) -> Float[np.ndarray, " resamples"]:
    """Return the area that a curve dominates, per nat of entropy: the mean over e in [low, high] of how far it gets
    below ``reference`` at an entropy of at least e (0 where it does not reach e).

    This is the hypervolume of multi-objective optimisation (Zitzler & Thiele 1998), so that it is defined for every
    curve and never falls when a point is added. In nats; higher is better.

    Raises:
        UsageError: an empty range.
    """
    if not low < high:
        raise UsageError(f"the range of the frontier area must rise, got {low} to {high}.")
    places = low + (np.arange(_STRIPS) + 0.5) * (high - low) / _STRIPS
    total = np.zeros(len(entropy))
    for place in places:
        # The lowest NLL at entropies >= e of a curve made of straight lines is at a point or at e itself.
        points = np.where(entropy >= place, nll, np.inf).min(1)
        here = at_entropy(entropy, nll, nll, place)
        best = np.fmin(points, here)
        total += np.clip(reference - best, 0, None)
    return total / _STRIPS
