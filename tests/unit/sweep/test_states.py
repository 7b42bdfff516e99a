from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from dihal.errors import UsageError
from dihal.geometry.intervals import resample_documents
from dihal.geometry.proxies import mean_pairwise_cosine
from dihal.sweep import states

DOCUMENTS = 12


@pytest.fixture(scope="module")
def sample() -> tuple[Tensor, Tensor, Tensor]:
    """Points whose documents differ, documents, counts of resamples."""
    generator = torch.Generator().manual_seed(0)
    document = torch.arange(360) % DOCUMENTS
    centre = torch.randn(DOCUMENTS, 6, generator=generator)
    points = torch.randn(360, 6, generator=generator) * torch.tensor([3.0, 2, 1, 1, 0.5, 0.1]) + centre[document] + 0.5
    return points, document, resample_documents(DOCUMENTS, 30, 0)


def repeated(row: Tensor, document: Tensor) -> Tensor:
    """Indices of the tokens of one resample, each as often as its document was drawn."""
    return torch.arange(len(document)).repeat_interleave(row[document])


ONCE = torch.ones(1, DOCUMENTS, dtype=torch.int64)


def test_resamples_are_those_of_repeated_tokens(sample) -> None:
    points, document, counts = sample
    norms = points.norm(dim=1)
    top, bottom = points[:, 0], points[:, 1].abs()
    _, medians = states.median_norm(norms, document, counts)
    _, ratios = states.ratio_of_sums(top, bottom, document, counts)
    centred = points - points.mean(0)
    log_trace = float(centred.square().sum(1).mean().log())
    _, traces = states.total_variance(centred, document, counts, log_trace)
    for row in range(5):
        index = repeated(counts[row], document)
        assert float(medians[row]) == pytest.approx(float(norms[index].quantile(0.5)), rel=1e-5)
        assert float(ratios[row]) == pytest.approx(float(top[index].sum() / bottom[index].sum()), rel=1e-5)
        drawn = centred[index]
        expected = float((drawn - drawn.mean(0)).square().sum(1).mean().log())
        assert float(traces[row]) == pytest.approx(expected, rel=1e-5)


def test_every_resample_that_draws_each_document_once_gives_the_value(sample) -> None:
    points, document, _ = sample
    centred = points - points.mean(0)
    unit = points / points.norm(dim=1, keepdim=True)
    cosine = mean_pairwise_cosine(float(unit.sum(0).square().sum()), len(unit))
    anchors = torch.arange(0, 360, 3)
    found = {
        "norm": states.median_norm(points.norm(dim=1), document, ONCE),
        "cosine": states.mean_cosine(points, document, ONCE, cosine),
        "trace": states.total_variance(centred, document, ONCE, 1.7),
        "dimension": states.intrinsic_dimension(centred, anchors, document, ONCE, discard=0.1),
        "probe": states.fit_probe(points[:, :2], centred, document, ONCE, folds=4, ridges=(0.01,)).explained,
        "viv": states.velocity_variance(centred, document, ONCE),
    }
    for name, (value, rows) in found.items():
        assert rows is not None
        assert float(rows[0]) == pytest.approx(value, rel=1e-5), name


def test_cosines_of_copies_do_not_count(sample) -> None:
    points, document, counts = sample
    _, rows = states.mean_cosine(points, document, counts, 0.0)
    unit = (points / points.norm(dim=1, keepdim=True)).double()
    whole = mean_pairwise_cosine(float(unit.sum(0).square().sum()), len(unit))
    index = repeated(counts[0], document)
    gram = unit[index] @ unit[index].T
    different = index[:, None] != index[None, :]
    assert float(rows[0]) + whole == pytest.approx(float(gram[different].mean()), rel=1e-6)


@pytest.mark.parametrize("dimension", [2, 5])
def test_intrinsic_dimension_of_a_plane(dimension: int) -> None:
    generator = torch.Generator().manual_seed(1)
    flat = torch.rand(3000, dimension, generator=generator)
    points = flat @ torch.linalg.qr(torch.randn(20, dimension, generator=generator)).Q.T
    points = points - points.mean(0)
    document = torch.arange(3000) % DOCUMENTS
    for discard in (0.0, 0.1):
        value, rows = states.intrinsic_dimension(
            points, torch.arange(1500), document, resample_documents(DOCUMENTS, 50, 0), discard=discard
        )
        assert math.exp(value) == pytest.approx(dimension, rel=0.1)
        assert rows is not None
        assert float(rows.std()) < 0.1


def test_copies_have_no_dimension() -> None:
    points = torch.eye(4).repeat(30, 1)
    document = torch.arange(120) % DOCUMENTS
    value, rows = states.intrinsic_dimension(points, torch.arange(40), document, ONCE, discard=0.1)
    assert math.isnan(value)
    assert rows is not None
    assert bool(rows.isnan().all())


def test_the_probe_explains_what_is_linear_and_not_what_is_not(sample) -> None:
    points, document, counts = sample
    generator = torch.Generator().manual_seed(2)
    target = points @ torch.randn(6, 4, generator=generator) + 1.0
    linear = states.fit_probe(points, target - target.mean(0), document, counts, folds=4, ridges=(1e-6, 10.0))
    assert linear.explained[0] > 0.999
    noise = torch.randn(360, 4, generator=generator)
    # As many features as tokens to fit: within the fit everything would be explained, held out nothing is.
    wide = torch.randn(360, 300, generator=generator)
    held_out = states.fit_probe(wide, noise - noise.mean(0), document, None, folds=4, ridges=(1e-3, 0.1))
    assert held_out.explained[0] < 0.05
    assert held_out.explained[1] is None


def test_the_probe_never_sees_the_document_it_predicts() -> None:
    # The target is a constant of the document, the feature names the document: of no use on other documents.
    document = torch.arange(120) % DOCUMENTS
    feature = torch.nn.functional.one_hot(document, DOCUMENTS).float()
    target = torch.randn(DOCUMENTS, 3, generator=torch.Generator().manual_seed(3))[document]
    probe = states.fit_probe(feature, target - target.mean(0), document, None, folds=DOCUMENTS, ridges=(1e-3, 0.1))
    assert probe.explained[0] < 0.05


def test_the_probe_needs_two_documents() -> None:
    with pytest.raises(UsageError, match="one document"):
        states.fit_probe(
            torch.ones(5, 2), torch.ones(5, 2), torch.zeros(5, dtype=torch.int64), None, folds=4, ridges=(0.1,)
        )


def test_velocity_variance_is_the_integral_of_the_conditional_variance() -> None:
    def conditional(t: float, e: float) -> float:
        # Joint Gaussian of z_t = (1 - t) z + t eps and v = eps - z: Var(v) - Cov(v, z_t)^2 / Var(z_t).
        total = (1 - t) ** 2 * e + t**2
        return (1 + e) - (t - (1 - t) * e) ** 2 / total

    eigenvalues = [4.0, 1.0, 0.25, 0.01]
    expected = np.mean([quad(conditional, 0, 1, args=(e,))[0] for e in eigenvalues])
    assert float(states.velocity_variance_of(torch.tensor(eigenvalues).double())) == pytest.approx(expected, rel=1e-6)


def test_velocity_variance_of_points(sample) -> None:
    points, document, counts = sample
    centred = points - points.mean(0)
    covariance = centred.double().T @ centred.double() / len(centred)
    value, rows = states.velocity_variance(centred, document, counts)
    assert value == pytest.approx(float(states.velocity_variance_of(torch.linalg.eigvalsh(covariance))))
    given, _ = states.velocity_variance(centred, document, None, covariance=4 * covariance)
    assert given == pytest.approx(2 * value)
    # Against computing it again in every resample: first order is good to a few per cent.
    assert rows is not None
    again = []
    for row in counts:
        drawn = centred[repeated(row, document)].double()
        drawn = drawn - drawn.mean(0)
        again.append(float(states.velocity_variance_of(torch.linalg.eigvalsh(drawn.T @ drawn / len(drawn)))))
    assert np.corrcoef(again, rows)[0, 1] > 0.9
    assert float(rows.std()) == pytest.approx(np.std(again), rel=0.3)
