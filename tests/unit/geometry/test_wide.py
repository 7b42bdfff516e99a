"""What is known of wide covariances without solving for their spectra, against their spectra."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dihal.config import ScoreConfig
from dihal.geometry import functionals, layer, subspace, views
from dihal.geometry.functionals import entropy
from dihal.geometry.layer import Sampling, assess_layer
from dihal.geometry.moments import Moments, covariance_of_both, spectrum
from dihal.geometry.proxies import effective_rank
from dihal.geometry.statistics import LayerStatistics
from dihal.geometry.subspace import largest_values
from dihal.geometry.wide import extremes

D = 300
PLACE = torch.arange(1, D + 1, dtype=torch.float64)
SPECTRA = {
    "even": torch.ones(D, dtype=torch.float64),
    "flat": torch.linspace(0.56, 1.56, D, dtype=torch.float64),
    "power": PLACE**-1.0,
    "steep": PLACE**-2.0,
    "exponential": torch.exp(-PLACE / 25),
    "deficient": (PLACE <= D // 2).double(),
    "outlier": torch.cat([torch.tensor([400.0]).double(), torch.linspace(1.5, 0.3, D - 1, dtype=torch.float64)]),
}


def matrix(kind: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64)).Q
    made = (basis * SPECTRA[kind]) @ basis.mT
    return ((made + made.mT) / 2).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", list(SPECTRA))
def test_entropy_from_determinants_is_that_of_the_spectrum(kind: str, dtype: torch.dtype) -> None:
    e = SPECTRA[kind]
    found = entropy(matrix(kind, dtype), float(e.max() / e.mean()))
    assert found is not None
    assert float(found) == pytest.approx(float(effective_rank(e)), abs=5e-4)


def test_the_fit_is_as_close_as_it_says_at_every_reach() -> None:
    for reach in functionals._POLES:
        weights, error = functionals._weights(reach)
        assert error < 6.6e-4
        x = torch.rand(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).pow(6) * reach
        terms = [weights[0], weights[1] * x, weights[2] * x.square()]
        terms += [w * torch.log1p(x / t) for w, t in zip(weights[3:], functionals._POLES[reach])]
        assert float(((sum(terms) + torch.special.entr(x)).abs() / (1 + x)).max()) < 1.05 * error


def test_a_spectrum_too_uneven_for_the_fit_is_left_to_others() -> None:
    assert entropy(torch.eye(4), 1e5) is None


def test_an_indefinite_matrix_has_no_entropy() -> None:
    assert bool(entropy(torch.diag(torch.tensor([3.0, 1.0, -0.5])), 2.6).isnan())


def test_largest_values_of_several_matrices_at_once() -> None:
    kinds = [kind for kind in SPECTRA if kind != "even"]
    matrices = [matrix(kind) for kind in kinds]
    before = [found.clone() for found in matrices]
    found = largest_values(matrices)
    assert bool(found.settled.all())
    exact = torch.stack([SPECTRA[kind].max() for kind in kinds])
    torch.testing.assert_close(found.values[:, 0], exact, rtol=5e-6, atol=0)
    gram = found.block.double().mT @ found.block.double()
    torch.testing.assert_close(gram, torch.eye(gram.shape[1], dtype=torch.float64).expand_as(gram), atol=1e-5, rtol=0)
    assert all(torch.equal(one, two) for one, two in zip(matrices, before))


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Filters as on a GPU."""
    monkeypatch.setitem(subspace._PANELS, "cpu", 4)
    monkeypatch.setattr(subspace, "_rounds", lambda device: True)
    monkeypatch.setattr(subspace, "_rough_product", lambda m, block: m.float() @ block.to(m.dtype).float())


@pytest.mark.parametrize("kind", list(SPECTRA))
def test_rounded_first_steps_cost_no_accuracy_and_at_most_a_filter(kind: str, request: pytest.FixtureRequest) -> None:
    plain = largest_values([matrix(kind)])
    request.getfixturevalue("rounding")
    products: list[torch.dtype] = []
    rough = subspace._rough_product
    request.getfixturevalue("monkeypatch").setattr(
        subspace, "_rough_product", lambda m, block: (products.append(m.dtype), rough(m, block))[1]
    )
    found = largest_values([matrix(kind)])
    assert bool(found.settled[0]) or not bool(plain.settled[0])
    assert found.filters <= plain.filters + 1
    assert set(products) == {torch.bfloat16}
    assert float(found.values[0, 0]) == pytest.approx(float(SPECTRA[kind].max()), rel=5e-6)


def sampled(kind: str) -> torch.Tensor:
    """Covariances without a gap, with one, and of heavy tails."""
    d = 500
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(8 * d, d, generator=generator)
    if kind == "few samples":
        x = x[: d + 20]
    if kind == "gap":
        x += 0.05 * torch.randn(len(x), 1, generator=generator) * torch.ones(d)
    if kind == "heavy tokens":
        x *= torch.randn(len(x), 1, generator=generator).exp()
    if kind == "heavy channels":
        x *= torch.logspace(0, -2, d)
    if kind == "one token":
        x[0] += 200
    if kind == "one channel":
        x[:, 7] *= 60
    return torch.cov(x.T, correction=0)


SAMPLED = ("bulk", "few samples", "gap", "heavy tokens", "heavy channels", "one token", "one channel")


@pytest.mark.parametrize("kind", SAMPLED)
def test_what_is_asked_for_is_what_the_largest_value_is_good_to(kind: str, rounding: None) -> None:
    cov = sampled(kind)
    exact = float(torch.linalg.eigvalsh(cov.double())[-1])
    fine, coarse, compared = (largest_values([cov], error=error) for error in (None, 5e-5, 5e-4))
    for found, error in ((fine, 5e-6), (coarse, 1e-4), (compared, 1e-3)):
        assert bool(found.settled[0])
        assert float(found.values[0, 0]) == pytest.approx(exact, rel=error)
        # Where the error is only estimated, an eigenvalue is within the residual all the same.
        assert float(found.residuals[0, 0]) < 1e-2 * exact
    assert compared.products <= coarse.products <= fine.products
    if kind in ("bulk", "few samples"):
        assert coarse.products < fine.products


def test_settled_matrices_are_not_multiplied_any_more(rounding: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    rough = subspace._rough_product
    monkeypatch.setattr(subspace, "_rough_product", lambda m, block: (sizes.append(len(m)), rough(m, block))[1])
    kinds = ("bulk", "one token", "bulk")
    found = largest_values([sampled(kind) for kind in kinds])
    assert bool(found.settled.all())
    assert {*sizes} == {3, 2}
    for i, kind in enumerate(kinds):
        alone = largest_values([sampled(kind)])
        assert float(found.values[i, 0]) == pytest.approx(float(alone.values[0, 0]), rel=1e-6)


def test_from_what_was_found_of_the_same_matrix_nothing_is_filtered(rounding: None) -> None:
    found = largest_values([sampled("bulk")])
    again = largest_values([sampled("bulk")], found.block, error=5e-4)
    assert (again.filters, again.products) == (0, 1)
    assert float(again.values[0, 0]) == pytest.approx(float(found.values[0, 0]), rel=1e-4)


@pytest.mark.parametrize("rank", ["one channel only", "one direction", "constant"])
def test_degenerate_matrices_have_a_largest_value_and_a_whole_block(rank: str, rounding: None) -> None:
    d = 200
    made = torch.zeros(d, d)
    if rank == "one channel only":
        made[3, 3] = 2.0
    elif rank == "one direction":
        made = torch.outer(torch.arange(d) / d, torch.arange(d) / d)
    else:
        made = 0.3 * torch.eye(d)
    for error in (None, 5e-5):
        found = largest_values([made], error=error)
        exact = float(torch.linalg.eigvalsh(made.double())[-1])
        assert float(found.values[0, 0]) == pytest.approx(exact, rel=1e-6)
        gram = found.block[0].double().mT @ found.block[0].double()
        torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), atol=1e-5, rtol=0)


def test_a_value_that_has_not_converged_is_solved_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subspace, "_FILTERS", 0)
    flat = matrix("flat")
    assert extremes([flat]).largest == [float(spectrum(flat)[0])]


@pytest.mark.parametrize("few", [5, 90])
def test_covariance_of_both_equals_that_of_all_tokens(few: int) -> None:
    x = torch.randn(400, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 2
    one, two = (Moments(torch.full((40,), 1.5), torch.float64, wait=wait) for wait in (1, 50))
    one.add(x[:-few])
    two.add(30 * x[-few:])
    assert (two.waiting is None) == (few == 90)
    both = torch.cov(torch.cat([x[:-few], 30 * x[-few:]]).T, correction=0)
    torch.testing.assert_close(covariance_of_both(one.covariance, one, two), both)


def statistics(config: ScoreConfig, pool: int) -> LayerStatistics:
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(96, 96, generator=generator)).Q
    x = torch.randn(2000, 96, generator=generator) * torch.logspace(0, -1, 96) @ rotation + 0.3
    first = torch.arange(2000) % 200 == 0
    x[first] += 40 * rotation[0]
    found = LayerStatistics(1, pool, config)
    found.prepare([x], [first])
    found.add(x, first, (~first).nonzero().squeeze(1)[:pool], torch.arange(pool))
    return found


@pytest.mark.parametrize("rank", ["entropy", "participation"])
@pytest.mark.parametrize("rounds", [False, True])
def test_a_wide_layer_is_assessed_as_a_narrow_one(rank: str, rounds: bool, request: pytest.FixtureRequest) -> None:
    monkeypatch = request.getfixturevalue("monkeypatch")
    if rounds:
        request.getfixturevalue("rounding")
    config = ScoreConfig(rank=rank, bootstrap=0, anchors=50, neighbours=8)
    sampling = Sampling(
        pool_document=torch.zeros(500, dtype=torch.int64), anchor_preference=torch.arange(500), counts=None
    )
    exact = assess_layer(statistics(config, 500), sampling, config)
    for module in (views, layer):
        monkeypatch.setattr(module, "WIDE", 64)
    monkeypatch.setattr(layer, "spectrum", None)  # nothing is solved for
    wide = assess_layer(statistics(config, 500), sampling, config)
    assert dataclasses.replace(wide, proxies={}) == dataclasses.replace(exact, proxies={})
    for name, one in exact.proxies.items():
        two = wide.proxies[name]
        assert two.curvature == pytest.approx(one.curvature, abs=1e-6)
        assert two.stiffness == pytest.approx(one.stiffness, abs=1e-5)
        assert two.rank == pytest.approx(one.rank, abs=5e-4 if rank == "entropy" else 1e-6)
        assert two.stiffness_with_sinks == pytest.approx(one.stiffness_with_sinks, abs=1e-3)
        assert two.rank_with_sinks == pytest.approx(one.rank_with_sinks, abs=0.1 if rank == "entropy" else 1e-5)
        assert one.rank_with_sinks < one.rank - 0.2 or name == "rms"


@pytest.mark.parametrize("in_place", [False, True])
def test_sums_in_half_precision_wait_in_fp32_and_come_to_the_same(
    in_place: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    from dihal.geometry import moments

    monkeypatch.setattr(moments, "native_half", lambda dtype, device: dtype == torch.bfloat16)
    monkeypatch.setattr(moments, "half_product", lambda a, b: a.float() @ b.float())
    monkeypatch.setattr(moments, "_RECENT", 3)
    added: list[int] = []

    def add(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        added.append(len(a))
        total.addmm_(a.float(), b.float())

    if in_place:
        monkeypatch.setattr(moments, "_add_half_product", add)
    moments._adds_in_place.cache_clear()
    request.addfinalizer(moments._adds_in_place.cache_clear)
    assert moments._adds_in_place(torch.device("cpu")) == in_place
    asked = len(added)
    x = torch.randn(7 * 300, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    found, whole = (Moments(torch.zeros(40), torch.bfloat16) for _ in range(2))
    for number, part in enumerate(x.split(300)):
        found.add(part)
        assert (found._sums is None) == (number < 2)
    exact = x.double().mT @ x.double() / len(x)
    offset = found._total / found.count
    torch.testing.assert_close(found.covariance, exact - torch.outer(offset, offset), rtol=1e-6, atol=1e-6)
    whole.add(x)
    assert whole._sums is None
    whole._total = found._total
    torch.testing.assert_close(whole.covariance, found.covariance, rtol=1e-6, atol=1e-6)
    assert whole.sums()[1].dtype == torch.float64
    assert (len(added) > asked) == in_place


def test_a_sum_that_is_not_added_to_is_told(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    from dihal.geometry import moments

    monkeypatch.setattr(moments, "half_product", lambda a, b: a.float() @ b.float())
    monkeypatch.setattr(moments, "_add_half_product", lambda total, a, b: total.copy_(a.float() @ b.float()))
    moments._adds_in_place.cache_clear()
    request.addfinalizer(moments._adds_in_place.cache_clear)
    assert not moments._adds_in_place(torch.device("cpu"))
