"""The first-order document bootstrap against computing everything again."""

from __future__ import annotations

import pytest
import torch

from dihal.geometry.intervals import (
    percentile_interval,
    resample_documents,
    resampled_curvature,
    resampled_spectrum,
)
from dihal.geometry.moments import correlation, spectrum, spectrum_and_basis
from dihal.geometry.neighbours import curvature, local_spread
from dihal.geometry.proxies import effective_rank, global_stiffness, weighted_median

DOCUMENTS, TOKENS, D = 40, 60, 12


def corpus(seed: int, documents: int = DOCUMENTS, dim: int = D) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that depend on their document, through its mean and its scale."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(0, -1, dim)
    mean = 0.6 * torch.randn(documents, 1, dim, generator=generator) * spread
    size = torch.exp(0.4 * torch.randn(documents, 1, 1, generator=generator))
    x = (mean + size * spread * torch.randn(documents, TOKENS, dim, generator=generator)).flatten(0, 1)
    return x, torch.arange(documents).repeat_interleave(TOKENS)


def widths(samples: torch.Tensor) -> float:
    low, high = percentile_interval(samples, 0.95).tolist()
    return high - low


def test_resamples_keep_the_number_of_documents_and_their_expectation() -> None:
    counts = resample_documents(25, 2000, seed=3)
    assert torch.equal(counts.sum(1), torch.full((2000,), 25))
    assert float((counts.double().mean(0) - 1).abs().max()) < 0.12
    assert float(counts.double().var(0).mean()) == pytest.approx(24 / 25, abs=0.05)
    assert torch.equal(counts, resample_documents(25, 2000, seed=3))
    assert not torch.equal(counts, resample_documents(25, 2000, seed=4))


@pytest.mark.parametrize("standardized", [False, True])
def test_every_document_once_gives_the_spectrum_back(standardized: bool) -> None:
    x, document = corpus(0)
    x = x - x.mean(0)
    cov = torch.cov(x.double().T, correction=0)
    if standardized:
        cov, std = correlation(cov)
        x = x / std.float()
    values, basis = spectrum_and_basis(cov)
    ones = torch.ones(1, DOCUMENTS, dtype=torch.int64)
    found = resampled_spectrum(x, document, ones, values, basis, standardized=standardized)
    torch.testing.assert_close(found[0], values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("standardized", [False, True])
def test_widths_agree_with_the_direct_bootstrap(standardized: bool) -> None:
    x, document = corpus(1)
    x = x - x.mean(0)
    cov = torch.cov(x.double().T, correction=0)
    points = x
    if standardized:
        cov, std = correlation(cov)
        points = x / std.float()
    values, basis = spectrum_and_basis(cov)
    counts = resample_documents(DOCUMENTS, 400, seed=0)
    fast = resampled_spectrum(points, document, counts, values, basis, standardized=standardized)
    direct = []
    for row in counts:
        again = torch.cov(x.double().T, correction=0, fweights=row[document])
        direct.append(spectrum(correlation(again)[0] if standardized else again))
    full = torch.stack(direct)
    for proxy in (lambda e: global_stiffness(e, rho=1e-3), effective_rank):
        assert widths(proxy(fast)) == pytest.approx(widths(proxy(full)), rel=0.25)


def test_curvature_widths_agree_with_the_direct_bootstrap() -> None:
    # Direct: neighbours taken anew among the distinct documents of each resample (copies of a document
    # must not be each other's neighbours). Thinner pools move every value alike; the width is compared.
    x, document = corpus(2)
    anchors = torch.arange(0, len(x), 6)
    local = local_spread(x, anchors, 16)
    counts = resample_documents(DOCUMENTS, 200, seed=1)
    fast = resampled_curvature(curvature(local.variance, 1.0), local, anchors, document, counts)
    direct = []
    for row in counts:
        present = (row[document] > 0).nonzero().squeeze(1)
        chosen = anchors[row[document[anchors]] > 0]
        again = curvature(local_spread(x[present], torch.searchsorted(present, chosen), 16).variance, 1.0)
        direct.append(weighted_median(again, row[document[chosen]]))
    assert widths(fast) == pytest.approx(widths(torch.stack(direct)), rel=0.25)


def test_curvature_spread_is_that_of_fresh_documents() -> None:
    fresh, inside = [], []
    for trial in range(60):
        x, document = corpus(1000 + trial)
        anchors = torch.arange(0, len(x), 6)
        local = local_spread(x, anchors, 16)
        bend = curvature(local.variance, 1.0)
        fresh.append(weighted_median(bend, torch.ones_like(anchors)))
        if trial < 12:
            counts = resample_documents(DOCUMENTS, 200, seed=trial)
            inside.append(resampled_curvature(bend, local, anchors, document, counts).std())
    assert float(torch.stack(inside).mean()) == pytest.approx(float(torch.stack(fresh).std()), rel=0.25)


def test_intervals_cover_the_truth() -> None:
    # Truth from a very large sample of documents; 90 % intervals from 40 documents each.
    dim, trials, covered = 4, 60, 0
    x, _ = corpus(999, documents=20_000, dim=dim)
    truth = float(global_stiffness(spectrum(torch.cov(x.double().T, correction=0)), rho=1e-3))
    for trial in range(trials):
        x, document = corpus(trial, dim=dim)
        x = x - x.mean(0)
        values, basis = spectrum_and_basis(torch.cov(x.double().T, correction=0))
        counts = resample_documents(DOCUMENTS, 300, seed=trial)
        fast = global_stiffness(resampled_spectrum(x, document, counts, values, basis), rho=1e-3)
        low, high = percentile_interval(fast, 0.9).tolist()
        covered += low <= truth <= high
    assert 0.72 <= covered / trials <= 1.0  # percentile intervals are a little narrow; 0.72 is 4 sd below 0.9


def test_more_documents_narrow_the_interval() -> None:
    found = []
    for documents in (20, 80):
        x, document = corpus(5, documents=documents)
        values, basis = spectrum_and_basis(torch.cov(x.double().T, correction=0))
        counts = resample_documents(documents, 400, seed=0)
        found.append(widths(effective_rank(resampled_spectrum(x - x.mean(0), document, counts, values, basis))))
    assert found[1] < 0.75 * found[0]


def test_a_document_without_pool_tokens_is_harmless() -> None:
    x, document = corpus(0)
    x = x - x.mean(0)
    values, basis = spectrum_and_basis(torch.cov(x.double().T, correction=0))
    counts = resample_documents(DOCUMENTS + 3, 50, seed=0)
    found = resampled_spectrum(x, document, counts, values, basis)
    assert found.shape == (50, D)
    assert found.isfinite().all()
