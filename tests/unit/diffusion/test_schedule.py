"""Schedules: end points, monotony, inverse, derivatives."""

from __future__ import annotations

import math

import pytest
import torch

from dihal.config.method import ProcessConfig
from dihal.diffusion import SCHEDULES, Cosine, Linear, LogLinear, Schedule, build_schedule
from dihal.errors import UsageError

NAMES = list(SCHEDULES)
GRID = torch.linspace(0, 1, 101, dtype=torch.float64)
INSIDE = GRID[1:-1]


def make(name):
    return build_schedule(ProcessConfig(schedule=name))


@pytest.mark.parametrize("name", NAMES)
def test_log_snr_is_that_of_the_coefficients_and_falls(name):
    schedule = make(name)
    assert isinstance(schedule, Schedule)
    direct = torch.log(schedule.alpha(INSIDE) ** 2 / schedule.sigma(INSIDE) ** 2)
    assert torch.allclose(schedule.log_snr(INSIDE), direct, atol=1e-12)
    assert (schedule.log_snr(GRID).diff() < 0).all()
    assert (schedule.alpha(GRID).diff() < 0).all()
    assert (schedule.sigma(GRID).diff() > 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_time_inverts_log_snr_end_points_included(name, dtype, tolerance):
    schedule, t = make(name), GRID.to(dtype)
    back = schedule.time(schedule.log_snr(t))
    assert (back - t).abs().max() < tolerance
    assert back.min() >= 0
    assert back.max() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_match_autograd(name):
    schedule = make(name)
    for value, slope in ((schedule.alpha, schedule.alpha_dot), (schedule.sigma, schedule.sigma_dot)):
        t = INSIDE.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(t).sum(), t)
        assert torch.allclose(slope(INSIDE), gradient, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("schedule", [Cosine(), Linear()])
def test_ends_are_exact(schedule, dtype):
    ends = torch.tensor([0.0, 1.0], dtype=dtype)
    assert schedule.alpha(ends).tolist() == [1.0, 0.0]
    assert schedule.sigma(ends).tolist() == [0.0, 1.0]
    assert schedule.log_snr(ends).tolist() == [math.inf, -math.inf]


@pytest.mark.parametrize("schedule", [Cosine(), LogLinear(7.0)])
def test_variance_preserving(schedule):
    assert torch.allclose(schedule.alpha(GRID) ** 2 + schedule.sigma(GRID) ** 2, torch.ones(101, dtype=torch.float64))


def test_log_linear_is_linear_between_its_ends():
    schedule = build_schedule(ProcessConfig(schedule="log_linear", log_snr_max=6.0))
    assert schedule.log_snr(torch.tensor([0.0, 0.25, 1.0])).tolist() == [6.0, 3.0, -6.0]


@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 1, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_shapes_are_kept(name, shape):
    schedule = make(name)
    t = torch.rand(shape)
    for method in ("alpha", "sigma", "log_snr", "alpha_dot", "sigma_dot"):
        assert getattr(schedule, method)(t).shape == shape


def test_unknown_name_suggests_a_near_one():
    bad = ProcessConfig()
    object.__setattr__(bad, "schedule", "cosin")
    with pytest.raises(UsageError, match="Did you mean 'cosine'"):
        build_schedule(bad)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_log_snr_max_must_be_positive_and_finite(value):
    with pytest.raises(UsageError, match="log_snr_max"):
        build_schedule(ProcessConfig(schedule="log_linear", log_snr_max=value))
