"""Metrics against direct fp64 computations."""

from __future__ import annotations

import pytest
import torch

from dihal.errors import UsageError
from dihal.evaluation import metrics


def logits(positions: int = 37, vocab: int = 61, *, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(positions, vocab, generator=torch.Generator().manual_seed(seed))


def test_distribution_equals_the_direct_fp64_computation():
    teacher, row = logits(seed=1), logits(seed=2)
    targets = torch.arange(37) % 61
    found = metrics.compare_distribution(metrics.teacher_chunk(teacher), row.clone(), targets)
    log_p, log_q = teacher.double().log_softmax(-1), row.double().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(found.kl, kl, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.nll, -log_q[torch.arange(37), targets], rtol=1e-5, atol=1e-6)
    top = log_p.argmax(-1)
    assert found.agreement.tolist() == (log_q.argmax(-1) == top).double().tolist()
    others = log_q.clone()
    others[torch.arange(37), top] = -torch.inf
    margin = log_q[torch.arange(37), top] - others.amax(-1)
    torch.testing.assert_close(found.margin, margin, rtol=1e-5, atol=1e-5)
    assert 0 < found.agreement.mean() < 1, "the margin of both signs must be exercised"
    assert ((found.margin > 0) == (found.agreement == 1)).all()


def test_equal_logits_give_exact_zero_and_one():
    same = logits(200, 997)
    found = metrics.compare_distribution(metrics.teacher_chunk(same), same.clone(), torch.zeros(200, dtype=torch.long))
    assert found.kl.abs().max() == 0
    assert found.agreement.min() == 1
    assert (found.margin > 0).all()


def test_one_flipped_bit_of_one_logit_shows():
    teacher = logits(4, 50)
    row = teacher.clone()
    row[2, 7] = torch.nextafter(row[2, 7] + 1e-3, torch.tensor(torch.inf))
    found = metrics.compare_distribution(metrics.teacher_chunk(teacher), row, torch.zeros(4, dtype=torch.long))
    assert (found.kl != 0).tolist() == [False, False, True, False]


def test_tokens_of_probability_zero_count_nothing_and_lost_mass_is_infinite():
    teacher, row = logits(3, 11, seed=3), logits(3, 11, seed=4)
    teacher[0, 5] = row[0, 5] = -torch.inf  # impossible under both
    row[1, 6] = -torch.inf  # impossible under the row only
    found = metrics.compare_distribution(metrics.teacher_chunk(teacher), row.clone(), torch.zeros(3, dtype=torch.long))
    keep = [i for i in range(11) if i != 5]
    log_p = teacher[0, keep].double().log_softmax(-1)
    log_q = row[0, keep].double().log_softmax(-1)
    torch.testing.assert_close(found.kl[0], (log_p.exp() * (log_p - log_q)).sum(), rtol=1e-5, atol=1e-6)
    assert found.kl[1] == torch.inf
    assert torch.isfinite(found.kl[2])


def test_nan_logits_are_refused():
    bad = logits()
    bad[3, 3] = torch.nan
    with pytest.raises(UsageError, match="NaN or infinite"):
        metrics.compare_distribution(metrics.teacher_chunk(logits()), bad, torch.zeros(37, dtype=torch.long))


def test_state_errors_equal_the_direct_fp64_computation():
    state, estimate = logits(50, 16, seed=5), logits(50, 16, seed=6)
    found = metrics.compare_states(estimate, state)
    gap = (estimate.double() - state.double()).square().sum(-1)
    torch.testing.assert_close(found.squared_error, gap, rtol=1e-12, atol=0)
    cosine = torch.nn.functional.cosine_similarity(estimate.double(), state.double())
    torch.testing.assert_close(found.cosine, cosine, rtol=1e-12, atol=1e-12)


def test_equal_states_give_exact_zero_and_one():
    state = logits(50, 16, seed=5)
    found = metrics.compare_states(state.clone(), state)
    assert found.squared_error.max() == 0
    assert (found.cosine == 1).all()


def test_states_that_are_not_finite_are_refused_with_a_count():
    bad = logits(5, 4)
    bad[1, 2] = torch.nan
    bad[4, 0] = torch.inf
    with pytest.raises(UsageError, match="2 estimated states"):
        metrics.compare_states(bad, logits(5, 4))


def test_threshold_is_ten_times_the_median():
    assert metrics.sink_threshold(torch.tensor([1.0, 2.0, 900.0])) == 20.0
    with pytest.raises(UsageError, match="no token beyond"):
        metrics.sink_threshold(torch.zeros(0))
    with pytest.raises(UsageError, match="1 states of the backbone"):
        metrics.sink_threshold(torch.tensor([1.0, torch.nan]))


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_around_any_shift_equal_the_direct_variance(offset: float):
    generator = torch.Generator().manual_seed(0)
    state = offset + torch.randn(300, 8, generator=generator)
    documents = torch.randint(0, 5, (300,), generator=generator)
    ordinary = torch.rand(300, generator=generator) > 0.2
    moments = metrics.StateMoments(5, shift=state[:20].mean(0))
    for part in torch.arange(300).split(64):
        moments.add(moments.part(state[part], documents[part], ordinary[part], begun=0))
    exact = state.double()
    mean = exact[ordinary].mean(0)
    wanted = torch.stack([(exact[ordinary & (documents == d)] - mean).square().sum() for d in range(5)])
    torch.testing.assert_close(moments.variance(), wanted, rtol=1e-9, atol=1e-9)
    assert int(moments.count().sum()) == int(ordinary.sum())


def test_chunks_bound_the_logits():
    assert metrics.chunk_positions(100) == 1024
    assert metrics.chunk_positions(49152) * 49152 <= 2**25
    assert metrics.chunk_positions(10**9) == 16
