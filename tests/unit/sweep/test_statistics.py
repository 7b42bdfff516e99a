from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dihal.sweep.statistics import Relation, chosen, interval, kendall, mean_regret, regret, relate, spearman


def rows(*values: list[float]) -> np.ndarray:
    return np.array(values, dtype=float)


@pytest.mark.parametrize("ties", [False, True])
def test_correlations_are_scipys(ties: bool) -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 5, 11))
    if ties:
        a, b = np.round(a), np.round(b)
    for ours, theirs in ((spearman, stats.spearmanr), (kendall, stats.kendalltau)):
        expected = [theirs(x, y).statistic for x, y in zip(a, b)]
        np.testing.assert_allclose(ours(a, b), expected, atol=1e-12)
        np.testing.assert_allclose(ours(a[:1], b), [theirs(a[0], y).statistic for y in b], atol=1e-12)


def test_no_correlation_where_there_is_none() -> None:
    constant, incomplete = rows([1, 1, 1]), rows([1, np.nan, 3])
    for function in (spearman, kendall):
        assert np.isnan(function(constant, rows([1, 2, 3])))[0]
        assert np.isnan(function(incomplete, rows([1, 2, 3])))[0]


def test_regret() -> None:
    loss = rows([0.5, 0.2, 0.9])
    assert regret(rows([1, 2, 3]), loss) == pytest.approx([0.7])
    assert regret(rows([1, 3, 2]), loss) == pytest.approx([0])
    assert regret(rows([1, 3, 2]), rows([0.5, 0.2, 0.9], [0.1, 0.4, 0.9])) == pytest.approx([0, 0.3])
    assert np.isnan(regret(rows([1, np.nan, 2]), loss))[0]
    assert np.isnan(regret(rows([1, 3, 2]), rows([0.5, 0.2, np.nan])))[0]
    assert mean_regret(loss) == pytest.approx([(0.3 + 0 + 0.7) / 3])


def test_the_first_of_equals_is_chosen() -> None:
    assert chosen(rows([1, 2, 2], [np.nan, 1, 2])).tolist() == [1, -1]


def test_interval() -> None:
    found = interval(2.0, np.append(np.arange(101.0), np.nan), 0.9)
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 5.0, 95.0))
    assert interval(2.0, None, 0.9).low is None
    assert interval(np.nan, np.ones(3), 0.9).value is None


def test_relation() -> None:
    splits, loss = np.array([1, 2, 3, 4]), np.array([0.4, 0.3, 0.2, 0.1])
    drawn = np.stack([loss, loss[::-1]])
    deep = relate(splits.astype(float), None, loss, drawn, splits, 0.5)
    assert deep.spearman.value == deep.kendall.value == 1
    assert (deep.spearman.low, deep.spearman.high) == (-0.5, 0.5)  # quartiles of 1 and -1
    assert deep.above_depth.value == 2
    assert deep.choice == 4
    assert deep.regret.value == 0
    assert deep.regret.high == pytest.approx(0.75 * 0.3)
    assert deep.opposite_regret == pytest.approx(0.3)
    assert Relation.from_dict(deep.to_dict()) == deep


def test_resamples_of_predictor_and_truth_are_paired() -> None:
    # Both sides flip together: paired, the correlation never changes.
    generator = np.random.default_rng(1)
    loss = generator.normal(size=(30, 6))
    found = relate(-loss[0], -loss, loss[0], loss, np.arange(1, 7), 0.9)
    assert (found.spearman.low, found.spearman.value, found.spearman.high) == (1, 1, 1)
    assert found.regret.high == 0
    apart = relate(-loss[0], -loss[::-1], loss[0], loss, np.arange(1, 7), 0.9)
    assert apart.spearman.low is not None
    assert apart.spearman.low < 0.5


def test_an_incomplete_predictor_says_so() -> None:
    found = relate(np.array([1.0, np.nan, 2.0]), None, np.arange(3.0), np.ones((4, 3)), np.arange(1, 4), 0.9)
    assert found.spearman.value is None
    assert found.choice is None
    assert found.regret.value is None
