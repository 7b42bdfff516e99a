"""Samplers against Gaussian data, whose denoiser and probability flow are exact."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from dihal.config.method import ProcessConfig
from dihal.diffusion import (
    SAMPLERS,
    SCHEDULES,
    GaussianData,
    Process,
    build_schedule,
    evaluations_per_estimate,
    guided,
    level_grid,
    nfe,
    sample,
    time_grid,
)
from dihal.errors import UsageError

ORDERS = {"euler": 1, "heun": 2, "ddim": 1, "dpmpp_2m": 2}
STEPS = (32, 64, 128, 256)


def gaussian(name):
    basis, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    mean = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    variances = torch.tensor([0.5, 2.0, 0.25], dtype=torch.float64)
    return GaussianData(build_schedule(ProcessConfig(schedule=name)), mean, variances, basis)


def start(batch=16, time=2, dtype=torch.float64):
    return torch.randn(batch, time, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def at(t, batch=16):
    return torch.full((batch,), t, dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_exact_flow_solves_the_ode(schedule):
    data, z, t, h = gaussian(schedule), start(), at(0.6), 1e-5
    slope = (data.flow(z, t, t + h) - data.flow(z, t, t - h)) / (2 * h)
    one = torch.tensor(0.6, dtype=torch.float64)
    alpha, sigma = data.schedule.alpha(one), data.schedule.sigma(one)
    x0 = data.denoise(z, t)
    velocity = data.schedule.alpha_dot(one) * x0 + data.schedule.sigma_dot(one) * (z - alpha * x0) / sigma
    assert torch.allclose(slope, velocity, atol=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ORDERS)
def test_convergence_order(name, schedule):
    data, z = gaussian(schedule), start()
    exact = data.flow(z, at(0.9), at(0.1))
    found = [
        sample(name, data.denoise, Process(data.schedule), z, steps=n, t_start=0.9, t_end=0.1) - exact for n in STEPS
    ]
    error = torch.tensor([e.square().mean().sqrt().item() for e in found]).log()
    steps = torch.tensor(STEPS).log()
    steps = steps - steps.mean()
    order = -((error - error.mean()) @ steps / steps.square().sum()).item()
    assert abs(order - ORDERS[name]) < 0.15


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("name", ORDERS)
def test_deterministic_samplers_reach_the_exact_clean_state_from_pure_noise(name, schedule):
    data, z = gaussian(schedule), start()
    exact = data.flow(z, at(1.0), at(0.0))
    coarse, fine = (
        (sample(name, data.denoise, Process(data.schedule), z, steps=n) - exact).abs().max().item() for n in (32, 256)
    )
    # Measured loss of order at the unbounded log-SNR ends: see benchmarks/solver_order.py.
    assert fine < coarse / 8 ** (0.85 if ORDERS[name] == 1 else 1.5)
    assert fine < (0.02 if ORDERS[name] == 1 else 1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_is_one_evaluation_at_noise(name, schedule):
    process, seen = Process(build_schedule(ProcessConfig(schedule=schedule))), []
    answer = torch.randn(4, 4, 4)

    def denoise(z_t, t):
        seen.append((z_t, t))
        return answer

    z = torch.randn(4, 4, 4)
    assert torch.equal(sample(name, denoise, process, z, steps=1), answer)
    ((z_t, t),) = seen
    assert torch.equal(z_t, z)
    assert t.tolist() == [1.0] * 4


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_nfe_is_the_number_of_calls_and_times_fall(name, steps):
    times = []

    def denoise(z_t, t):
        assert t.shape == (z_t.shape[0],)
        times.append(t[0].item())
        return torch.zeros_like(z_t)

    process = Process(build_schedule(ProcessConfig()))
    out = sample(name, denoise, process, torch.randn(3, 2, 5), steps=steps, noise=lambda i: torch.randn(3, 2, 5))
    assert len(times) == nfe(name, steps)
    assert times == sorted(times, reverse=True)
    assert times[0] == 1.0
    assert min(times) > 0
    assert out.isfinite().all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_constant_estimate_is_returned_whatever_the_steps(name, schedule):
    """A deterministic target: the estimate never changes, and no sampler may move away from it."""
    answer = torch.randn(3, 2, 5)
    process = Process(build_schedule(ProcessConfig(schedule=schedule)))
    out = sample(
        name, lambda z, t: answer, process, torch.randn(3, 2, 5), steps=6, noise=lambda i: torch.randn(3, 2, 5)
    )
    assert torch.equal(out, answer)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])
def test_exponential_integrators_are_exact_for_a_constant_estimate(name, schedule):
    process = Process(build_schedule(ProcessConfig(schedule=schedule)))
    z, eps = start(), torch.randn(16, 2, 3, dtype=torch.float64)
    z_start = process.noise(z, at(0.95), eps)
    out = sample(name, lambda z_t, t: z, process, z_start, steps=3, t_start=0.95, t_end=0.2)
    assert torch.allclose(out, process.noise(z, at(0.2), eps), atol=1e-12)


def gaussian_ancestral_moments(schedule, mean, variance, times):
    """Mean and variance of the chain for scalar Gaussian data, by direct recursion on the posterior formulas."""
    value = lambda f, t: f(torch.tensor(t, dtype=torch.float64)).item()  # noqa: E731
    m, v = 0.0, 1.0
    for t, s in pairwise(times):
        a_t, s_t, a_s, s_s = (value(f, u) for u in (t, s) for f in (schedule.alpha, schedule.sigma))
        gain = a_t * variance / (a_t**2 * variance + s_t**2)
        if s == 0:
            return mean + gain * (m - a_t * mean), gain**2 * v
        step = a_t / a_s
        added = s_t**2 - step**2 * s_s**2
        from_z, from_x = step * s_s**2 / s_t**2, a_s * added / s_t**2
        slope = from_z + from_x * gain
        m = slope * m + from_x * (mean - gain * a_t * mean)
        v = slope**2 * v + added * s_s**2 / s_t**2
    raise AssertionError


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("steps", [2, 5, 16])
def test_ancestral_marginals(schedule, steps):
    made = build_schedule(ProcessConfig(schedule=schedule))
    one = torch.ones(1, dtype=torch.float64)
    data = GaussianData(made, 1.5 * one, 0.5 * one, torch.eye(1, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    rows = 20_000
    noise = lambda i=0: torch.randn(rows, 1, 1, generator=generator, dtype=torch.float64)  # noqa: E731
    out = sample("ancestral", data.denoise, Process(made), noise(), steps=steps, noise=noise)
    mean, variance = gaussian_ancestral_moments(made, 1.5, 0.5, time_grid(steps))
    assert abs(out.mean().item() - mean) < 4 * math.sqrt(variance / rows)
    assert abs(out.var().item() / variance - 1) < 4 * math.sqrt(2 / rows)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_ancestral_marginals_tend_to_the_data_at_first_order(schedule):
    made = build_schedule(ProcessConfig(schedule=schedule))
    moments = {n: gaussian_ancestral_moments(made, 1.5, 0.5, time_grid(n)) for n in (100, 400, 1600)}
    bias = {n: abs(variance - 0.5) for n, (_, variance) in moments.items()}
    assert bias[100] < 0.03
    assert bias[100] / bias[400] == pytest.approx(4, rel=0.1)
    assert bias[400] / bias[1600] == pytest.approx(4, rel=0.1)
    assert moments[1600][0] == pytest.approx(1.5, abs=1e-3)


@pytest.mark.parametrize("name", SAMPLERS)
def test_low_precision_noise_is_stepped_in_float32(name):
    seen = set()

    def denoise(z_t, t):
        seen.update((z_t.dtype, t.dtype))
        return torch.zeros_like(z_t)

    process, z = Process(build_schedule(ProcessConfig())), torch.randn(2, 3, 4).bfloat16()
    out = sample(name, denoise, process, z, steps=3, noise=lambda i: z)
    assert out.dtype == torch.float32
    assert seen == {torch.float32}


def test_grid():
    assert time_grid(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert time_grid(2, 0.9, 0.1) == pytest.approx([0.9, 0.5, 0.1])
    assert time_grid(7)[-1] == 0.0


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_levels(name):
    schedule = build_schedule(ProcessConfig(schedule=name))
    center = float(schedule.log_snr(torch.tensor(0.5, dtype=torch.float64)))
    times = level_grid(schedule, 40, center=center, scale=0.1)
    assert times[0] == 1.0
    assert times[-1] == 0.0
    assert len(times) == 41
    assert times == sorted(times, reverse=True)
    levels = schedule.log_snr(torch.tensor(times[1:-1], dtype=torch.float64)).detach()
    share = torch.sigmoid((levels - center) / 0.1)  # of the logistic law below each level
    torch.testing.assert_close(share, torch.arange(1, 40, dtype=torch.float64) / 40, rtol=1e-5, atol=1e-6)
    assert level_grid(schedule, 1, center=center, scale=0.1) == [1.0, 0.0]


def test_levels_that_there_are_not():
    schedule = build_schedule(ProcessConfig(schedule="log_linear", log_snr_max=3.0))
    with pytest.raises(UsageError, match="leave the schedule of this checkpoint"):
        level_grid(schedule, 10, center=-4.0, scale=1.0)
    for steps, scale in ((0, 1.0), (4, 0.0)):
        with pytest.raises(UsageError):
            level_grid(schedule, steps, center=0.0, scale=scale)


def test_guidance():
    one, other = torch.full((2, 3, 4), 1.0), torch.full((2, 3, 4), 3.0)
    calls = []

    def conditional(z, t):
        calls.append("c")
        return other

    def unconditional(z, t):
        calls.append("u")
        return one

    z, t = torch.zeros(2, 3, 4), torch.ones(2)
    for weight, value in ((1.0, 3.0), (0.0, 1.0), (2.5, 6.0), (0.5, 2.0)):
        calls.clear()
        assert torch.equal(guided(conditional, unconditional, weight)(z, t), torch.full((2, 3, 4), value))
        assert len(calls) == evaluations_per_estimate(weight)


def test_errors():
    process, z = Process(build_schedule(ProcessConfig())), torch.zeros(1, 1, 1)
    zero = lambda z_t, t: z_t  # noqa: E731
    with pytest.raises(UsageError, match="Did you mean 'heun'"):
        sample("huen", zero, process, z, steps=1)
    with pytest.raises(UsageError, match="at least 1 step"):
        sample("ddim", zero, process, z, steps=0)
    with pytest.raises(UsageError, match="at least 1 step"):
        nfe("ddim", 0)
    with pytest.raises(UsageError, match="noise="):
        sample("ancestral", zero, process, z, steps=2)
    for ends in ((0.5, 0.5), (1.2, 0.0), (1.0, -0.1), (math.nan, 0.0)):
        with pytest.raises(UsageError, match="t_start"):
            sample("ddim", zero, process, z, steps=2, t_start=ends[0], t_end=ends[1])
