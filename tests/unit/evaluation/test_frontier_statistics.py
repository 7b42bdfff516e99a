"""What the frontier computes from ids, features and points, against answers known in another way."""

from __future__ import annotations

import itertools
import math
import sys
import types
from collections import Counter

import numpy as np
import pytest

from dihal.errors import UsageError
from dihal.evaluation.frontier.curve import area, at_entropy
from dihal.evaluation.frontier.distances import RealFeatures, mauve_score
from dihal.evaluation.frontier.statistics import TrainingGrams, self_bleu


def bleu(candidate: list[int], references: list[list[int]]) -> float:
    """BLEU-4 as in its definition, one candidate against all references."""

    def grams(ids: list[int], n: int) -> Counter:
        return Counter(tuple(ids[i : i + n]) for i in range(len(ids) - n + 1))

    product = 1.0
    for n in (1, 2, 3, 4):
        own = grams(candidate, n)
        hits = sum(min(count, max(grams(ref, n)[gram] for ref in references)) for gram, count in own.items())
        product *= (hits if hits else 0.1) / sum(own.values())
    return product**0.25


@pytest.mark.parametrize("vocab", [2, 5, 40])
def test_self_bleu_is_the_mean_bleu_against_the_others(vocab):
    samples = np.random.default_rng(vocab).integers(0, vocab, (9, 17)).tolist()
    direct = [bleu(ids, samples[:i] + samples[i + 1 :]) for i, ids in enumerate(samples)]
    assert self_bleu(samples) == pytest.approx(np.mean(direct), rel=1e-12)


def test_self_bleu_of_copies_is_one_and_of_strangers_is_small():
    assert self_bleu([[1, 2, 3, 4, 5]] * 3) == pytest.approx(1.0)
    strangers = [list(range(10 * i, 10 * i + 10)) for i in range(4)]
    assert self_bleu(strangers) == pytest.approx((0.1**4 / (10 * 9 * 8 * 7)) ** 0.25)
    assert self_bleu([[1, 2, 3, 4]]) is None
    with pytest.raises(UsageError, match="one length"):
        self_bleu([[1, 2, 3, 4], [1, 2, 3, 4, 5]])


def test_training_grams_are_those_within_documents():
    generator = np.random.default_rng(0)
    lengths = [3, 9, 1, 4, 12, 2]
    tokens = generator.integers(0, 3, sum(lengths)).astype(np.uint32)
    ends = np.cumsum(lengths)
    documents = np.split(tokens, ends[:-1])
    known = {tuple(doc[i : i + 4].tolist()) for doc in documents for i in range(len(doc) - 3)}
    index = TrainingGrams(tokens, ends)
    assert len(index) == len(known)
    every = np.array(list(itertools.product(range(3), repeat=4)))
    assert index.known(every)[:, 0].tolist() == [tuple(gram) in known for gram in every.tolist()]


def test_training_grams_of_large_ids_are_exact_and_place_matters():
    tokens = np.array([151_935, 7, 151_935, 3, 151_934], dtype=np.uint32)
    index = TrainingGrams(tokens, np.array([5]))
    asked = np.array([tokens[:4], tokens[1:], tokens[[2, 1, 0, 3]] + np.array([1, 0, 0, 0]), tokens[3::-1]])
    assert index.known(asked)[:, 0].tolist() == [True, True, False, False]
    assert TrainingGrams(tokens[:3], np.array([3])).known(asked).sum() == 0


def test_frechet_of_gaussians_is_the_closed_form():
    generator = np.random.default_rng(0)
    x = generator.standard_normal((4000, 6))
    centred = x - x.mean(0)
    white = centred @ np.linalg.inv(np.linalg.cholesky(np.cov(centred, rowvar=False))).T  # covariance I exactly
    scale = np.array([1.0, 2.0, 3.0, 0.5, 1.0, 1.5])
    real, found = white * 2.0, white * scale + np.array([3.0, 0, 0, 0, 0, 0])
    expected = (9.0 + ((scale - 2.0) ** 2).sum()) / (4.0 * 6)
    assert RealFeatures(real, channels=6).distance(found) == pytest.approx(expected, rel=1e-9)
    assert RealFeatures(real, channels=6).distance(real) == pytest.approx(0.0, abs=1e-9)
    assert RealFeatures(real, channels=6).distance(np.zeros_like(real)) == pytest.approx(1.0)


def test_frechet_looks_at_the_leading_directions_of_the_real_features():
    generator = np.random.default_rng(1)
    real = generator.standard_normal((500, 5)) * np.array([5.0, 4.0, 0.1, 0.1, 0.1])
    shifted = real + np.array([0, 0, 2.0, 0, 0])
    assert RealFeatures(real, channels=2).distance(shifted) < 1e-3
    assert RealFeatures(real, channels=5).distance(shifted) > 0.05
    with pytest.raises(UsageError, match="two texts"):
        RealFeatures(real, channels=2).distance(real[:1])


def test_mauve_is_none_without_the_library_and_asked_with_real_first(monkeypatch):
    monkeypatch.setitem(sys.modules, "mauve", None)
    features = np.random.default_rng(0).standard_normal((8, 3))
    assert mauve_score(features, features, seed=0) is None
    asked = {}

    def compute_mauve(**options):
        asked.update(options)
        return types.SimpleNamespace(mauve=0.25)

    monkeypatch.setitem(sys.modules, "mauve", types.SimpleNamespace(compute_mauve=compute_mauve))
    assert mauve_score(features + 1, features, seed=3) == 0.25
    assert np.allclose(asked["p_features"], features)
    assert np.allclose(asked["q_features"], features + 1)
    assert asked["seed"] == 3


def test_real_mauve_tells_equal_from_unlike():
    pytest.importorskip("mauve", reason="the extra `mauve` is not installed")
    generator = np.random.default_rng(0)
    real, same = generator.standard_normal((200, 4)), generator.standard_normal((200, 4))
    near, far = mauve_score(same, real, seed=0), mauve_score(same + 5, real, seed=0)
    assert near is not None
    assert far is not None
    assert 0 < far < 0.1 < 0.8 < near <= 1


def one(*values: float) -> np.ndarray:
    return np.array([values])


def test_values_between_points_are_linear_in_entropy():
    entropy, nll, other = one(3.0, 3.5, 4.0), one(4.0, 5.0, 7.0), one(0.3, 0.2, 0.0)
    assert at_entropy(entropy, nll, nll, 3.75)[0] == pytest.approx(6.0)
    assert at_entropy(entropy, nll, other, 3.75)[0] == pytest.approx(0.1)
    assert at_entropy(entropy, nll, nll, 3.0)[0] == pytest.approx(4.0)
    assert at_entropy(entropy, nll, nll, 4.0)[0] == pytest.approx(7.0)
    assert np.isnan(at_entropy(entropy, nll, nll, 2.99)[0])
    assert np.isnan(at_entropy(entropy, nll, nll, 4.01)[0])


def test_a_curve_that_turns_back_counts_where_its_nll_is_lowest():
    # Entropy rises, falls and rises again; 3.5 is passed three times, at NLL 4.5, 7 and 5.
    entropy, nll = one(3.0, 4.0, 3.0, 4.0), one(4.0, 5.0, 9.0, 1.0)
    assert at_entropy(entropy, nll, nll, 3.5)[0] == pytest.approx(4.5)
    assert at_entropy(entropy, nll, entropy * 0 + one(0, 0, 10, 20), 3.5)[0] == pytest.approx(0.0)
    flat = at_entropy(one(3.0, 3.0), one(5.0, 4.0), one(5.0, 4.0), 3.0)
    assert flat[0] in (4.0, 5.0)


def test_every_resample_is_its_own_curve_and_one_point_has_no_range():
    entropy = np.array([[3.0, 4.0], [3.4, 4.4], [3.6, 4.0]])
    nll = np.array([[4.0, 6.0], [4.0, 6.0], [4.0, 6.0]])
    found = at_entropy(entropy, nll, nll, 3.5)
    assert found[:2] == pytest.approx([5.0, 4.2])
    assert np.isnan(found[2])
    assert np.isnan(at_entropy(one(3.0), one(5.0), one(5.0), 3.1)[0])
    assert at_entropy(one(3.0), one(5.0), one(5.0), 3.0)[0] == 5.0


def test_area_of_known_curves():
    # From (3, 4) to (4, 6) under 10: above 3 it is 10 - (4 + 2 (e - 3)), mean over [3, 4] = 5.
    assert area(one(3.0, 4.0), one(4.0, 6.0), low=3.0, high=4.0, reference=10.0)[0] == pytest.approx(5.0, rel=1e-6)
    # It reaches half of [3, 5]; below its range its best point dominates.
    assert area(one(4.0), one(6.0), low=3.0, high=5.0, reference=10.0)[0] == pytest.approx(2.0)
    # Higher entropy at lower NLL dominates what lies left of it.
    assert area(one(3.0, 4.0), one(9.0, 6.0), low=3.0, high=4.0, reference=10.0)[0] == pytest.approx(4.0)
    assert area(one(3.0, 4.0), one(11.0, 12.0), low=3.0, high=4.0, reference=10.0)[0] == 0.0
    with pytest.raises(UsageError, match="must rise"):
        area(one(3.0), one(5.0), low=4.0, high=4.0, reference=10.0)


def test_area_never_falls_when_a_point_is_added():
    generator = np.random.default_rng(0)
    for _ in range(20):
        entropy, nll = np.sort(generator.uniform(2, 5, 4)), generator.uniform(3, 9, 4)
        options = {"low": 3.0, "high": 4.5, "reference": math.log(5000)}
        fewer = area(entropy[None, :3], nll[None, :3], **options)[0]
        assert area(entropy[None], nll[None], **options)[0] >= fewer - 1e-12
