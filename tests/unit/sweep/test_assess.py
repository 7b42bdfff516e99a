from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dihal import score_layers
from dihal.backbone import Backbone
from dihal.config import ScoreConfig
from dihal.config.sweep import PredictorConfig
from dihal.errors import UsageError
from dihal.sweep.assess import Assessment, assess
from dihal.sweep.predictors import DIRECTIONS, GROUPS, PROXIES, Predictor
from tests.kit import tiny_backbone
from tests.unit.geometry.test_windows import documents

SCORE = ScoreConfig(
    tokens=1800, sequence_length=48, batch_tokens=512, pool=900, anchors=100, neighbours=16, bootstrap=60
)
OTHERS = PredictorConfig(fisher_tokens=400)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone()


@pytest.fixture(scope="module")
def assessment(backbone: Backbone) -> Assessment:
    return assess(backbone, documents(60), SCORE, OTHERS)


@pytest.fixture(scope="module")
def found(assessment: Assessment) -> dict[str, Predictor]:
    return {item.name: item for item in assessment.predictors}


def test_every_predictor_is_there(found: dict[str, Predictor]) -> None:
    geometry = {"score", *(f"without-{name}" for name in PROXIES), *PROXIES}
    assert set(found) == {f"{name}/{kind}" for name in geometry for kind in SCORE.coordinates} | set(DIRECTIONS)
    assert {item.group for item in found.values()} == set(GROUPS) - {"transfer"}
    for item in found.values():
        assert item.values.shape == (4,)
        assert np.isfinite(item.values[1:]).all(), item.name
        if item.name != "depth":
            assert item.resampled is not None
            assert item.resampled.shape == (SCORE.bootstrap, 4)
            spread = np.nanstd(item.resampled[:, 1:], axis=0)
            assert (spread > 0).all(), item.name
            centre = np.nanmean(item.resampled[:, 1:], axis=0)
            assert (np.abs(centre - item.values[1:]) < 3 * spread).all(), item.name


def test_the_score_is_that_of_dihal_score(backbone: Backbone, found: dict[str, Predictor]) -> None:
    report = score_layers(backbone, documents(60), SCORE)
    for kind, item in report.coordinates.items():
        for split in item.splits:
            assert found[f"score/{kind}"].values[split.split] == pytest.approx(split.score)
            for name, (sign, _) in PROXIES.items():
                assert found[f"{name}/{kind}"].values[split.split] == pytest.approx(sign * getattr(split, f"z_{name}"))
            low, high = np.quantile(found[f"score/{kind}"].resampled[:, split.split], [0.025, 0.975])
            assert (low, high) == pytest.approx(split.score_interval)
    for layer in report.layers:
        assert found["dispersion"].values[layer.split] == pytest.approx(layer.log_trace)
        assert found["cosine"].values[layer.split] == pytest.approx(layer.mean_cosine)
        assert found["norm"].values[layer.split] == pytest.approx(layer.median_norm, rel=1e-3)


def test_leaving_one_out(found: dict[str, Predictor]) -> None:
    for kind in SCORE.coordinates:
        for name in PROXIES:
            rest = found[f"without-{name}/{kind}"]
            np.testing.assert_allclose(rest.values + found[f"{name}/{kind}"].values, found[f"score/{kind}"].values)
            np.testing.assert_allclose(
                rest.resampled + found[f"{name}/{kind}"].resampled, found[f"score/{kind}"].resampled
            )


def test_h0_predicts_itself(found: dict[str, Predictor]) -> None:
    assert found["probe"].values[0] > 0.9
    assert (found["probe"].values[1:] < 0.9).all()
    assert found["viv_given"].values[0] < 0.5 * found["viv_given"].values[1:].min()
    # What is left after a prediction is less than all there is.
    assert (found["viv_given"].values[1:] < found["viv"].values[1:]).all()


def test_directions(found: dict[str, Predictor]) -> None:
    np.testing.assert_array_equal(found["depth"].friendliness, [0, -1, -2, -3])
    values, rows = found["norm"].at([1, 3])
    np.testing.assert_array_equal(values, -found["norm"].values[[1, 3]])
    assert rows is not None
    np.testing.assert_array_equal(rows, -found["norm"].resampled[:, [1, 3]])


def test_without_resamples_and_without_fisher(backbone: Backbone, found: dict[str, Predictor]) -> None:
    plain = assess(
        backbone,
        documents(60),
        dataclasses.replace(SCORE, bootstrap=0, coordinates=("rms",)),
        PredictorConfig(fisher_tokens=0),
    )
    names = {item.name for item in plain.predictors}
    assert "viv" in names
    assert "score/raw" not in names
    assert not any("fisher" in name for name in names)
    for item in plain.predictors:
        assert item.resampled is None
        np.testing.assert_allclose(item.values, found[item.name].values, rtol=1e-6)


@pytest.mark.parametrize(
    ("option", "value"),
    [("probe_folds", 1), ("probe_ridges", ()), ("probe_ridges", (-1.0,)), ("intrinsic_discard", 1.0),
     ("fisher_tokens", -1), ("fisher_chunk", 0), ("transfer_ridge", 0.0)],
)  # fmt: skip
def test_bad_options(backbone: Backbone, option: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"predictors.{option}"):
        assess(backbone, documents(60), SCORE, dataclasses.replace(OTHERS, **{option: value}))


def test_two_candidates_at_least() -> None:
    with pytest.raises(UsageError, match="3 blocks"):
        assess(tiny_backbone(num_blocks=2), documents(60), SCORE, OTHERS)
