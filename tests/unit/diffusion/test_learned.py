"""Learned schedules: still schedules after training, and they find the noise levels they are made to find."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dihal.config.method import ProcessConfig
from dihal.diffusion import Process, Schedule, build_process, build_schedule, sample
from dihal.diffusion.learned import LearnedGumbel, Warp
from dihal.diffusion.schedule import Cosine, Linear, Tan
from dihal.errors import UsageError

GRID = torch.linspace(0, 1, 401, dtype=torch.float64)


def spoiled(schedule: nn.Module, seed: int = 0) -> nn.Module:
    """The schedule with parameters far from their first values."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in schedule.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return schedule


MADE = [spoiled(Warp(Cosine())), spoiled(Warp(Linear(), bins=7)), spoiled(LearnedGumbel(1.0, 2.0))]


@pytest.mark.parametrize("schedule", MADE)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_they_stay_schedules(schedule, dtype, tolerance):
    assert isinstance(schedule, Schedule)
    t = GRID.to(dtype)
    assert (schedule.alpha(t).diff() <= 0).all()
    assert (schedule.sigma(t).diff() >= 0).all()
    assert (schedule.time(schedule.log_snr(t)) - t).abs().max() < tolerance
    assert schedule.alpha(t.view(-1, 1)).shape == (401, 1)
    assert schedule.alpha(t).dtype == dtype


@pytest.mark.parametrize("schedule", MADE)
def test_derivatives(schedule):
    t, h = GRID[5:-5:3] + 1e-4, 1e-7  # beside the knots of no bin in particular
    for value, slope in ((schedule.alpha, schedule.alpha_dot), (schedule.sigma, schedule.sigma_dot)):
        numeric = (value(t + h) - value(t - h)) / (2 * h)
        wrong = ~torch.isclose(slope(t), numeric, rtol=1e-4, atol=1e-5)
        assert wrong.sum() <= 1  # a knot may fall between t - h and t + h


@pytest.mark.parametrize("base", [Cosine(), Linear(), Tan(3.0)])
def test_a_warp_has_exact_ends_and_starts_as_its_base(base):
    torch.testing.assert_close(Warp(base).alpha(GRID), base.alpha(GRID), rtol=1e-9, atol=1e-9)
    for dtype in (torch.float32, torch.float64):
        ends = torch.tensor([0.0, 1.0], dtype=dtype)
        assert spoiled(Warp(base)).alpha(ends).tolist() == [1.0, 0.0]
        assert spoiled(Warp(base)).sigma(ends).tolist() == [0.0, 1.0]


def test_no_gradient_passes_between_loss_and_schedule():
    for schedule in (Warp(Cosine()), LearnedGumbel(4.7, 0.8)):
        t = torch.rand(16)
        assert not schedule.alpha(t).requires_grad
        assert not schedule.sigma_dot(t).requires_grad
        loss = torch.rand(16, requires_grad=True)
        schedule.fit_loss(t, loss).backward()
        assert loss.grad is None
        assert all(p.grad is not None for p in schedule.parameters())


def train(schedule, loss_at, *, steps=1500, batch=64, lr=1e-3, noise=0.2):
    """Fit on noisy losses at uniform times; ``loss_at`` maps log-SNR to the true mean."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(schedule.parameters(), lr=lr, weight_decay=0.0)
    for _ in range(steps):
        t = torch.rand(batch, generator=generator)
        loss = loss_at(schedule.log_snr(t)) * (1 + noise * torch.randn(batch, generator=generator))
        optimizer.zero_grad()
        schedule.fit_loss(t, loss).backward()
        optimizer.step()
    return schedule


def bent(schedule, loss_at):
    """Largest distance of the loss along t from a straight line, relative to its range."""
    t = GRID[1:-1]
    loss = loss_at(schedule.log_snr(t))
    line = loss[0] + (loss[-1] - loss[0]) * t
    return ((loss - line).abs().max() / (loss[-1] - loss[0])).item()


def entropy_like(log_snr):
    """The cross-entropy of a token: nothing at low noise, log V at high noise, a steep rise near log-SNR -3."""
    return 10.8 * torch.sigmoid(-(log_snr + 3.0) / 0.7)


def test_the_warp_makes_the_loss_a_line():
    warp = Warp(Cosine())
    before = bent(warp, entropy_like)
    train(warp, entropy_like)
    assert before > 0.5
    assert bent(warp, entropy_like) < 0.06


def test_the_gumbel_schedule_finds_location_and_scale():
    def loss_at(log_snr):
        return 3.0 + 8.0 * torch.exp(-torch.exp(-(-log_snr - 2.0) / 1.5))

    schedule = LearnedGumbel(3.0, 1.0)
    assert bent(schedule, loss_at) > 0.15
    train(schedule, loss_at, steps=2500, noise=0.05)
    assert schedule.loc == pytest.approx(2.0, abs=0.2)
    assert schedule.scale == pytest.approx(1.5, abs=0.2)
    assert bent(schedule, loss_at) < 0.05


def test_a_loss_that_falls_with_noise_moves_the_gumbel_schedule_nowhere():
    schedule = train(LearnedGumbel(4.0, 1.0), lambda log_snr: torch.sigmoid(log_snr), steps=100)
    assert schedule.loc == pytest.approx(4.0, abs=0.05)


@pytest.mark.parametrize("config", [ProcessConfig(warp=True), ProcessConfig(schedule="gumbel", parametrisation="v")])
def test_samplers_take_them(config):
    process = build_process(config)
    assert isinstance(process.schedule, nn.Module)
    spoiled(process.schedule)
    answer = torch.randn(2, 3, 4)
    z = torch.randn(2, 3, 4)
    for name in ("euler", "heun", "ddim", "ancestral", "dpmpp_2m"):
        out = sample(name, lambda z_t, t: answer, process, z, steps=5, noise=lambda i: z)
        assert torch.equal(out, answer)


def test_a_registered_schedule_is_the_one_the_process_uses():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.process = build_process(ProcessConfig(warp=True))
            self.schedule = self.process.schedule

    holder = copy.deepcopy(Holder())
    holder.load_state_dict({k: v + 0.1 * torch.randn_like(v) for k, v in holder.state_dict().items()})
    t = torch.full((1,), 0.37)
    assert torch.equal(holder.process.schedule.alpha(t), holder.schedule.alpha(t))
    assert not torch.allclose(holder.schedule.alpha(t), Cosine().alpha(t))


def test_refusals():
    with pytest.raises(UsageError, match="warp"):
        build_schedule(ProcessConfig(schedule="gumbel", warp=True))
    with pytest.raises(UsageError, match="gumbel_scale"):
        build_schedule(ProcessConfig(schedule="gumbel", gumbel_scale=0.0))
    with pytest.raises(UsageError, match="shift"):
        build_schedule(ProcessConfig(schedule="tan", shift=-1.0))


def test_gumbel_quantiles():
    """Half of the times have -log-SNR below the median loc - scale log log 2."""
    schedule = LearnedGumbel(4.723, 0.852)
    median = 4.723 - 0.852 * torch.log(torch.log(torch.tensor(2.0, dtype=torch.float64)))
    assert -schedule.log_snr(torch.tensor(0.5, dtype=torch.float64)) == pytest.approx(median.item())
    total = schedule.alpha(GRID) ** 2 + schedule.sigma(GRID) ** 2
    torch.testing.assert_close(total, torch.ones_like(total))


def test_tan_is_the_cosine_with_more_noise():
    shift = Tan(5.0).log_snr(GRID[1:-1]) - Cosine().log_snr(GRID[1:-1])
    torch.testing.assert_close(shift, torch.full_like(shift, -2 * torch.log(torch.tensor(5.0)).item()))
    ends = torch.tensor([0.0, 1.0])
    assert Tan(5.0).alpha(ends).tolist() == [1.0, 0.0]
    assert Tan(5.0).sigma(ends).tolist() == [0.0, 1.0]
    torch.testing.assert_close(Tan(1.0).alpha(GRID), Cosine().alpha(GRID))
    assert Process(Tan(5.0)).parametrisation == "x0"


def test_a_schedule_without_a_loss_to_fit_does_not_run_away() -> None:
    from dihal.diffusion.learned import LearnedGumbel

    schedule = LearnedGumbel(4.4, 0.6)
    for raw in ([1e3, 1e3], [-1e3, -1e3], [-1e3, 1e3]):
        schedule.raw.data = torch.tensor(raw)
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        assert bool((schedule.sigma(ends) > 0).all()), raw
        assert bool((schedule.alpha(ends) > 0).all()), raw
