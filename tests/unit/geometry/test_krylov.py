"""Spectra without solving for them."""

from __future__ import annotations

import pytest
import torch

from dihal.geometry.krylov import largest_eigenvalues, spectra_with_sinks
from dihal.geometry.moments import correlation, spectrum
from dihal.geometry.proxies import effective_rank, global_stiffness
from tests.unit.geometry.test_moments import states

D = 400


def covariance(kind: str, d: int = D) -> torch.Tensor:
    x = torch.randn(900, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if kind == "decay":
        x = states(900, d).double()
    if kind == "sinks":
        x[:3] *= 500
    cov = torch.cov(x.T, correction=0)
    return torch.diag(torch.linspace(1, 3, d, dtype=torch.float64)) if kind == "diagonal" else cov


def test_largest_eigenvalues_of_several_matrices_at_once() -> None:
    matrices = [covariance(kind) for kind in ("decay", "flat", "sinks", "diagonal")]
    found = largest_eigenvalues(matrices)
    exact = torch.stack([spectrum(matrix)[0] for matrix in matrices])
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=0)


def test_small_matrices_are_solved() -> None:
    cov = covariance("flat", 20)
    assert float(largest_eigenvalues([cov])[0]) == float(spectrum(cov)[0])


def test_what_does_not_converge_is_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    from dihal.geometry import krylov

    monkeypatch.setattr(krylov, "_STAGES", (2, 3))
    cov = covariance("flat")
    assert float(largest_eigenvalues([cov])[0]) == float(spectrum(cov)[0])


@pytest.mark.parametrize("norm", [0.0, 3.0, 30.0, 1000.0])
@pytest.mark.parametrize("standardized", [False, True])
def test_spectrum_with_sinks_tells_what_they_do(norm: float, standardized: bool) -> None:
    """Sinks as a language model has them: a share of the tokens, in nearly one direction, of a large norm."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4000, D, generator=generator, dtype=torch.float64) * torch.logspace(0, -1.5, D)
    direction = torch.randn(D, generator=generator, dtype=torch.float64)
    sinks = norm * (direction + 0.05 * torch.randn(12, D, generator=generator, dtype=torch.float64))
    kept, both = torch.cov(x.T, correction=0), torch.cov(torch.cat([x, sinks]).T, correction=0)
    if standardized:
        kept, both = correlation(kept)[0], correlation(both)[0]
    (found,) = spectra_with_sinks([spectrum(kept)], [both])
    exact = spectrum(both)
    assert found.shape == exact.shape
    assert (found >= 0).all()
    assert float(found.sum()) == pytest.approx(float(exact.sum()), rel=1e-5)
    assert float(global_stiffness(found, rho=1e-3)) == pytest.approx(float(global_stiffness(exact, rho=1e-3)), abs=1e-4)
    assert float(effective_rank(found)) == pytest.approx(
        float(effective_rank(exact)), abs=0.2 if standardized else 0.02
    )
