"""Text statistics with known answers; sampling that keeps its tail."""

from __future__ import annotations

import math

import pytest
import torch

from dihal.errors import UsageError
from dihal.evaluation.sampling import FixedDraws, draw_tokens, uniform53
from dihal.evaluation.text import degenerate, distinct_n, repetition_n, text_metrics, unigram_entropy


def test_repetition_of_one_token():
    ids = [5] * 16
    assert unigram_entropy(ids) == 0
    assert repetition_n(ids, 2) == pytest.approx(1 - 1 / 15)
    assert repetition_n(ids, 4) == pytest.approx(1 - 1 / 13)
    assert degenerate(ids)


def test_all_different_tokens():
    ids = list(range(16))
    assert unigram_entropy(ids) == pytest.approx(math.log(16))
    assert [repetition_n(ids, n) for n in (2, 3, 4)] == [0, 0, 0]
    assert not degenerate(ids)


def test_a_loop_of_three_tokens():
    ids = [1, 2, 3] * 6  # 15 four-grams, 3 distinct
    assert unigram_entropy(ids) == pytest.approx(math.log(3))
    assert repetition_n(ids, 4) == pytest.approx(1 - 3 / 15)
    assert degenerate(ids)


def test_few_distinct_tokens_without_repeated_four_grams_are_degenerate_only_below_the_share():
    assert not degenerate([1, 1, 1, 1, 2, 2, 2, 2])  # 2 of 8 distinct, five 4-grams all different
    assert degenerate([1] * 8 + [2])  # rep-4 is 1 - 2/6


def test_distinct_pools_over_samples():
    assert distinct_n([[1, 2, 3], [1, 2, 4]], 1) == pytest.approx(4 / 6)
    assert distinct_n([[1, 2, 3], [1, 2, 4]], 2) == pytest.approx(3 / 4)
    assert distinct_n([[1, 2]], 3) is None
    assert repetition_n([1, 2], 3) is None


def test_pooled_entropy_exceeds_the_mean_of_samples_that_differ():
    found = text_metrics([[1, 1, 2, 2], [3, 3, 4, 4]])
    assert found["entropy"] == pytest.approx(math.log(2))
    assert found["entropy_pooled"] == pytest.approx(math.log(4))
    assert found["rep_2"] == 0
    assert found["degenerate_rate"] == 0


@pytest.mark.parametrize("samples", [[], [[]], [[1], [1, 2]]])
def test_unlike_lengths_are_refused(samples):
    with pytest.raises(UsageError, match="one non-zero length"):
        text_metrics(samples)


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    uniforms = uniform53(0, torch.arange(40_000), "token 0")
    drawn = draw_tokens(logits.expand(40_000, 4), uniforms, temperature=0.7)
    found = torch.bincount(drawn, minlength=4) / 40_000
    torch.testing.assert_close(found, (logits / 0.7).softmax(0), atol=0.01, rtol=0)


def test_the_tail_is_reached_where_fp32_would_lose_it():
    # One token at probability 2^-40 behind a likely one: in fp32 the cumulative sum never moves.
    logits = torch.tensor([[0.0, -40 * math.log(2)]])
    just_below_one = torch.tensor([1 - 2.0**-42], dtype=torch.float64)
    assert draw_tokens(logits, just_below_one, temperature=1.0).tolist() == [1]
    assert draw_tokens(logits, torch.tensor([1 - 2.0**-38], dtype=torch.float64), temperature=1.0).tolist() == [0]


def test_uniforms_are_fine_and_open():
    values = uniform53(1, torch.arange(20_000), "x")
    assert values.dtype == torch.float64
    assert 0 < values.min() < 1e-3
    assert 0.999 < values.max() < 1
    assert values.mean() == pytest.approx(0.5, abs=0.01)
    scaled = values * 2.0**33
    assert (scaled != scaled.floor()).float().mean() > 0.99, "bits below 2^-33 must be there"


def test_a_draw_depends_on_its_sample_and_step_only():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    draws = FixedDraws(prompt_length=2, sample_ids=torch.tensor([7, 8, 9]), seed=0, temperature=1.0, banned=None)
    alone = FixedDraws(prompt_length=2, sample_ids=torch.tensor([8]), seed=0, temperature=1.0, banned=None)
    together = draws(torch.zeros(3, 5, dtype=torch.long), logits).argmax(-1)
    assert alone(torch.zeros(1, 5, dtype=torch.long), logits[1:2]).argmax(-1).item() == together[1].item()
    assert (draws(torch.zeros(3, 5, dtype=torch.long), logits) == 0).sum() == 3


def test_banned_tokens_and_greedy():
    logits = torch.tensor([[5.0, 1.0, 4.0]])
    half = torch.tensor([0.5], dtype=torch.float64)
    assert draw_tokens(logits, half, temperature=0.0).tolist() == [0]
    assert draw_tokens(logits, half, temperature=0.0, banned=0).tolist() == [2]
    everywhere = uniform53(0, torch.arange(500), "b")
    assert 0 not in draw_tokens(logits.expand(500, 3), everywhere, temperature=2.0, banned=0)
    assert logits[0, 0] == 5, "the caller's logits are left alone"


def test_a_uniform_at_the_very_end_lands_on_a_possible_token():
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    almost = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    assert draw_tokens(logits, almost, temperature=1.0).tolist() == [1]


def test_bad_temperature_and_nan():
    half = torch.tensor([0.5], dtype=torch.float64)
    with pytest.raises(UsageError, match="temperature"):
        draw_tokens(torch.zeros(1, 3), half, temperature=-1.0)
    with pytest.raises(UsageError, match="NaN"):
        draw_tokens(torch.tensor([[0.0, torch.nan]]), half, temperature=1.0)
