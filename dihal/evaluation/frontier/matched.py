"""A curve's values at one entropy, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from dihal.evaluation.bootstrap import Interval
from dihal.evaluation.definitions import ratio
from dihal.evaluation.frontier.assemble import resample_weights
from dihal.evaluation.frontier.curve import at_entropy
from dihal.evaluation.frontier.definitions import METRICS
from dihal.evaluation.frontier.result import FrontierRow, Point

__all__ = ["Bundle", "Matched", "interval", "matched"]


@dataclass(frozen=True, kw_only=True)
class Matched:
    """A curve at one entropy.

    A curve that lies above the entropy counts where its NLL is lowest: text of more entropy than asked, so no easier.
    All null where the curve stays below.
    """

    entropy: float
    where: Interval
    """Entropy of the values: ``entropy``, or that of the point of lowest NLL of a curve above it."""
    nll: Interval
    agreement: Interval
    behind: Interval
    """NLL minus that of the backbone's own sampling at the same entropy, paired by document."""


class Bundle:
    """One curve on the whole sample (first) and on every resample: (1 + resamples, points) by metric."""

    def __init__(self, row: FrontierRow, points: Sequence[Point], axis: str) -> None:
        weights = resample_weights(row)
        rows = np.concatenate([np.ones((1, weights.shape[1])), weights])
        sums = [row.sums(point) for point in points]
        self.nll, self.agreement, self.entropy = (
            np.stack([ratio(METRICS[name], own, rows) for own in sums], axis=1) for name in ("nll", "agreement", axis)
        )

    def at(self, value: np.ndarray, entropy: float) -> np.ndarray:
        return at_entropy(self.entropy, self.nll, value, entropy)


def interval(value: float, resampled: Float[np.ndarray, " resamples"], confidence: float) -> Interval:
    """Percentile interval of a value that may be undefined, here (null) or on some resamples."""
    if not math.isfinite(value):
        return Interval(value=None, low=None, high=None)
    tail = (1.0 - confidence) / 2.0
    finite = resampled[np.isfinite(resampled)]
    # Where many resamples leave the range of the curve, the others are no fair sample of it.
    if len(finite) < (1.0 - tail) * len(resampled):
        return Interval(value=value, low=None, high=None)
    low, high = np.quantile(finite, [tail, 1.0 - tail])
    return Interval(value=value, low=float(low), high=float(high))


def matched(bundle: Bundle, anchor: Bundle | None, place: float, confidence: float) -> Matched:
    """Values of a curve at an entropy, beside those of ``anchor``."""

    def of(values: np.ndarray) -> Interval:
        return interval(float(values[0]), values[1:], confidence)

    where = np.full(len(bundle.entropy), place)
    nll, agreement = bundle.at(bundle.nll, place), bundle.at(bundle.agreement, place)
    if (bundle.entropy[0] > place).all():
        best = bundle.nll[0].argmin()
        where, nll, agreement = bundle.entropy[:, best], bundle.nll[:, best], bundle.agreement[:, best]
    elif not math.isfinite(nll[0]):
        where = np.full_like(where, np.nan)
    behind = np.full_like(nll, np.nan)
    if anchor is not None and math.isfinite(where[0]):
        behind = nll - anchor.at(anchor.nll, float(where[0]))
    return Matched(entropy=place, where=of(where), nll=of(nll), agreement=of(agreement), behind=of(behind))
