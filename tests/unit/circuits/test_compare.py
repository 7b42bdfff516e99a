"""Overlaps, nulls, ceilings and profiles against simulation and planted truth."""

from __future__ import annotations

import numpy as np
import pytest

from dihal.circuits.compare import compare_scores, require_comparable
from dihal.circuits.graph import GraphSpec
from dihal.circuits.nulls import blocks_of, halves, permutation_null, stability
from dihal.circuits.overlap import (
    Estimate,
    budgets,
    chance_jaccard,
    corrected,
    edge_values,
    jaccard,
    part_weights,
    spearman,
    top_edges,
    weighted_jaccard,
)
from dihal.circuits.profile import component_scores, depth_profile, top_overlap, wasserstein
from dihal.circuits.types import Circuit, EdgeScores
from dihal.config.circuits import OverlapConfig
from dihal.errors import UsageError

SPEC = GraphSpec(layers=6, heads=4, kv_heads=2)
GENERATOR = np.random.default_rng(0)


def test_chance_level_by_simulation() -> None:
    edges, k = SPEC.n_edges, 200
    found = []
    for _ in range(400):
        sets = []
        for _ in range(2):
            chosen = np.zeros(edges, dtype=bool)
            chosen[GENERATOR.choice(edges, k, replace=False)] = True
            sets.append(chosen)
        found.append(jaccard(*sets))
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - chance_jaccard(k, edges)) < 4 * error + 1e-3
    assert chance_jaccard(edges, edges) == 1.0


@pytest.mark.parametrize("shared", [0, 30, 75, 150])
def test_planted_overlap_is_recovered(shared: int, make_scores) -> None:
    """Two models whose 150 true edges have a known number in common, with scores far above the noise."""
    k, edges = 150, np.argwhere(SPEC.edge_mask)
    order = np.random.default_rng(shared).permutation(len(edges))
    tables = []
    for start in (0, k - shared):
        table = np.zeros(SPEC.edge_mask.shape)
        for u, v in edges[order[start : start + k]]:
            table[u, v] = 5.0
        tables.append(table)
    first, second = (make_scores(SPEC, table, noise=1.0, seed=seed) for seed, table in enumerate(tables))
    found = compare_scores(first, second, OverlapConfig(ks=(k,), fractions=(0.05,), resamples=20, null_resamples=50))
    row = found.at(k)
    assert row["shared"] == shared
    assert row["jaccard"]["value"] == pytest.approx(shared / (2 * k - shared))
    assert row["ceiling"] == pytest.approx(1.0)
    assert row["jaccard"]["low"] - 1e-9 <= row["jaccard"]["value"] <= row["jaccard"]["high"] + 1e-9


def test_the_same_model_reaches_its_ceiling_and_not_one(make_scores, heavy_tail) -> None:
    truth = heavy_tail(SPEC)
    first, second = (make_scores(SPEC, truth, noise=8.0, seed=seed) for seed in (0, 1))
    found = compare_scores(first, second, OverlapConfig(ks=(100,), fractions=(), resamples=40, null_resamples=50))
    row = found.at(100)
    assert 0.2 < row["ceiling"] < 0.95
    # Across halves the noise is that of the ceiling: nothing is lost. With all prompts there is less noise.
    assert row["corrected"] == pytest.approx(1.0, abs=0.2)
    assert row["jaccard"]["value"] > row["halves"]["across"]
    same = compare_scores(first, first, OverlapConfig(ks=(100,), fractions=(), resamples=10, null_resamples=50)).at(100)
    assert same["jaccard"]["value"] == 1.0
    assert same["corrected"] == pytest.approx(1.0)


def test_layer_null_matches_a_real_permutation() -> None:
    """The hypergeometric draws have the mean and spread of permuting one circuit within blocks."""
    truth = np.abs(GENERATOR.normal(size=SPEC.edge_mask.shape)) * np.linspace(3, 0.2, SPEC.n_writers)[:, None]
    values = edge_values(SPEC, truth)
    one, other = top_edges(values, 150), top_edges(values * GENERATOR.uniform(0.5, 2, len(values)), 150)
    for null in ("layer", "kind"):
        blocks = blocks_of(SPEC, null)
        drawn = permutation_null(one, other, blocks, 2_000, seed=0)
        permuted = []
        for _ in range(400):
            moved = other.copy()
            for block in range(blocks.max() + 1):
                inside = np.flatnonzero(blocks == block)
                moved[inside] = other[GENERATOR.permutation(inside)]
            permuted.append(jaccard(one, moved))
        assert np.mean(drawn) == pytest.approx(np.mean(permuted), abs=4 * np.std(permuted) / 20)
        assert np.std(drawn) == pytest.approx(np.std(permuted), rel=0.15)
        assert np.mean(drawn) > chance_jaccard(150, SPEC.n_edges)
        assert np.array_equal(drawn, permutation_null(one, other, blocks, 2_000, seed=0))
    assert blocks_of(SPEC, "kind").max() > blocks_of(SPEC, "layer").max()


def test_bootstrap_is_paired_and_reproducible(make_scores, heavy_tail) -> None:
    weights = part_weights((8,) * 8, 200, seed=3)
    assert np.allclose(weights.sum(1), 1)
    assert np.array_equal(weights, part_weights((8,) * 8, 200, seed=3))
    assert not np.array_equal(weights, part_weights((8,) * 8, 200, seed=4))
    assert np.allclose(weights.mean(0), 1 / 8, atol=0.03)
    scores = make_scores(SPEC, heavy_tail(SPEC), noise=4.0)
    found = stability(scores, np.array([50, 400]), 20, seed=0)
    assert found.shape == (20, 2)
    assert (found > chance_jaccard(400, SPEC.n_edges)).all()
    assert (found < 1).any()


def test_interval_of_a_biased_statistic_holds_the_value() -> None:
    # Every resample lies above the value, as magnitudes do.
    found = Estimate.of(1.0, np.linspace(1.4, 1.6, 101), 0.9)
    assert found.low == pytest.approx(0.91)
    assert found.high == pytest.approx(1.09)
    assert Estimate.of(float("nan"), np.ones(3), 0.9).value is None


def test_measures_without_k() -> None:
    a = np.array([3.0, -1.0, 0.0, 0.0])
    assert weighted_jaccard(a, a * 7) == pytest.approx(1.0)
    assert weighted_jaccard(a, np.array([0.0, 0.0, 1.0, 1.0])) == 0.0
    # 3/4 and 1/4 against 1/4 and 3/4: minima 1/2, maxima 3/2.
    assert weighted_jaccard(a, np.array([1.0, 3.0, 0.0, 0.0])) == pytest.approx(1 / 3)
    assert spearman(np.arange(5.0), -np.arange(5.0)) == pytest.approx(1.0)
    assert np.isnan(weighted_jaccard(a, 0 * a))
    assert corrected(0.5, 0.1, 0.9) == pytest.approx(0.5)
    assert np.isnan(corrected(0.5, 0.5, 0.5))
    assert list(budgets(1000, (100, 5000), (0.1, 0.2))) == [100, 200]


def test_top_edges_are_those_of_the_scores(make_scores, heavy_tail) -> None:
    scores = make_scores(SPEC, heavy_tail(SPEC), noise=1.0)
    for k in (1, 77, SPEC.n_edges):
        assert np.array_equal(top_edges(edge_values(SPEC, scores.scores), k), scores.top(k).edges[SPEC.edge_mask])
    with pytest.raises(UsageError, match="out of range"):
        top_edges(np.ones(4), 5)


def test_components_add_edges_in_and_out() -> None:
    table = np.zeros(SPEC.edge_mask.shape)
    for name, score in (("a1.h2->m1", -2.0), ("input->a1.h2<q>", -1.0), ("m0->a1.g1<v>", 4.0), ("m1->logits", 0.5)):
        table[SPEC.edge_index(name)] = score
    found = dict(zip(SPEC.writers, component_scores(SPEC, table), strict=True))
    # Heads 2 and 3 share the value reader g1: half of it each.
    assert found["a1.h2"] == pytest.approx(-2.0 - 1.0 + 2.0)
    assert found["a1.h3"] == pytest.approx(2.0)
    assert found["m1"] == pytest.approx(-2.0 + 0.5)
    assert found["m0"] == pytest.approx(4.0)
    assert found["input"] == pytest.approx(-1.0)
    only = Circuit.named(SPEC, ["m1->logits"])
    assert dict(zip(SPEC.writers, component_scores(SPEC, table, only.edges)))["a1.h2"] == 0.0
    assert top_overlap(np.array([3.0, 2, 1, 0]), np.array([0.0, -5, 1, -4]), 2) == 0.5


def test_depth_profile_and_distance() -> None:
    early, late = np.zeros(SPEC.edge_mask.shape), np.zeros(SPEC.edge_mask.shape)
    early[SPEC.edge_index("m0->m1")] = -1.0
    early[SPEC.edge_index("input->m0")] = 3.0
    late[SPEC.edge_index("m4->m5")] = 2.0
    one, other = (depth_profile(SPEC, table, "writer") for table in (early, late))
    assert one.layers == tuple(range(-1, 6))
    assert one.shares.tolist() == [0.75, 0.25, 0, 0, 0, 0, 0]
    assert (one.center, other.center) == (-0.75, 4.0)
    assert (one.early, other.early) == (1.0, 0.0)
    assert wasserstein(one, other) == pytest.approx(4.75)
    readers = depth_profile(SPEC, late, "reader")
    assert readers.layers == tuple(range(7))
    assert readers.center == 5.0
    upper, _ = SPEC.contract(late, 3)
    assert depth_profile(upper, SPEC.contract(late, 3)[1], "writer").layers == (2, 3, 4, 5)
    with pytest.raises(UsageError, match="all scores are zero"):
        depth_profile(SPEC, np.zeros(SPEC.edge_mask.shape), "writer")
    with pytest.raises(UsageError, match="one seam"):
        wasserstein(one, depth_profile(upper, SPEC.contract(late, 3)[1], "writer"))


def test_a_shift_in_depth_is_found_with_its_interval(make_scores, heavy_tail) -> None:
    truth = heavy_tail(SPEC)
    weight = np.exp(-0.4 * SPEC.layer_of_writer.clip(0))[:, None]
    first, second = make_scores(SPEC, truth * weight, noise=0.5), make_scores(SPEC, truth / weight, noise=0.5, seed=1)
    found = compare_scores(first, second, OverlapConfig(ks=(100,), fractions=(), resamples=40, null_resamples=20))
    change = found.depth["writer"]["change"]["center"]
    assert change["low"] > 0
    assert found.depth["writer"]["change"]["early"]["high"] < 0
    assert found.depth["writer"]["wasserstein"] > 3 * max(found.depth["writer"]["wasserstein_halves"])
    again = compare_scores(
        first, make_scores(SPEC, truth * weight, noise=0.5, seed=2), OverlapConfig(ks=(100,), resamples=40)
    )
    interval = again.depth["writer"]["change"]["center"]
    assert interval["low"] < 0 < interval["high"]


def test_split_halves_use_disjoint_prompts(make_scores, heavy_tail) -> None:
    first, second = (make_scores(SPEC, heavy_tail(SPEC), noise=6.0, seed=seed) for seed in (0, 5))
    (found,) = halves(first, second, np.array([80]))
    even, odd = first.halves
    expected = jaccard(top_edges(edge_values(SPEC, even), 80), top_edges(edge_values(SPEC, odd), 80))
    assert found.first == expected
    assert found.ceiling == pytest.approx(np.sqrt(found.first * found.second))


def test_models_that_cannot_be_compared(make_scores, heavy_tail) -> None:
    first = make_scores(SPEC, heavy_tail(SPEC), noise=1.0)
    deeper = GraphSpec(layers=7, heads=4, kv_heads=2)
    with pytest.raises(UsageError, match="layers 6 and 7"):
        compare_scores(first, make_scores(deeper, heavy_tail(deeper), noise=1.0), OverlapConfig())
    second = make_scores(SPEC, heavy_tail(SPEC), noise=1.0)
    first.details["comparable"] = {"task": "ioi", "pairs": 64}
    second.details["comparable"] = {"task": "countdown", "pairs": 64}
    with pytest.raises(UsageError, match="differ in task"):
        require_comparable(first, second)
    bare = EdgeScores(spec=SPEC, scores=first.scores, n=64)
    with pytest.raises(UsageError, match="without parts"):
        compare_scores(bare, bare, OverlapConfig())
    other = make_scores(SPEC, heavy_tail(SPEC), noise=1.0, parts=4)
    other.details = first.details
    with pytest.raises(UsageError, match="numbers of parts"):
        require_comparable(first, other)


def test_bridge_and_lower_are_the_same_node(make_scores, heavy_tail) -> None:
    spec = GraphSpec(layers=6, heads=4, kv_heads=2, seam=2, lower="lower")
    bridge = GraphSpec(layers=6, heads=4, kv_heads=2, seam=2, lower="bridge")
    first, second = make_scores(spec, heavy_tail(spec), noise=1.0), make_scores(bridge, heavy_tail(bridge), noise=1.0)
    found = compare_scores(first, second, OverlapConfig(ks=(50,), resamples=5, null_resamples=10))
    assert found.at(50)["jaccard"]["value"] == 1.0
    assert found.depth["writer"]["layers"][0] == 1


def test_scores_spread_over_more_edges_are_called_so(make_scores, heavy_tail) -> None:
    """The second model's scores are the square roots of the first's: flatter, so that more edges carry them."""
    spec = SPEC
    truth = heavy_tail(spec)
    flat = np.sign(truth) * np.sqrt(abs(truth))
    first, second = (make_scores(spec, table, noise=0.01, seed=i) for i, table in enumerate((truth, flat)))
    found = compare_scores(first, second, OverlapConfig(ks=(20,), fractions=(), k=20, resamples=50))
    change = found.whole["concentration"]["edges"]["change"]
    assert 0 < change["low"] < change["value"] < change["high"]
    same = compare_scores(first, first, OverlapConfig(ks=(20,), fractions=(), k=20, resamples=50))
    assert same.whole["concentration"]["edges"]["change"] == {"value": 0.0, "low": 0.0, "high": 0.0}
