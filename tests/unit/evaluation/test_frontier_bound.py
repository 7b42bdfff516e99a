"""The likelihood bound of a checkpoint: chosen on one half of the documents, measured on the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dihal.evaluation.bootstrap import document_weights
from dihal.evaluation.frontier.bound import has_bound, likelihood_bound
from dihal.evaluation.frontier.prompts import Chosen
from dihal.evaluation.generation import Prompts
from dihal.writing.bound import nll_bound, state_errors
from tests.kit import tiny_backbone
from tests.unit.test_methods import make_batch
from tests.unit.test_writer import build, prefixes

CUTS = 6


@pytest.fixture(scope="module")
def setup():
    backbone = tiny_backbone()
    return backbone, build(backbone, "hidden"), make_batch(7, 16).input_ids


def measured(setup, owners: list[int], **changes):
    backbone, writer, ids = setup
    chosen = Chosen(
        prompts=Prompts(prompts=ids[:, :5], real=ids[:, 5:]),
        documents=owners,
        keys=[f"document {number}" for number in range(max(owners) + 1)],
    )
    options = {"cuts": CUTS, "precision": "float32", "batch_size": 3, "seed": 2, "confidence": 0.9}
    weights = document_weights(len(chosen.keys), 200, 0)
    return likelihood_bound(writer, backbone, chosen, weights=weights, **{**options, **changes})


def test_each_half_is_measured_where_the_other_is_best(setup) -> None:
    backbone, writer, ids = setup
    owners = np.array([0, 0, 1, 2, 3, 3, 4])
    found = measured(setup, owners.tolist())
    known = prefixes(*[5] * 7)
    terms = nll_bound(writer, backbone, ids, known, cuts=CUTS, seed=2, sample_ids=torch.arange(7))
    for name in ("own", "suffix", "fused"):
        total = terms.total(name).numpy()
        odd = owners % 2 == 1
        nats = total[~odd, total[odd].sum(0).argmin()].sum() + total[odd, total[~odd].sum(0).argmin()].sum()
        one = found["readings"][name]
        assert one["value"] == pytest.approx(nats / (7 * 11), rel=1e-4)
        assert one["low"] <= one["value"] <= one["high"]
        assert sum(one["terms"].values()) == pytest.approx(one["value"])
        assert [pick["reading"] for pick in one["chosen"]] == [name, name]
    assert found["tokens"] == 7 * 11
    states = found["states"]
    errors = state_errors(writer, backbone, ids, known, times=states["times"], seed=2, sample_ids=torch.arange(7))
    left = errors.squared_error.sum(0) / errors.variance.sum()
    assert states["explained_variance"] == pytest.approx((1 - left).tolist(), rel=1e-4)
    assert states["cosine"] == pytest.approx((errors.cosine.sum(0) / 77).tolist(), rel=1e-4)
    assert states["value"] == pytest.approx(float(1 - left.mean()), rel=1e-4)
    assert states["low"] <= states["value"] <= states["high"]
    assert states["log_snr"] == sorted(states["log_snr"], reverse=True)
    assert len(found["curves"]["log_snr"]) == len(found["curves"]["path"]) == CUTS


def test_the_whole_is_no_better_than_what_was_seen(setup) -> None:
    """Chosen on the text itself, the bound could only be lower: cross-fitting does not cheat."""
    found = measured(setup, [0, 1, 2, 3, 4, 5, 6])
    curves = found["curves"]
    best = min(
        reading + path
        for name in ("own", "suffix", "fused")
        for reading, path in zip(curves[name], curves["path"], strict=True)
    )
    assert found["value"] >= best + found["terms"]["prior"] - 1e-6


def test_one_document_is_enough_and_batches_do_not_matter(setup) -> None:
    alone = measured(setup, [0] * 7)
    assert alone["low"] == alone["high"] == pytest.approx(alone["value"])
    assert len(alone["chosen"]) == 1
    assert measured(setup, [0] * 7, batch_size=7)["value"] == pytest.approx(alone["value"], rel=1e-4)


def test_only_writers_in_spaces_of_vectors_have_it(setup) -> None:
    backbone, writer, _ = setup
    assert has_bound(writer)
    assert has_bound(build(backbone, "latent"))
    assert has_bound(build(backbone, "embedding"))
    assert not has_bound(build(backbone, "simplex"))
    assert not has_bound(None)
