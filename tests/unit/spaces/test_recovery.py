"""Chunked suffix losses against the direct computation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dihal.spaces import recovery, suffix_loss


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("use_teacher", [True, False])
def test_value_and_gradient_equal_the_direct_computation(
    chunk: int, use_teacher: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "_PLAIN", rows * 31)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(31, 8, generator=generator, dtype=torch.float64)

    def head(features):
        return 3 * torch.tanh(features @ weight.T / 3)  # soft-capped, as Gemma's

    features = torch.randn(17, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(17, 8, generator=generator, dtype=torch.float64) if use_teacher else None
    targets = torch.randint(0, 31, (17,), generator=generator)
    weight_ce = torch.rand(17, generator=generator)
    weight_kl = torch.rand(17, generator=generator)

    found = suffix_loss(features, targets, head, weight_ce=weight_ce, weight_kl=weight_kl, teacher=teacher, chunk=chunk)
    (2 * found.total).backward()
    gradient = features.grad.clone()

    features.grad = None
    log_q = F.log_softmax(head(features), -1)
    ce = F.cross_entropy(head(features), targets, reduction="none")
    total = (ce * weight_ce).sum()
    if teacher is not None:
        p = F.softmax(head(teacher), -1)
        kl = (p * (p.log() - log_q)).sum(-1)
        total = total + (kl * weight_kl).sum()
        torch.testing.assert_close(found.kl.double(), kl.detach(), rtol=1e-4, atol=1e-5)
    (2 * total).backward()
    torch.testing.assert_close(found.cross_entropy.double(), ce.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.total.double(), total.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, features.grad, rtol=1e-5, atol=1e-6)


def test_kl_of_a_distribution_with_itself_is_zero() -> None:
    features = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(11, 4, generator=torch.Generator().manual_seed(1))
    ones = torch.ones(9)
    found = suffix_loss(
        features,
        torch.zeros(9, dtype=torch.int64),
        lambda x: x @ weight.T,
        weight_ce=0 * ones,
        weight_kl=ones,
        teacher=features,
        chunk=4,
    )
    assert found.kl.abs().max() == 0
