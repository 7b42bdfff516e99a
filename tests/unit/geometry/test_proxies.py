"""Proxies on spectra with known answers."""

from __future__ import annotations

import math

import pytest
import torch

from dihal.errors import UsageError
from dihal.geometry.proxies import (
    RANKS,
    STIFFNESSES,
    effective_rank,
    global_stiffness,
    mean_pairwise_cosine,
    score,
    spearman,
    weighted_median,
    z_scores,
)


def test_isotropic_spectrum_has_full_rank_and_known_stiffness() -> None:
    d, variance, rho = 24, 2.5, 1e-3
    e = torch.full((d,), variance, dtype=torch.float64)
    for kind in RANKS:
        assert float(effective_rank(e, kind=kind)) == pytest.approx(math.log(d), abs=1e-12)
    for kind in STIFFNESSES:
        assert float(global_stiffness(e, rho=rho, kind=kind)) == pytest.approx(
            -math.log(variance * (1 + rho)), abs=1e-12
        )


def test_low_rank_spectrum_counts_its_directions() -> None:
    d, m, variance, rho = 40, 5, 3.0, 1e-2
    e = torch.cat([torch.full((m,), variance), torch.zeros(d - m)]).double()
    mu = m * variance / d
    for kind in RANKS:
        assert float(effective_rank(e, kind=kind)) == pytest.approx(math.log(m), abs=1e-12)
    assert float(global_stiffness(e, rho=rho)) == pytest.approx(-math.log(variance + rho * mu), abs=1e-12)
    precision = (m / (variance + rho * mu) + (d - m) / (rho * mu)) / d
    assert float(global_stiffness(e, rho=rho, kind="mean_precision")) == pytest.approx(math.log(precision), abs=1e-12)
    logdet = (m * math.log(variance + rho * mu) + (d - m) * math.log(rho * mu)) / d
    assert float(global_stiffness(e, rho=rho, kind="log_det")) == pytest.approx(-logdet, abs=1e-12)


def test_the_two_ranks_differ_where_the_spectrum_is_uneven() -> None:
    e = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    assert float(effective_rank(e)) == pytest.approx(1.5 * math.log(2), abs=1e-12)
    assert float(effective_rank(e, kind="participation")) == pytest.approx(math.log(1 / 0.375), abs=1e-12)


def test_scale_moves_stiffness_by_minus_two_log_a_and_leaves_rank() -> None:
    e = torch.rand(3, 17, dtype=torch.float64) + 0.01
    for kind in STIFFNESSES:
        moved = global_stiffness(49 * e, rho=1e-3, kind=kind) - global_stiffness(e, rho=1e-3, kind=kind)
        torch.testing.assert_close(moved, torch.full((3,), -2 * math.log(7), dtype=torch.float64))
    for kind in RANKS:
        torch.testing.assert_close(effective_rank(49 * e, kind=kind), effective_rank(e, kind=kind))


def test_unknown_kinds_name_the_near_match() -> None:
    e = torch.ones(3)
    with pytest.raises(UsageError, match="Did you mean 'log_det'"):
        global_stiffness(e, rho=0.0, kind="logdet")
    with pytest.raises(UsageError, match="Did you mean 'entropy'"):
        effective_rank(e, kind="entropi")


def test_weighted_median_is_the_median_of_the_repeated_values() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(9, generator=generator, dtype=torch.float64)
    weights = torch.randint(0, 4, (200, 9), generator=generator)
    weights[0] = 0
    found = weighted_median(values, weights)
    assert torch.equal(found[1:], weighted_median(values.expand(199, 9), weights[1:]))
    assert found[0].isnan()
    for row, median in zip(weights[1:], found[1:]):
        repeated = values.repeat_interleave(row)
        expected = float(torch.quantile(repeated, 0.5)) if len(repeated) else math.nan
        assert float(median) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_z_scores_use_candidates_only() -> None:
    values = torch.tensor([100.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    candidates = torch.tensor([False, True, True, True])
    z = z_scores(values, candidates)
    assert float(z[1:].mean()) == pytest.approx(0, abs=1e-12)
    assert float(z[1:].std(correction=0)) == pytest.approx(1, abs=1e-12)
    assert float(z[0]) == pytest.approx(98 / math.sqrt(2 / 3), abs=1e-9)


def test_equal_values_have_zero_scores_not_noise() -> None:
    values = torch.full((5,), 0.1, dtype=torch.float64)
    values[2] += 1e-17
    assert torch.equal(z_scores(values, torch.ones(5, dtype=torch.bool)), torch.zeros(5, dtype=torch.float64))


def test_score_adds_curvature_and_stiffness_and_subtracts_rank() -> None:
    v = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    flat, every = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.bool)
    z = z_scores(v, every)
    torch.testing.assert_close(score(v, flat, flat, every), z)
    torch.testing.assert_close(score(flat, v, flat, every), z)
    torch.testing.assert_close(score(flat, flat, v, every), -z)


def test_spearman_equals_scipy() -> None:
    from scipy.stats import spearmanr

    a = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0], dtype=torch.float64)
    b = torch.tensor([2.0, 7.0, 1.0, 8.0, 2.0, 8.0, 1.0], dtype=torch.float64)
    assert spearman(a, b) == pytest.approx(float(spearmanr(a, b).statistic), abs=1e-12)
    assert math.isnan(spearman(a, torch.ones(7, dtype=torch.float64)))


def test_mean_pairwise_cosine_equals_the_direct_mean() -> None:
    x = torch.randn(30, 5, dtype=torch.float64) + 1
    unit = x / x.norm(dim=1, keepdim=True)
    direct = float(((unit @ unit.T).sum() - 30) / (30 * 29))
    assert mean_pairwise_cosine(float(unit.sum(0).square().sum()), 30) == pytest.approx(direct, abs=1e-12)
