"""Metrics by hand."""

from __future__ import annotations

import math

import pytest
import torch

from dihal.circuits.metrics import (
    METRICS,
    PlainGradientWarning,
    answer_first,
    answer_rank,
    find_metric,
    kl_divergence,
    logit_difference,
    probability_difference,
)
from dihal.circuits.types import PairBatch
from dihal.errors import UsageError


def _batch(answers, foils, weights) -> PairBatch:
    shape = (len(answers), 2)
    return PairBatch(
        clean=torch.zeros(shape, dtype=torch.int64),
        corrupted=torch.ones(shape, dtype=torch.int64),
        positions=torch.zeros(len(answers), len(answers[0]), dtype=torch.int64),
        answers=torch.tensor(answers),
        foils=torch.tensor(foils),
        weights=torch.tensor(weights),
        attention="causal",
        ids=torch.arange(len(answers)),
    )


def test_logit_difference_is_a_difference_of_means_over_targets() -> None:
    batch = _batch([[[0, -1], [1, 2]]], [[[3], [0]]], [[0.25, 0.75]])
    logits = torch.tensor([[[4.0, 0.0, 0.0, 1.0], [2.0, 3.0, 5.0, 0.0]]])
    # First target: 4 - 1; second: (3 + 5) / 2 - 2.
    assert logit_difference(logits, batch).item() == pytest.approx(0.25 * 3 + 0.75 * 2)
    shifted = logit_difference(logits + 7.0, batch)
    assert shifted.item() == pytest.approx(0.25 * 3 + 0.75 * 2)


def test_probability_difference_sums_probabilities() -> None:
    batch = _batch([[[0, 1]]], [[[2, -1]]], [[1.0]])
    logits = torch.log(torch.tensor([[[0.1, 0.4, 0.2, 0.3]]]))
    assert probability_difference(logits, batch).item() == pytest.approx(0.5 - 0.2)


def test_padded_targets_do_not_count() -> None:
    one = _batch([[[0]]], [[[1]]], [[1.0]])
    padded = _batch([[[0], [0]]], [[[1], [1]]], [[1.0, 0.0]])
    logits = torch.tensor([[[3.0, 1.0], [-50.0, 50.0]]])
    for metric in METRICS.values():
        assert metric(logits, padded).item() == pytest.approx(metric(logits[:, :1], one).item())


def test_metrics_differentiate_to_their_definition() -> None:
    batch = _batch([[[0, 1]]], [[[2]]], [[1.0]])
    logits = torch.randn(1, 1, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    logit_difference(logits, batch).sum().backward()
    assert logits.grad is not None
    assert torch.allclose(logits.grad, torch.tensor([[[0.5, 0.5, -1.0, 0.0]]]))


def test_kl_warns_and_has_no_gradient_at_the_clean_run() -> None:
    batch = _batch([[[0]]], [[[1]]], [[1.0]])
    clean = torch.tensor([[[1.0, 2.0, 0.5]]])
    with pytest.warns(PlainGradientWarning, match="zero gradient"):
        metric = kl_divergence(clean)
    at = clean.clone().requires_grad_()
    value = metric(at, batch)
    value.sum().backward()
    assert value.item() == pytest.approx(0.0, abs=1e-7)
    assert at.grad is not None
    assert float(at.grad.abs().max()) < 1e-7
    away = metric(torch.zeros(1, 1, 3), batch).item()
    p = clean.softmax(-1)[0, 0]
    assert away == pytest.approx(-float((p * (p * 3).log()).sum()), rel=1e-5)
    with pytest.raises(UsageError, match="clean run has logits"):
        metric(torch.zeros(2, 1, 3), batch)


def test_rank_counts_tokens_above_the_best_answer() -> None:
    batch = _batch([[[0, 1]], [[2, -1]]], [[[3]], [[3]]], [[1.0], [1.0]])
    logits = torch.tensor([[[0.0, 2.0, 5.0, 1.0]], [[0.0, 2.0, 5.0, 1.0]]])
    assert answer_rank(logits, batch).tolist() == [[1], [0]]
    assert answer_first(logits, batch).tolist() == [False, True]
    assert math.isfinite(float(logit_difference(logits, batch).sum()))


def test_a_target_without_ids_is_refused() -> None:
    for answers, foils in (([[[-1]]], [[[1]]]), ([[[1]]], [[[-1]]])):
        with pytest.raises(UsageError, match="no answer or no foil"):
            _batch(answers, foils, [[1.0]])


def test_metric_names() -> None:
    assert find_metric("logit_difference") is logit_difference
    with pytest.raises(UsageError, match="kl_divergence"):
        find_metric("kl")
    with pytest.raises(UsageError, match="Did you mean 'logit_difference'"):
        find_metric("logit_diff")
