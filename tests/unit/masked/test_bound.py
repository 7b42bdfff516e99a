"""The bound against likelihoods that can be computed exactly."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from dihal.errors import UsageError
from dihal.masked.attention import full
from dihal.masked.bound import nll_bound
from tests.unit.masked.kit import converted, with_token
from tests.unit.test_methods import make_batch, randomise

TOKENS = 5
"""Predicted tokens of the toy: 2^5 masks."""


def toy():
    backbone, method = converted()
    return backbone, randomise(method, scale=0.2).eval()


def copies(ids, count: int):
    """One text many times, each with draws of its own."""
    return dataclasses.replace(make_batch(count, ids.shape[1]), input_ids=ids.expand(count, -1).contiguous())


@torch.no_grad()
def exact(backbone, method, ids) -> tuple[float, float]:
    """(negative log-likelihood of writing one token at a time in random order, its bound), both in nats.

    With p(i | S) the probability of token i when the tokens of S are masked (i in S), the likelihood is f(all), where
    f(S) is the mean over i in S of p(i | S) f(S without i), and the bound g(S) the mean of -log p(i | S) + g(S without i).
    """
    places = range(1, 1 + TOKENS)
    likelihood, bound = {frozenset(): 1.0}, {frozenset(): 0.0}
    for size in places:
        for masked in map(frozenset, itertools.combinations(places, size)):
            noised = ids.clone()
            noised[0, list(masked)] = method.mask_token_id
            features = method.features(backbone, noised, full(torch.ones_like(ids, dtype=torch.bool)))
            log_p = method.head(backbone, features).double().log_softmax(-1)
            of = {i: float(log_p[0, i - 1, ids[0, i]]) for i in masked}
            likelihood[masked] = sum(math.exp(of[i]) * likelihood[masked - {i}] for i in masked) / size
            bound[masked] = sum(-of[i] + bound[masked - {i}] for i in masked) / size
    everything = frozenset(places)
    return -math.log(likelihood[everything]), bound[everything]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_estimate_is_the_bound_and_the_bound_is_above_the_likelihood(seed: int) -> None:
    backbone, method = toy()
    batch = make_batch(1, 1 + TOKENS, seed=seed)
    nll, bound = exact(backbone, method, batch.input_ids)
    assert nll <= bound
    found = nll_bound(method, backbone, copies(batch.input_ids, 1000), draws=4, seed=seed)
    error = float(found.nats.std()) / 1000**0.5
    assert float(found.nats.mean()) == pytest.approx(bound, abs=4 * error)
    assert error < 0.01 * bound, "the check above means something"
    assert float(found.error.mean()) > 0.5 * float(found.nats.std()), "the draws' scatter does not flatter"
    assert found.counted.tolist() == [TOKENS] * 1000


def test_the_bound_lies_above_where_the_model_is_far_from_one_order() -> None:
    """Jensen's gap is no rounding: orders disagree in a random model."""
    backbone, method = converted()
    randomise(method, scale=1.0)
    gaps = [
        (lambda pair: pair[1] - pair[0])(exact(backbone, method, make_batch(1, 1 + TOKENS, seed=seed).input_ids))
        for seed in range(3)
    ]
    assert min(gaps) > 0.1


def test_a_uniform_model_has_the_entropy_of_its_vocabulary() -> None:
    """No scatter at all: every mask gives the same number."""
    backbone, method = toy()
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.zero_()
    found = nll_bound(method, backbone, make_batch(3, 9), draws=4, seed=0)
    torch.testing.assert_close(found.nats, torch.full((3,), 8 * math.log(97), dtype=torch.float64), rtol=1e-5, atol=0)
    assert found.per_token == pytest.approx(math.log(97), rel=1e-5)
    assert float(found.error.max()) < 1e-4


def test_the_training_loss_estimates_the_same_bound() -> None:
    """MDLM's weight 1 / t and the count of masked tokens are two estimators of one number."""
    backbone, method = toy()
    ids = make_batch(1, 1 + TOKENS).input_ids
    _, bound = exact(backbone, method, ids)
    batch = copies(ids, 4000)
    with torch.no_grad():
        out = method.loss(
            backbone, batch, seed=0, step=0, batch_index=torch.arange(4000), global_batch=4000, progress=1.0
        )
    # 1 / t of Bernoulli masks scatters widely: about 4 % of the bound here.
    assert float(out.terms["bound"]) * TOKENS == pytest.approx(bound, rel=0.12)


def test_numbers_do_not_depend_on_the_batch() -> None:
    backbone, method = toy()
    batch = make_batch(4, 12)
    whole = nll_bound(method, backbone, batch, draws=3, seed=5)
    for row in range(4):
        one = type(batch)(
            **{name: getattr(batch, name)[row, None] for name in ("input_ids", "attention_mask", "document_ids")},
            loss_mask=batch.loss_mask[row, None],
            sample_ids=batch.sample_ids[row, None],
            full=True,
        )
        torch.testing.assert_close(nll_bound(method, backbone, one, draws=3, seed=5).nats, whole.nats[row, None])


def test_padding_and_the_mask_token_itself_are_not_counted() -> None:
    backbone, method = converted(given=with_token("<pad>"))
    batch = make_batch(2, 12, pad=3)
    batch.input_ids[0, 4] = method.mask_token_id
    found = nll_bound(method, backbone, batch, draws=2, seed=0)
    assert found.counted.tolist() == [7, 8]
    assert bool(torch.isfinite(found.nats).all())


def test_bad_input() -> None:
    backbone, method = toy()
    with pytest.raises(UsageError, match="draws"):
        nll_bound(method, backbone, make_batch(1, 6), draws=0, seed=0)
    with pytest.raises(UsageError, match="no token to predict"):
        nll_bound(method, backbone, make_batch(1, 1), draws=1, seed=0)
