"""Streaming moments against direct fp64."""

from __future__ import annotations

import pytest
import torch

from dihal.geometry.moments import Moments, correlation, spectrum, spectrum_and_basis


def states(n: int, d: int, seed: int = 0) -> torch.Tensor:
    """Like a residual stream: uneven spectrum, a mean far larger than the spread in some channels."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -2, d)
    mean = torch.zeros(d)
    mean[: d // 4] = 300.0
    return torch.randn(n, d, generator=generator) * scale @ torch.randn(d, d, generator=generator) * 0.3 + mean


@pytest.mark.parametrize("d", [48, 400])
@pytest.mark.parametrize("chunk", [7, 100, 1000])
def test_moments_equal_direct_fp64(d: int, chunk: int) -> None:
    x = states(1000, d)
    moments = Moments(x[:50].mean(0), torch.float32)
    for part in x.split(chunk):
        moments.add(part)
    exact = x.double()
    cov = torch.cov(exact.T, correction=0)
    assert moments.count == 1000
    assert float((moments.mean - exact.mean(0)).norm() / exact.mean(0).norm()) < 1e-7
    assert float((moments.covariance - cov).norm() / cov.norm()) < 1e-6
    # every entry, on the scale of its own two channels
    scale = cov.diagonal().sqrt()
    assert float(((moments.covariance - cov) / torch.outer(scale, scale)).abs().max()) < 1e-5
    e, direct = spectrum(moments.covariance), spectrum(cov)
    assert float((e - direct).abs().max() / direct[0]) < 1e-6


def test_merging_equals_adding_everything() -> None:
    x = states(300, 20)
    shift = x[:10].mean(0)
    parts = [Moments(shift, torch.float32) for _ in range(3)]
    parts[0].add(x[:120])
    parts[1].add(x[120:])
    parts[2].add(x)
    both = parts[0].merged(parts[1])
    assert both.count == 300
    torch.testing.assert_close(both.covariance, parts[2].covariance, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(both.mean, parts[2].mean)
    assert parts[0].count == 120


@pytest.mark.parametrize("d", [5, 384, 500])
def test_the_covariance_is_whole_whatever_its_block_columns(d: int) -> None:
    x = torch.randn(60, d, dtype=torch.float64)
    moments = Moments(torch.zeros(d, dtype=torch.float64), torch.float64)
    moments.add(x)
    torch.testing.assert_close(moments.covariance, torch.cov(x.T, correction=0))
    assert moments._second.numel() <= (d * d if d < 288 else 0.7 * d * d)


def test_leaving_tokens_out_equals_adding_the_others() -> None:
    x = states(400, 40)
    scale = torch.rand(400) + 0.5
    where = torch.tensor([0, 7, 200, 399])
    x[7] *= 1000
    kept = torch.ones(400, dtype=torch.bool).index_fill_(0, where, False)
    for factor in (None, scale):
        one, two = (Moments(x[kept].mean(0), torch.float32) for _ in range(2))
        one.add_chosen(x, where, factor)
        two.add(x[kept], None if factor is None else factor[kept])
        assert one.count == two.count == 396
        assert torch.equal(one.covariance, two.covariance)
        assert torch.equal(one.mean, two.mean)


@pytest.mark.parametrize("d", [40, 700])
def test_tokens_of_zeros_add_nothing_and_the_narrow_covariance_is_the_same(d: int, monkeypatch) -> None:
    from dihal.geometry import moments

    monkeypatch.setattr(moments, "native_half", lambda dtype, device: dtype == torch.bfloat16)
    monkeypatch.setattr(moments, "half_product", lambda a, b: a.float() @ b.float())
    x = states(400, d).bfloat16()
    where = torch.tensor([0, 7, 200, 399])
    kept = torch.ones(400, dtype=torch.bool).index_fill_(0, where, False)
    found = Moments(torch.zeros(d), torch.bfloat16)
    found.add_beside_zeros(x.index_fill(0, where, 0.0), 396)
    exact = torch.cov(x[kept].double().T, correction=0)
    mean = x[kept].double().mean(0)
    torch.testing.assert_close(found.mean, mean, rtol=1e-6, atol=1e-6)
    # Uncentred in fp32: the mean's part costs digits.
    size = float(mean.abs().max() ** 2 + exact.diagonal().max())
    narrow, variance = found.narrow_covariance
    assert float((found.covariance - exact).abs().max()) < 2e-6 * size
    assert float((narrow - exact).abs().max()) < 2e-6 * size
    assert float((variance - found.covariance.diagonal()).abs().max()) < 1e-12 * size
    assert float((narrow - narrow.mT).abs().max()) < 1e-6 * size


def test_few_tokens_hold_no_matrix() -> None:
    moments = Moments(torch.zeros(300), torch.float32, wait=300)
    moments.add(torch.randn(20, 300))
    assert moments._sums is None
    assert moments.covariance.shape == (300, 300)


def test_correlation_leaves_a_constant_channel_at_zero() -> None:
    x = states(200, 6).double()
    x[:, 2] = 5.0
    cov = torch.cov(x.T, correction=0)
    corr, std = correlation(cov)
    live = [0, 1, 3, 4, 5]
    torch.testing.assert_close(corr[live][:, live], torch.corrcoef(x[:, live].T))
    assert not corr[2].any()
    assert not corr[:, 2].any()
    assert std[2].isinf()
    assert corr.isfinite().all()


def test_spectrum_is_descending_non_negative_and_rebuilds_the_matrix() -> None:
    x = torch.randn(10, 30, dtype=torch.float64)  # rank 9 < 30
    cov = torch.cov(x.T, correction=0)
    e, basis = spectrum_and_basis(cov)
    assert (e >= 0).all()
    assert (e[:-1] >= e[1:]).all()
    torch.testing.assert_close(basis * e @ basis.T, cov)
    torch.testing.assert_close(spectrum(cov), e)
