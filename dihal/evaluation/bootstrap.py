"""Document bootstrap: percentile intervals of ratios of sums, paired across rows.

Documents are the unit that was sampled; tokens of one document are not independent. All rows of one
evaluation share the resample weights, so that a difference between two rows is resampled as a pair
(Efron & Tibshirani 1993, chapters 8 and 13).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from dihal.errors import UsageError
from dihal.evaluation.definitions import Metric, ratio

__all__ = ["Interval", "difference", "document_weights", "estimate", "intervals_disjoint"]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value with its percentile interval; all null where the metric is undefined."""

    value: float | None
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def document_weights(documents: int, resamples: int, seed: int) -> Float[np.ndarray, "resamples documents"]:
    """Return how often each of ``resamples`` draws with replacement took each document (rows sum to ``documents``).

    The same arguments always give the same weights: that is what pairs the rows.

    Raises:
        UsageError: no document, or fewer than one resample.
    """
    if documents < 1 or resamples < 1:
        raise UsageError(f"a bootstrap needs documents and resamples, got {documents} and {resamples}: raise them.")
    generator = np.random.Generator(np.random.Philox(seed))
    return generator.multinomial(documents, np.full(documents, 1.0 / documents), size=resamples).astype(np.float64)


def _interval(value: float, resampled: Float[np.ndarray, " resamples"], confidence: float) -> Interval:
    if not np.isfinite(value):
        return Interval(value=None, low=None, high=None)
    finite = resampled[np.isfinite(resampled)]
    if not len(finite):
        return Interval(value=value, low=None, high=None)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(finite, [tail, 1.0 - tail])
    return Interval(value=value, low=float(low), high=float(high))


def estimate(
    metric: Metric,
    sums: Mapping[str, Float[np.ndarray, " documents"]],
    weights: Float[np.ndarray, "resamples documents"],
    confidence: float,
) -> Interval:
    """Return a metric with its interval."""
    value = float(ratio(metric, sums)[0])
    return _interval(value, ratio(metric, sums, weights), confidence)


def difference(
    metric: Metric,
    sums: Mapping[str, Float[np.ndarray, " documents"]],
    reference: Mapping[str, Float[np.ndarray, " documents"]],
    weights: Float[np.ndarray, "resamples documents"],
    confidence: float,
) -> Interval:
    """Return the paired difference (row minus reference) with its interval: both sides see the same resamples."""
    value = float(ratio(metric, sums)[0] - ratio(metric, reference)[0])
    return _interval(value, ratio(metric, sums, weights) - ratio(metric, reference, weights), confidence)


def intervals_disjoint(one: Interval, other: Interval) -> bool:
    """Return whether two intervals do not overlap (touching counts as overlap; null never is disjoint)."""
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return False
    return one.high < other.low or other.high < one.low
