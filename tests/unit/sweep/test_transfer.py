from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import rankdata

from dihal.errors import UsageError
from dihal.sweep.predictors import Predictor
from dihal.sweep.report import SweepReport
from dihal.sweep.transfer import fitted_predictors, ranks, ridge, signs
from tests.unit.sweep import kit

LAYERS = 12
CANDIDATES = list(range(1, LAYERS))


def source(layers: int = 16, *, regime: str = "replace", model: str = "other", name: str = "kl") -> SweepReport:
    """A model in which the loss is curvature: the score's sign of it is wrong, and nothing else matters."""
    predictors = kit.proxies(layers, seed=5)
    return kit.report(predictors, [kit.truth(name, 2 * predictors[0].values)], regime=regime, model=model)


def fit(predictors: list[Predictor], sources: list[SweepReport]):
    found, record = fitted_predictors(
        predictors, CANDIDATES, sources, regime="replace", truth="kl", fingerprint="mine", penalty=1e-3
    )
    return {item.name: item for item in found}, record


def test_ranks() -> None:
    values = np.array([[3.0, 1, 2], [5, 5, 1]])
    expected = (rankdata(values, axis=1) - 2) / 2
    np.testing.assert_allclose(ranks(values), expected)
    assert np.abs(ranks(np.arange(100.0)[None])).max() == 0.5


def test_ridge() -> None:
    generator = np.random.default_rng(0)
    x, weights = generator.normal(size=(200, 3)), np.array([1.0, -2, 0])
    np.testing.assert_allclose(ridge(x, x @ weights, 1e-9), weights, atol=1e-6)
    assert np.abs(ridge(x, x @ weights, 1e6)).max() < 1e-3
    np.testing.assert_array_equal(signs(x, x @ weights), np.sign(x.T @ (x @ weights)))
    assert signs(np.zeros((5, 1)), np.ones(5))[0] == 0


def test_signs_and_weights_come_from_the_other_model() -> None:
    mine = kit.proxies(LAYERS, seed=9)
    found, record = fit([*mine, kit.predictor("depth", np.arange(LAYERS), group="trivial", sign=-1.0)], [source()])
    assert set(found) == {"signs/rms", "ridge/rms", "ridge/all"}
    assert record["models"] == ["other"]
    assert record["weights"]["signs/rms"]["curvature/rms"] == -1
    assert record["weights"]["ridge/rms"]["curvature/rms"] == pytest.approx(-1, abs=0.05)
    assert record["weights"]["ridge/rms"]["rank/rms"] == pytest.approx(0, abs=0.05)
    # Depth is not known of the other model; the score is a sum of what is there.
    assert set(record["weights"]["ridge/all"]) == {"curvature/rms", "stiffness/rms", "rank/rms"}
    ridge_found = found["ridge/rms"]
    assert np.isnan(ridge_found.values[0]), "ranks are over the candidates"
    order = np.corrcoef(ridge_found.values[1:], -ranks(mine[0].values[None, 1:])[0])[0, 1]
    assert order > 0.99
    assert ridge_found.resampled.shape == (kit.RESAMPLES, LAYERS)
    assert np.isfinite(ridge_found.resampled[:, 1:]).all()


def test_several_models_and_what_does_not_depend_on_text() -> None:
    still = kit.predictor("depth", np.arange(LAYERS), group="trivial", sign=-1.0)
    others = []
    for seed, layers in ((5, 9), (6, 20)):
        predictors = [
            *kit.proxies(layers, seed=seed),
            kit.predictor("depth", np.arange(layers), group="trivial", sign=-1.0),
        ]
        others.append(kit.report(predictors, [kit.truth("kl", np.arange(layers) ** 2)], model=f"m{seed}"))
    found, record = fit([*kit.proxies(LAYERS, seed=9), still], others)
    assert record["weights"]["ridge/all"]["depth"] == pytest.approx(1, abs=0.05)
    correlation = np.corrcoef(found["ridge/all"].values[1:], -np.arange(1, LAYERS))[0, 1]
    assert correlation > 0.98


@pytest.mark.parametrize(
    ("change", "message"),
    [({"regime": "generate"}, "regime"), ({"name": "nll"}, "no truth 'kl'"), ({"model": "self"}, "this very model")],
)
def test_what_may_not_be_fitted_on(change: dict[str, str], message: str) -> None:
    fingerprint = "fingerprint of self"
    with pytest.raises(UsageError, match=message):
        fitted_predictors(
            kit.proxies(LAYERS, seed=9),
            CANDIDATES,
            [source(**change)],
            regime="replace",
            truth="kl",
            fingerprint=fingerprint,
            penalty=0.1,
        )
