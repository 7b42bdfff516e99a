"""How well a number per split predicts another: rank correlations, regret, and their resamples.

Everything works on rows (resamples) of numbers per split, so that a bootstrap is one more row. A row
with a missing number (NaN) gives NaN and is left out of intervals.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from dihal.evaluation.bootstrap import Interval

__all__ = ["Relation", "chosen", "interval", "kendall", "mean_regret", "regret", "relate", "spearman"]

Rows = Float[np.ndarray, "#rows splits"]
Row = Float[np.ndarray, " resamples"]


def _signs(values: Rows) -> Float[np.ndarray, "#rows splits splits"]:
    with np.errstate(invalid="ignore"):
        return np.sign(values[:, :, None] - values[:, None, :])


def _cosine(a: np.ndarray, b: np.ndarray, axes: tuple[int, ...]) -> Row:
    scale = np.sqrt((a * a).sum(axes) * (b * b).sum(axes))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale == 0, np.nan, (a * b).sum(axes) / scale)


def spearman(a: Rows, b: Rows) -> Row:
    """Spearman rank correlation of each row, ties by average rank; NaN where a side is constant or incomplete.

    Either side may have one row, which then serves for all.
    """
    # The sum of signs over the others is the centred average rank, doubled.
    return _cosine(_signs(a).sum(2), _signs(b).sum(2), (1,))


def kendall(a: Rows, b: Rows) -> Row:
    """Kendall's tau-b of each row (ties: Kendall 1945); NaN where a side is constant or incomplete."""
    return _cosine(_signs(a), _signs(b), (1, 2))


def chosen(friendliness: Rows) -> Int[np.ndarray, " resamples"]:
    """Index of the largest entry of each row, the first of equals; -1 where the row is incomplete."""
    complete = np.isfinite(friendliness).all(1)
    filled = np.where(np.isfinite(friendliness), friendliness, -np.inf)
    return np.where(complete, filled.argmax(1), -1)


def regret(friendliness: Rows, loss: Rows) -> Row:
    """Loss where the predictor is largest, minus the least loss of the row; NaN where incomplete."""
    rows = max(len(friendliness), len(loss))
    choice = np.broadcast_to(chosen(friendliness), rows)
    loss = np.broadcast_to(loss, (rows, loss.shape[1]))
    found = loss[np.arange(rows), choice] - loss.min(1)
    return np.where((choice >= 0) & np.isfinite(loss).all(1), found, np.nan)


def mean_regret(loss: Rows) -> Row:
    """Regret expected of a split drawn at random."""
    return loss.mean(1) - loss.min(1)


def interval(value: float, resampled: Row | None, confidence: float) -> Interval:
    """A value with the percentile interval of its resamples; no interval without, no value where it is not finite."""
    if not np.isfinite(value):
        return Interval(value=None, low=None, high=None)
    finite = resampled[np.isfinite(resampled)] if resampled is not None else np.empty(0)
    if not len(finite):
        return Interval(value=float(value), low=None, high=None)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(finite, [tail, 1.0 - tail])
    return Interval(value=float(value), low=float(low), high=float(high))


@dataclass(frozen=True, kw_only=True)
class Relation:
    """What one predictor is worth for one truth."""

    spearman: Interval
    """Correlation of the predictor, in its declared direction, with the negative loss: 1 is perfect."""
    kendall: Interval
    """The same, tau-b."""
    above_depth: Interval
    """Its Spearman correlation minus that of choosing shallow, resampled as a pair."""
    choice: int | None
    """Split that it selects."""
    regret: Interval
    """Loss there minus the least loss, in the truth's unit."""
    opposite_regret: float | None
    """Regret of the split where the predictor is smallest: what the other direction would have cost."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Relation:
        """Inverse of :meth:`to_dict`."""
        nested = ("spearman", "kendall", "above_depth", "regret")
        return cls(**{**data, **{name: Interval(**data[name]) for name in nested}})


def relate(
    friendliness: Float[np.ndarray, " splits"],
    resampled: Rows | None,
    loss: Float[np.ndarray, " splits"],
    resampled_loss: Rows,
    splits: Int[np.ndarray, " splits"],
    confidence: float,
) -> Relation:
    """Compare a predictor with a truth over the candidate splits.

    Args:
        friendliness: the predictor, larger where it expects a smaller loss.
        resampled: its resamples; None: it does not depend on the text.
        loss: the truth.
        resampled_loss: its resamples, paired with the predictor's row by row.
        splits: index of each split.
        confidence: coverage of the intervals.
    """
    whole, one = friendliness[None], loss[None]
    rows = whole if resampled is None else resampled
    shallow = -splits[None].astype(float)
    rho, drawn = spearman(whole, -one)[0], spearman(rows, -resampled_loss)
    best = int(chosen(whole)[0])
    return Relation(
        spearman=interval(rho, drawn, confidence),
        kendall=interval(kendall(whole, -one)[0], kendall(rows, -resampled_loss), confidence),
        above_depth=interval(rho - spearman(shallow, -one)[0], drawn - spearman(shallow, -resampled_loss), confidence),
        choice=None if best < 0 else int(splits[best]),
        regret=interval(regret(whole, one)[0], regret(rows, resampled_loss), confidence),
        opposite_regret=interval(regret(-whole, one)[0], None, confidence).value,
    )
