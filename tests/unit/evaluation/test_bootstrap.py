"""Intervals: coverage, pairing, the ends."""

from __future__ import annotations

import numpy as np
import pytest

from dihal.errors import UsageError
from dihal.evaluation.bootstrap import Interval, difference, document_weights, estimate, intervals_disjoint
from dihal.evaluation.definitions import METRICS, ratio
from tests.unit.evaluation.kit import sums

KL = METRICS["kl"]


def test_weights_draw_every_document_equally_and_are_reproducible():
    weights = document_weights(7, 4000, seed=3)
    assert (weights.sum(1) == 7).all()
    assert np.allclose(weights.mean(0), 1, atol=0.06)
    assert np.allclose(weights.var(0), 6 / 7, atol=0.1)  # multinomial: n p (1 - p)
    assert (weights == document_weights(7, 4000, seed=3)).all()
    assert (weights != document_weights(7, 4000, seed=4)).any()


def test_a_ratio_of_sums_is_not_a_mean_of_ratios():
    table = {"kl": np.array([1.0, 30.0]), "tokens": np.array([10.0, 100.0])}
    assert ratio(KL, table)[0] == pytest.approx(31 / 110)


def test_undefined_is_null_and_not_zero():
    weights = document_weights(24, 50, 0)
    found = estimate(METRICS["explained_variance"], sums(0.1), weights, 0.95)
    assert found == Interval(value=None, low=None, high=None)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    truth, hits, trials = 0.5, 0, 300
    for trial in range(trials):
        tokens = generator.integers(50, 200, 60).astype(float)
        rate = truth + 0.3 * generator.standard_normal(60)  # documents differ: their tokens are not independent
        found = estimate(KL, {"kl": rate * tokens, "tokens": tokens}, document_weights(60, 400, trial), 0.9)
        hits += found.low <= truth <= found.high
    assert 0.84 <= hits / trials <= 0.95


def test_paired_differences_are_narrower_than_unpaired_ones():
    generator = np.random.default_rng(1)
    tokens = np.full(40, 100.0)
    hard = np.exp(generator.standard_normal(40))  # shared by both rows
    one = {"kl": 0.10 * hard * tokens, "tokens": tokens}
    other = {"kl": 0.09 * hard * tokens, "tokens": tokens}
    weights = document_weights(40, 1000, 0)
    left, right = estimate(KL, one, weights, 0.95), estimate(KL, other, weights, 0.95)
    assert not intervals_disjoint(left, right)
    apart = difference(KL, one, other, weights, 0.95)
    assert apart.excludes_zero
    assert apart.value == pytest.approx(left.value - right.value)
    assert apart.high - apart.low < 0.2 * (left.high - left.low)


def test_difference_of_a_row_with_itself_is_exactly_zero():
    found = difference(KL, sums(0.2), sums(0.2), document_weights(24, 100, 0), 0.95)
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)
    assert not found.excludes_zero


def test_disjoint_intervals():
    def interval(low: float | None, high: float | None) -> Interval:
        return Interval(value=low, low=low, high=high)

    assert intervals_disjoint(interval(0.0, 1.0), interval(1.1, 2.0))
    assert intervals_disjoint(interval(1.1, 2.0), interval(0.0, 1.0))
    assert not intervals_disjoint(interval(0.0, 1.0), interval(1.0, 2.0))
    assert not intervals_disjoint(interval(0.0, 3.0), interval(1.0, 2.0))
    assert not intervals_disjoint(interval(None, None), interval(1.0, 2.0))


def test_nothing_to_resample_is_refused():
    with pytest.raises(UsageError, match="needs documents"):
        document_weights(0, 10, 0)
