"""The meter against torch's own counter, on what really ran."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dihal.config import DenoiserConfig, LoraConfig, MethodConfig, ObjectiveConfig, ProcessConfig
from dihal.meter import PARTS, Meter, stack_shape
from dihal.methods import build_method
from tests.kit import FAMILIES, tiny_backbone
from tests.unit.test_methods import make_batch

# Large enough that what nobody counts (rotary angles) is small against what everybody counts.
SHAPE = {"num_blocks": 4, "hidden_size": 64, "vocab": 97}
DENOISER = DenoiserConfig(width=64, depth=2, heads=4)


def counted(run) -> tuple[float, object]:
    """FLOPs that torch counts. Its counter does not know the fused attention of the CPU: the plain one is forced."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        outcome = run()
    return float(counter.get_total_flops()), outcome


def config(**changes) -> MethodConfig:
    return dataclasses.replace(MethodConfig(split=2, denoiser=DENOISER), **changes)


def denoiser(**changes) -> DenoiserConfig:
    return dataclasses.replace(DENOISER, **changes)


METHODS = {
    "state": config(),
    "split 0": config(split=0),
    "state, rms": config(denoiser=denoiser(norm="rms")),
    "state, flow": config(process=ProcessConfig(schedule="linear", parametrisation="flow")),
    "kl": config(objective=ObjectiveConfig(state=0.0, kl=1.0)),
    "cross-entropy": config(objective=ObjectiveConfig(cross_entropy=1.0)),
    "all": config(objective=ObjectiveConfig(cross_entropy=0.1, kl=1.0)),
    "all, chunks": config(objective=ObjectiveConfig(cross_entropy=0.1, kl=1.0, logit_chunk=7)),
    "kl on every second": config(objective=ObjectiveConfig(kl=1.0, suffix_every=2)),
    "kl later": config(objective=ObjectiveConfig(kl=1.0, suffix_start=0.9)),
    "self-conditioning": config(denoiser=denoiser(self_conditioning=0.5), objective=ObjectiveConfig(kl=1.0)),
    "condition dropout": config(objective=ObjectiveConfig(condition_dropout=0.2)),
    "fisher": config(objective=ObjectiveConfig(metric="fisher")),
    "fisher, kl only": config(objective=ObjectiveConfig(metric="fisher", state=0.0, kl=1.0)),
    "lora": config(lora=LoraConfig(rank=4), objective=ObjectiveConfig(kl=1.0)),
    "regression": config(name="regression"),
    "regression, kl": config(name="regression", objective=ObjectiveConfig(kl=1.0)),
}


def prepared(given: MethodConfig, family: str = "llama"):
    backbone = tiny_backbone(family, **SHAPE)
    method = build_method(given, backbone)
    method.fit_normalisation(backbone, [make_batch(4, 32, seed=9)])
    method.attach(backbone)
    return backbone, method


def step(backbone, method, *, train: bool = True, progress: float = 0.5):
    def run():
        out = method.loss(
            backbone,
            make_batch(4, 48),
            seed=0,
            step=0,
            batch_index=torch.arange(4),
            global_batch=4,
            progress=progress,
        )
        if train:
            out.total.backward()
        return out

    return run


@pytest.mark.parametrize("name", METHODS)
def test_a_training_step_costs_what_torch_counts(name: str) -> None:
    backbone, method = prepared(METHODS[name])
    found, out = counted(step(backbone, method))
    assert set(out.flops) <= set(PARTS)
    assert min(out.flops.values()) >= 0
    assert sum(out.flops.values()) == pytest.approx(found, rel=0.005)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_backbones(family: str) -> None:
    backbone, method = prepared(config(objective=ObjectiveConfig(kl=1.0)), family)
    found, out = counted(step(backbone, method))
    assert sum(out.flops.values()) == pytest.approx(found, rel=0.02)


def test_a_pass_without_gradient_has_no_backward() -> None:
    backbone, method = prepared(METHODS["all"])
    with torch.no_grad():
        found, out = counted(step(backbone, method, train=False))
    assert not {"denoiser_backward", "suffix_backward"} & set(out.flops)
    assert sum(out.flops.values()) == pytest.approx(found, rel=0.005)


def test_the_suffix_is_not_counted_before_it_starts() -> None:
    backbone, method = prepared(METHODS["kl later"])
    early, late = (step(backbone, method, progress=p)().flops for p in (0.5, 0.95))
    assert not {"suffix_forward", "suffix_backward", "teacher_suffix", "head"} & set(early)
    assert {"suffix_forward", "suffix_backward", "teacher_suffix", "head"} <= set(late)
    assert early == {part: late[part] for part in early}


def test_parts_of_a_step_by_torch() -> None:
    """Part by part: an error in one must not be hidden by another."""
    backbone, method = prepared(METHODS["all"])
    batch = make_batch(4, 48)
    flops = step(backbone, method)().flops
    with torch.no_grad():
        prefix, state = counted(lambda: backbone.prefix(batch.input_ids, 2))
        suffix, features = counted(lambda: backbone.suffix_features(state, 2))
        head, _ = counted(lambda: backbone.head(features))
        z = torch.randn(4, 48, 64)
        forward, _ = counted(lambda: method.denoiser(z, torch.rand(4), z))
    leaf = state.clone().requires_grad_(True)
    both, _ = counted(lambda: backbone.suffix_features(leaf, 2).sum().backward())
    assert flops["teacher_prefix"] == pytest.approx(prefix, rel=0.005)
    assert flops["teacher_suffix"] == flops["suffix_forward"] == pytest.approx(suffix, rel=0.005)
    assert flops["suffix_backward"] == pytest.approx(both - suffix, rel=0.005)
    assert flops["head"] == pytest.approx(3 * head, rel=1e-6)
    assert flops["denoiser_forward"] == pytest.approx(forward, rel=1e-6)
    both, _ = counted(lambda: method.denoiser(z, torch.rand(4), z).sum().backward())
    assert flops["denoiser_backward"] == pytest.approx(both - forward, rel=1e-6)


@pytest.mark.parametrize("times", ["sequence", "position"])
def test_times_per_position_are_counted(times: str) -> None:
    backbone, method = prepared(METHODS["state"])
    z = torch.randn(2, 12, 64)
    t = torch.rand(2) if times == "sequence" else torch.rand(2, 12)
    found, _ = counted(lambda: method.denoiser(z, t, z).sum().backward())
    meter = Meter(backbone)
    meter.denoiser(method.denoiser, batch=2, new=12, times=t.numel(), backward=True)
    assert meter.total == pytest.approx(found, rel=1e-6)


def test_cached_keys_are_counted() -> None:
    backbone = tiny_backbone(**SHAPE)
    ids = make_batch(2, 24).input_ids
    cache = backbone.new_cache(0, 2)
    backbone.prefix(ids[:, :16], 2, cache=cache)
    found, _ = counted(lambda: backbone.prefix(ids[:, 16:], 2, cache=cache))
    meter = Meter(backbone)
    meter.prefix(2, batch=2, new=8, keys=24)
    assert meter.total == pytest.approx(found, rel=0.01)


def test_adapters_do_not_change_the_backbone_s_own_cost() -> None:
    plain = stack_shape(tiny_backbone(**SHAPE))
    backbone, method = prepared(METHODS["lora"])
    assert method.adapters is not None
    assert stack_shape(backbone) == plain
    bare, adapted = Meter(backbone), Meter(backbone)
    bare.suffix(2, batch=1, new=8)
    adapted.suffix(2, batch=1, new=8, adapters=tuple(method.lora))
    assert adapted.total > bare.total


def test_an_unknown_part_is_an_error() -> None:
    with pytest.raises(AssertionError, match="no part of the ledger"):
        Meter(tiny_backbone()).add("coffee", 1.0)
