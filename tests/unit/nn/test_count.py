"""Parameter groups, parameter counts, FLOPs against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dihal.nn import count_parameters, flops_per_token, parameter_groups
from tests.unit.nn.kit import CONDITION, STATE, inputs, tiny


def test_only_matrices_decay_and_every_parameter_is_in_one_group():
    model = nn.ModuleDict({"denoiser": tiny(), "table": nn.Embedding(5, 4), "frozen": nn.Linear(3, 3)})
    model["frozen"].requires_grad_(False)
    decayed, others = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim == 2 for p in decayed["params"])
    assert all(p.ndim == 1 or p is model["table"].weight for p in others["params"])
    grouped = [id(p) for g in (decayed, others) for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert any(p is model["denoiser"].null_condition for p in others["params"])
    assert parameter_groups(model["frozen"], 0.1) == []


def test_count_parameters():
    model = nn.Linear(3, 4)
    model.bias.requires_grad_(False)
    assert count_parameters(model) == 12
    assert count_parameters(model, trainable_only=False) == 16
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    assert count_parameters(tied) == 16


@pytest.mark.parametrize("norm", ["adaptive", "rms"])
@pytest.mark.parametrize("condition_dim", [CONDITION, None])
@pytest.mark.parametrize("self_conditioning", [0.0, 0.5])
def test_flops_equal_what_runs(norm, condition_dim, self_conditioning):
    model = tiny(
        norm=norm, condition_dim=condition_dim, self_conditioning=self_conditioning, mask="bidirectional", depth=3
    )
    z, t, c = inputs(batch=2, time=16)
    # The plain kernel, made of products that the counter knows.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(z, t, None if condition_dim is None else c)
    expected = 2 * 16 * flops_per_token(model.config, STATE, condition_dim, 16)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-12)


def test_flops_with_a_time_per_position_and_an_output_of_its_own():
    model = tiny(mask="bidirectional", output_dim=5)
    z, t, c = inputs(batch=2, time=16)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(z, t[:, None].expand(2, 16), c)
    each = flops_per_token(model.config, STATE, CONDITION, 16, output_dim=5, time_per_position=True)
    assert counter.get_total_flops() == pytest.approx(2 * 16 * each, rel=1e-12)


def test_causal_attention_counts_the_keys_that_are_seen():
    bidirectional, causal = tiny(mask="bidirectional").config, tiny().config
    difference = flops_per_token(bidirectional, 8, 8, 101) - flops_per_token(causal, 8, 8, 101)
    assert difference == pytest.approx(2 * 4 * 50 * 32)  # two blocks, 101 - 51 keys, scores and values, width 32
