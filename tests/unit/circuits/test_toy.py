"""Models whose circuits are known."""

from __future__ import annotations

import numpy as np
import pytest

from dihal.circuits.attribute import attribute
from dihal.circuits.exact import exact_scores
from dihal.circuits.graph import GraphSpec
from dihal.circuits.toy import INDUCTION_EDGES, induction_model, induction_pair, linear_net, linear_pairs, selftest
from dihal.circuits.types import EdgeScores


def live(scores: EdgeScores) -> dict[str, float]:
    values = np.where(scores.spec.edge_mask, scores.scores, 0)
    return {scores.spec.edge_name(u, v): float(values[u, v]) for u, v in np.argwhere(values)}


def test_every_claim_of_the_self_test_holds() -> None:
    records = selftest()
    assert len(records) >= 12
    assert [record["name"] for record in records if not record["passed"]] == []


@pytest.fixture(scope="module")
def exact() -> EdgeScores:
    return exact_scores(linear_net(layers=2).adapter(), linear_pairs())


@pytest.mark.parametrize(
    ("method", "steps", "rule"),
    [
        ("eap", 1, "midpoint"),
        ("eap-ig", 1, "midpoint"),
        ("eap-ig", 4, "midpoint"),
        ("eap-ig", 3, "left"),
        ("clean-corrupted", 1, "left"),
    ],
)
def test_linear_net(exact: EdgeScores, method: str, steps: int, rule: str) -> None:
    net, pairs = linear_net(layers=2).adapter(), linear_pairs()
    scores = attribute(net, pairs, method=method, steps=steps, rule=rule)
    assert abs(scores.scores - exact.scores).max() < 1e-12
    assert abs(exact.scores[:, -1].sum() - (exact.corrupted - exact.clean)) < 1e-12
    assert scores.residuals["reader_sums"] < 1e-12
    # Fixed patterns: queries and keys do nothing, everything else does something.
    silent = [name for name in scores.spec.readers if name.endswith(("<q>", "<k>"))]
    assert {name.split("->")[1] for name in live(scores)} == set(scores.spec.readers) - set(silent)


def test_induction_has_three_live_edges_of_29() -> None:
    model, pairs = induction_model(3.0).adapter(), induction_pair()
    assert model.spec() == GraphSpec(layers=2, heads=2, kv_heads=2, mlps=False)
    assert model.spec().n_edges == 29
    exact = live(exact_scores(model, pairs))
    assert set(exact) == set(INDUCTION_EDGES)
    assert list(exact.values()) == pytest.approx([-0.3859] * 3, abs=5e-5)
    plain = live(attribute(model, pairs, method="eap"))
    assert set(plain) == set(INDUCTION_EDGES)
    assert [plain[name] for name in INDUCTION_EDGES] == pytest.approx([-0.165, -0.165, -0.3859], abs=5e-4)
    for steps, rule, value in ((5, "midpoint", -0.3873), (30, "midpoint", -0.3859), (5, "left", -0.4111)):
        found = live(attribute(model, pairs, steps=steps, rule=rule))
        assert set(found) == set(INDUCTION_EDGES)
        assert [found[name] for name in INDUCTION_EDGES[:2]] == pytest.approx([value] * 2, abs=5e-5)


def test_saturation_hides_edges_from_plain_gradients() -> None:
    model, pairs = induction_model(40.0).adapter(), induction_pair()
    exact, plain = exact_scores(model, pairs), attribute(model, pairs, method="eap")
    assert list(live(exact).values()) == pytest.approx([-0.5] * 3)
    hidden = [plain.scores[plain.spec.edge_index(name)] for name in INDUCTION_EDGES[:2]]
    assert max(abs(value) for value in hidden) < 1e-30
    found = attribute(model, pairs, steps=30)
    for name in INDUCTION_EDGES[:2]:
        assert found.scores[found.spec.edge_index(name)] == pytest.approx(-0.5046, abs=1e-4)
    assert set(found.top(3).names) == set(INDUCTION_EDGES)


def test_random_linear_nets_differ() -> None:
    first, second = (attribute(linear_net(seed).adapter(), linear_pairs()).scores for seed in (0, 1))
    assert abs(first - second).max() > 0.01
