"""The hidden space: statistics with known answers, sinks kept apart, exact inverse."""

from __future__ import annotations

import pytest
import torch

from dihal.errors import UsageError
from dihal.spaces import HiddenSpace


def batches(count: int = 6, batch: int = 8, time: int = 32, dim: int = 16, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.5, 4, dim)
    shift = torch.linspace(-3, 3, dim)
    positions = torch.arange(time).expand(batch, time)
    for _ in range(count):
        state = torch.randn(batch, time, dim, generator=generator) * scale + shift
        state[:, 0] = 1000.0 * torch.ones(dim)  # a sink without variance
        yield state, positions, torch.ones(batch, time, dtype=torch.bool)


def test_statistics_ignore_position_zero_and_norm_outliers() -> None:
    space = HiddenSpace(3, 16)

    def spoiled():
        for state, positions, mask in batches():
            state[0, 5] = 5000.0
            yield state, positions, mask

    space.fit(spoiled())
    rest = torch.cat([state[:, 1:].reshape(-1, 16) for state, _, _ in batches()]).double()
    keep = torch.ones(6, 8, 31, dtype=torch.bool)
    keep[:, 0, 4] = False
    rest = rest[keep.flatten()]
    torch.testing.assert_close(space.mean.double(), rest.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(space.std.double(), rest.std(0, unbiased=False), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(space.mean_first, torch.full((16,), 1000.0))
    torch.testing.assert_close(space.std_first, space.std)  # the floor, where the sink does not vary


def test_statistics_do_not_depend_on_batching() -> None:
    one, other = HiddenSpace(3, 16), HiddenSpace(3, 16)
    one.fit(batches())
    parts = [tuple(torch.cat(tensors) for tensors in zip(*list(batches())))]
    other.fit(parts)
    for name, buffer in one.named_buffers():
        torch.testing.assert_close(buffer, dict(other.named_buffers())[name], rtol=1e-5, atol=1e-6)


def test_normalise_and_denormalise_are_inverse() -> None:
    space = HiddenSpace(3, 16)
    space.fit(batches())
    state, positions, _ = next(batches(seed=1))
    z = space.normalise(state, positions)
    assert z[:, 0].abs().max() < 1e-4
    assert z[:, 1:].std() == pytest.approx(1.0, abs=0.05)
    torch.testing.assert_close(space.denormalise(z, positions), state, rtol=1e-5, atol=1e-4)


def test_padding_is_not_counted() -> None:
    clean, padded = HiddenSpace(3, 16), HiddenSpace(3, 16)
    clean.fit(batches())

    def with_padding():
        for state, positions, mask in batches():
            pad = torch.full((state.shape[0], 7, 16), float("nan"))
            yield (
                torch.cat([pad, state], 1),
                torch.cat([torch.zeros(state.shape[0], 7, dtype=torch.int64), positions], 1),
                torch.cat([torch.zeros(state.shape[0], 7, dtype=torch.bool), mask], 1),
            )

    padded.fit(with_padding())
    torch.testing.assert_close(clean.mean, padded.mean)
    torch.testing.assert_close(clean.std_first, padded.std_first)


def test_outliers_weigh_by_relative_error_and_are_squashed() -> None:
    space = HiddenSpace(0, 4)
    z = torch.tensor([[[1.0, 1, 1, 1], [100, 100, 100, 100]]])
    weight = space.outlier_weight(z, 4.0)
    torch.testing.assert_close(weight, torch.tensor([[1.0, 16 / 10_000]]))
    torch.testing.assert_close(space.squash(z, 4.0), torch.tensor([[[1.0, 1, 1, 1], [4, 4, 4, 4]]]))


def test_states_that_are_not_finite_are_refused() -> None:
    space = HiddenSpace(3, 16)
    state, positions, mask = next(batches())
    state[2, 3, 1] = float("nan")
    with pytest.raises(UsageError, match="1 states entering block 3 are NaN"):
        space.fit([(state, positions, mask)])
    with pytest.raises(UsageError, match="too few tokens"):
        space.fit([])
