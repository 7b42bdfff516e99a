"""Training times: distribution, terminal share, independence of how the batch is split."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from dihal.config.method import TimeConfig
from dihal.diffusion import sample_times
from dihal.diffusion.timesteps import LAWS
from dihal.errors import UsageError


def draw(config, *, step=0, batch=64, seed=0, rows=slice(None)):
    index = torch.arange(batch)
    return sample_times(
        config, seed=seed, step=step, sample_ids=(step * batch + index)[rows], batch_index=index[rows], batch_size=batch
    )


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("batch", [1, 2, 3, 7, 8, 48, 64])
def test_a_sequences_time_does_not_depend_on_the_split_of_the_batch(law, batch):
    config = TimeConfig(law=law)
    whole = draw(config, step=5, batch=batch)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(config, step=5, batch=batch, rows=order), whole[order])
    for i in range(batch):
        assert torch.equal(draw(config, step=5, batch=batch, rows=slice(i, i + 1)), whole[i : i + 1])


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
def test_terminal_fraction(law, fraction):
    t = torch.cat([draw(TimeConfig(law=law, terminal_fraction=fraction), step=s) for s in range(100)])
    assert t.min() > 0
    assert t.max() <= 1
    share = (t == 1).double().mean().item()
    assert abs(share - fraction) < (0.01 if law == "low_discrepancy" else 4 * 0.5 / 80)
    if fraction in (0.0, 1.0):
        assert share == fraction


@pytest.mark.parametrize("fraction", [0.0, 0.25])
@pytest.mark.parametrize("law", ["uniform", "low_discrepancy"])
def test_the_other_times_are_uniform(law, fraction):
    t = torch.cat([draw(TimeConfig(law=law, terminal_fraction=fraction), step=s) for s in range(200)])
    assert stats.kstest(t[t < 1].double().numpy(), "uniform").pvalue > 1e-3


def test_logit_normal():
    t = draw(TimeConfig(law="logit_normal", mean=0.5, std=0.7, terminal_fraction=0.0), batch=8192)
    assert stats.kstest(torch.logit(t.double()).numpy(), stats.norm(0.5, 0.7).cdf).pvalue > 1e-3


@pytest.mark.parametrize("batch", [8, 30, 64])
@pytest.mark.parametrize("fraction", [0.0, 0.25])
def test_low_discrepancy_is_an_even_grid_in_every_step(batch, fraction):
    config = TimeConfig(law="low_discrepancy", terminal_fraction=fraction)
    for step in range(20):
        t = draw(config, step=step, batch=batch).double()
        terminal = int((t == 1).sum())
        assert terminal in (math.floor(fraction * batch), math.ceil(fraction * batch))
        rest = t[t < 1].sort().values
        spacing = 1 / (batch * (1 - fraction))
        assert (rest.diff() - spacing).abs().max() < 1e-6
        assert rest[0] < spacing
        assert rest[-1] > 1 - spacing - 1e-6


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_each_devices_share_of_the_grid_is_spread_too(parts):
    config = TimeConfig(law="low_discrepancy", terminal_fraction=0.0)
    for share in draw(config, batch=64).view(parts, -1):
        ends = torch.tensor([0.0, 1.0])
        assert torch.cat([ends, share]).sort().values.diff().max() < 2.5 * parts / 64


def test_grid_moves_with_step_and_seed():
    config = TimeConfig()
    draws = [draw(config, step=s, seed=k) for s in (0, 1) for k in (0, 1)]
    assert torch.stack(draws).unique(dim=0).shape[0] == 4


def test_errors():
    bad_law = TimeConfig()
    object.__setattr__(bad_law, "law", "unifrom")
    with pytest.raises(UsageError, match="Did you mean 'uniform'"):
        draw(bad_law)
    for fraction in (-0.1, 1.5, math.nan):
        with pytest.raises(UsageError, match="terminal_fraction"):
            draw(TimeConfig(terminal_fraction=fraction))
    with pytest.raises(UsageError, match="std"):
        draw(TimeConfig(law="logit_normal", std=0.0))
    with pytest.raises(UsageError, match="batch_size"):
        draw(TimeConfig(), batch=0)
