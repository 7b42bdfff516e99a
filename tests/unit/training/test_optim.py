"""The learning rate as a function of the budget; optimiser state by name."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from dihal.config import OptimConfig
from dihal.errors import UsageError
from dihal.training.optim import build_optimizer, check_optim, load_optimizer_state, lr_factor, optimizer_state

CONFIG = OptimConfig(warmup=0.1, final=0.2)


def test_warmup_is_linear_and_starts_above_zero() -> None:
    assert lr_factor(0.05, CONFIG) == pytest.approx(0.5)
    assert lr_factor(0.1, CONFIG) == pytest.approx(1.0)
    assert lr_factor(1e-3, CONFIG) == pytest.approx(1e-2)


@pytest.mark.parametrize(
    ("decay", "middle", "end"), [("cosine", 0.6, 0.2), ("linear", 0.6, 0.2), ("constant", 1.0, 1.0)]
)
def test_decay_ends_with_the_budget(decay: str, middle: float, end: float) -> None:
    config = replace(CONFIG, decay=decay)
    assert lr_factor(0.55, config) == pytest.approx(middle)
    assert lr_factor(1.0, config) == pytest.approx(end)
    assert lr_factor(1.7, config) == pytest.approx(end)
    rates = [lr_factor(0.1 + 0.009 * k, config) for k in range(101)]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(rates))


def test_cosine_has_the_cosine_shape() -> None:
    config = OptimConfig(warmup=0.0, final=0.0)
    for share in (0.1, 0.25, 0.5, 0.9):
        assert lr_factor(share, config) == pytest.approx(0.5 * (1 + math.cos(math.pi * share)))


def test_all_warmup() -> None:
    assert lr_factor(1.0, OptimConfig(warmup=1.0)) == 1.0


@pytest.mark.parametrize(
    "wrong", [{"lr": 0.0}, {"lr": math.nan}, {"warmup": 1.5}, {"ema": 1.0}, {"clip": -1.0}, {"betas": (0.9, 1.0)}]
)
def test_ranges(wrong: dict) -> None:
    with pytest.raises(UsageError, match=f"optim.{next(iter(wrong))}"):
        check_optim(OptimConfig(**wrong))


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def advance(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        module(torch.full((2, 3), 1.0 + step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_decay_is_for_matrices_only() -> None:
    module = network()
    groups = build_optimizer(module, OptimConfig(weight_decay=0.3)).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] == 0.3 for p in group["params"]}
    plain = {id(p) for group in groups if group["weight_decay"] == 0.0 for p in group["params"]}
    assert decayed == {id(p) for p in module.parameters() if p.ndim == 2}
    assert plain == {id(p) for p in module.parameters() if p.ndim < 2}


def test_state_round_trip_continues_exactly() -> None:
    config = OptimConfig(lr=1e-2)
    module = network()
    optimizer = build_optimizer(module, config)
    advance(module, optimizer, 3)
    state = {name: value.clone() for name, value in optimizer_state(module, optimizer).items()}
    assert {name.rpartition("/")[2] for name in state} == {"step", "exp_avg", "exp_avg_sq"}
    assert "0.weight/exp_avg" in state
    other = network(1)
    other.load_state_dict(module.state_dict())
    fresh = build_optimizer(other, config)
    load_optimizer_state(other, fresh, state)
    advance(module, optimizer, 3)
    advance(other, fresh, 3)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters()))


def test_a_state_of_another_network_is_refused() -> None:
    module = network()
    optimizer = build_optimizer(module, OptimConfig())
    advance(module, optimizer, 1)
    state = optimizer_state(module, optimizer)
    renamed = {name.replace("0.", "9."): value for name, value in state.items()}
    with pytest.raises(UsageError, match=r"missing \['0"):
        load_optimizer_state(module, optimizer, renamed)
    reshaped = {**state, "0.weight/exp_avg": torch.zeros(5, 5)}
    with pytest.raises(UsageError, match=r"0\.weight/exp_avg has shape"):
        load_optimizer_state(module, optimizer, reshaped)
