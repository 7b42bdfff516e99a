"""Norms, rotary positions, time embedding, MLP width."""

from __future__ import annotations

import torch

from dihal.nn.layers import RmsNorm, TimeEmbedding, mlp_width, rms_norm, rotary, rotate


def test_rms_norm():
    x = 100 * torch.randn(3, 5, 64)
    assert torch.allclose(rms_norm(x).square().mean(-1), torch.ones(3, 5), atol=1e-4)
    assert torch.equal(RmsNorm(64)(x), rms_norm(x))
    assert rms_norm(x.bfloat16()).dtype == torch.bfloat16
    assert rms_norm(torch.zeros(1, 4)).isfinite().all()


def test_rotation_keeps_norms_and_makes_products_relative():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def product(i, j):
        at = lambda p: rotary(torch.tensor([[p]]), 16, 10_000.0)  # noqa: E731
        return (rotate(q, at(i)) * rotate(k, at(j))).sum()

    assert torch.allclose(product(7, 3), product(104, 100), atol=1e-4)
    assert not torch.allclose(product(7, 3), product(8, 3), atol=1e-2)
    assert torch.allclose(product(3, 3), (q * k).sum(), atol=1e-5)
    turned = rotate(q, rotary(torch.tensor([[9]]), 16, 10_000.0))
    assert torch.allclose(turned.norm(), q.norm())
    # the slowest pair of a large theta hardly moves, the first pair moves by one radian a position
    cos, sin = rotary(torch.tensor([[1]]), 16, 10_000.0)
    assert torch.allclose(cos.flatten()[0], torch.tensor(1.0).cos())
    assert sin.flatten()[-1] < 1e-3


def test_time_embedding_tells_times_apart():
    torch.manual_seed(0)
    embed = TimeEmbedding(32)
    t = torch.linspace(0, 1, 201)
    e = embed(t)
    assert e.shape == (201, 1, 32)
    assert embed(t.view(3, 67)).shape == (3, 67, 32)
    distance = torch.cdist(e[:, 0], e[:, 0]) + torch.eye(201)
    assert distance.min() > 0.01


def test_mlp_width_is_two_thirds_rounded_up():
    assert mlp_width(384, 4.0) == 1024
    assert mlp_width(32, 4.0) == 88
    assert mlp_width(768, 4.0) == 2048
    assert mlp_width(576, 4.0) == 1536
    assert mlp_width(30, 1.0) == 24
