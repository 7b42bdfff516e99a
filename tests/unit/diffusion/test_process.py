"""Parametrisations: exact conversions, also where batch == time == dim."""

from __future__ import annotations

import itertools

import pytest
import torch

from dihal.config.method import ProcessConfig
from dihal.diffusion import PARAMETRISATIONS, SCHEDULES, Process, build_process, build_schedule, expand_time
from dihal.errors import UsageError

PAIRS = list(itertools.product(SCHEDULES, PARAMETRISATIONS))
# fp32: the conversions divide by sigma (and eps by alpha), so rounding grows by up to 1 / 0.1 on [0.1, 0.9].
PRECISION = [(torch.float64, 1e-12), (torch.float32, 2e-5)]
SHAPES = [(5, 5, 5), (2, 3, 4)]


def make(schedule, parametrisation):
    return Process(build_schedule(ProcessConfig(schedule=schedule)), parametrisation)


def draw(shape, dtype, per_position):
    generator = torch.Generator().manual_seed(0)
    z, eps = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    t = 0.1 + 0.8 * torch.rand(shape[: 2 if per_position else 1], generator=generator, dtype=torch.float64)
    return z, eps, t.to(dtype)


@pytest.mark.parametrize("per_position", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
@pytest.mark.parametrize(("schedule", "parametrisation"), PAIRS)
def test_round_trips(schedule, parametrisation, dtype, tolerance, shape, per_position):
    process = make(schedule, parametrisation)
    z, eps, t = draw(shape, dtype, per_position)
    z_t = process.noise(z, t, eps)
    out = process.target(z, eps, t)
    assert (process.to_x0(out, z_t, t) - z).abs().max() < tolerance
    assert (process.to_eps(out, z_t, t) - eps).abs().max() < tolerance
    assert (process.from_x0(z, z_t, t) - out).abs().max() < 10 * tolerance
    assert (process.to_x0(process.from_x0(z, z_t, t), z_t, t) - z).abs().max() < tolerance


@pytest.mark.parametrize("per_position", [False, True])
@pytest.mark.parametrize(("schedule", "parametrisation"), PAIRS)
def test_square_data_is_treated_like_one_element_at_a_time(schedule, parametrisation, per_position):
    process = make(schedule, parametrisation)
    z, eps, t = draw((4, 4, 4), torch.float64, per_position)
    z_t, target = process.noise(z, t, eps), process.target(z, eps, t)
    for i, j in itertools.product(range(4), range(4)):
        one = t[i, j] if per_position else t[i]
        alpha, sigma = process.schedule.alpha(one), process.schedule.sigma(one)
        a, b = PARAMETRISATIONS[parametrisation](process.schedule, one)
        assert torch.allclose(z_t[i, j], alpha * z[i, j] + sigma * eps[i, j], atol=1e-14)
        assert torch.allclose(target[i, j], a * z[i, j] + b * eps[i, j], atol=1e-14)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_flow_is_the_time_derivative_of_the_path(schedule):
    process = make(schedule, "flow")
    z, eps, t = draw((3, 2, 4), torch.float64, False)
    step = 1e-5
    slope = (process.noise(z, t + step, eps) - process.noise(z, t - step, eps)) / (2 * step)
    assert torch.allclose(process.target(z, eps, t), slope, atol=1e-7)


@pytest.mark.parametrize("parametrisation", ["x0", "v", "flow"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("end", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_x0_is_exact_at_both_ends(schedule, parametrisation, end, dtype):
    process = make(schedule, parametrisation)
    z, eps, _ = draw((3, 2, 4), dtype, False)
    t = torch.full((3,), end, dtype=dtype)
    back = process.to_x0(process.target(z, eps, t), process.noise(z, t, eps), t)
    assert (back - z).abs().max() < (1e-5 if dtype == torch.float32 else 1e-12)


def test_results_have_the_wider_dtype():
    process = make("cosine", "v")
    z, eps = torch.randn(2, 3, 4).bfloat16(), torch.randn(2, 3, 4).bfloat16()
    assert process.noise(z, torch.rand(2), eps).dtype == torch.float32


def test_expand_time_goes_by_the_number_of_axes():
    like = torch.zeros(3, 3, 3)
    assert expand_time(torch.rand(3), like).shape == (3, 1, 1)
    assert expand_time(torch.rand(3, 3), like).shape == (3, 3, 1)
    for bad in (torch.rand(2), torch.rand(3, 2), torch.rand(1, 3)):
        with pytest.raises((UsageError, TypeError)):  # jaxtyping refuses first where it is on
            expand_time(bad, like)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("parametrisation", PARAMETRISATIONS)
def test_build_process_refuses_only_eps_that_cannot_start_from_noise(schedule, parametrisation):
    config = ProcessConfig(schedule=schedule, parametrisation=parametrisation)
    if parametrisation == "eps" and schedule not in ("log_linear", "gumbel"):
        with pytest.raises(UsageError, match="log_linear"):
            build_process(config)
    else:
        assert build_process(config).parametrisation == parametrisation


def test_unknown_parametrisation():
    with pytest.raises(UsageError, match="Did you mean 'flow'"):
        Process(build_schedule(ProcessConfig()), "flows")
