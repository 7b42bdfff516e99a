"""The memory estimate against tensors counted one by one, and the settings named where it does not fit."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from dihal.backbone import random_backbone
from dihal.config import (
    BackboneConfig,
    DataConfig,
    DenoiserConfig,
    MethodConfig,
    ObjectiveConfig,
    TrainConfig,
    TrainerConfig,
)
from dihal.methods import build_method
from dihal.training.memory import (
    _denoiser_bytes,
    _suffix_bytes,
    estimate_memory,
    out_of_memory,
    settings_that_fit,
)
from tests.kit import tiny_config
from tests.unit.test_methods import make_batch

BATCH, LENGTH, D = 4, 64, 64
NET = DenoiserConfig(width=64, depth=2, heads=4)


def config(**changes) -> TrainConfig:
    base = TrainConfig(
        backbone=BackboneConfig(dtype="bfloat16"),
        data=DataConfig(batch_size=BATCH, sequence_length=LENGTH),
        method=MethodConfig(split=1, denoiser=NET),
        trainer=TrainerConfig(precision="bf16-mixed"),
    )
    return replace(base, **changes)


def kept(run, weights) -> int:
    """Bytes of the distinct tensors that a backward pass would read, weights left out."""
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    found = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # The tensor is held as well: a freed address would be taken for another tensor's.
            found[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    assert out.requires_grad
    return sum(size for size, _ in found.values())


def loss_bytes(net: DenoiserConfig, precision: str) -> float:
    dtype = "bfloat16" if precision == "bf16-mixed" else "float32"
    backbone = random_backbone(tiny_config(hidden_size=D), device="cpu", dtype=dtype)
    method = build_method(MethodConfig(split=1, denoiser=net), backbone)
    batch = make_batch(BATCH, LENGTH)
    method.fit_normalisation(backbone, [batch])

    def run() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else nullcontext():
            return method.loss(
                backbone, batch, seed=0, step=0, batch_index=torch.arange(BATCH), global_batch=BATCH
            ).total

    return kept(run, [*method.parameters(), *backbone.model.parameters()])


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize("norm", ["adaptive", "rms"])
def test_a_denoiser_block_keeps_what_is_counted(precision: str, norm: str) -> None:
    nets = [replace(NET, depth=depth, norm=norm) for depth in (1, 4)]
    measured = (loss_bytes(nets[1], precision) - loss_bytes(nets[0], precision)) / 3
    trainer = TrainerConfig(precision=precision)
    few, more = (
        _denoiser_bytes(config(method=MethodConfig(split=1, denoiser=net), trainer=trainer), D) for net in nets
    )
    expected = BATCH * LENGTH * (more - few) / 3
    if precision == "bf16-mixed":  # and the bf16 copies of a block's matrices
        width, hidden = NET.width, 176
        expected += 2 * (4 * width**2 + 3 * width * hidden + (6 * width * width if norm == "adaptive" else 0))
    assert measured == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_frozen_block_keeps_what_is_counted(family: str) -> None:
    backbone = random_backbone(tiny_config(family, hidden_size=D, num_blocks=5), device="cpu", dtype="bfloat16")

    def run(split: int) -> float:
        state = torch.randn(BATCH, LENGTH, D).bfloat16().requires_grad_()
        return kept(lambda: backbone.suffix_features(state, split).float().sum(), backbone.model.parameters())

    measured = (run(1) - run(4)) / 3
    expected = BATCH * LENGTH * (_suffix_bytes(config(), backbone, 1) - _suffix_bytes(config(), backbone, 4)) / 3
    assert measured == pytest.approx(expected, rel=0.03)


def case(**changes):
    backbone = random_backbone(tiny_config(hidden_size=D), device="cpu", blocks=1)
    chosen = config(data=DataConfig(batch_size=16, sequence_length=512), **changes)
    return chosen, backbone, build_method(chosen.method, backbone)


def test_gradients_and_activations_are_not_added_unless_gradients_stay() -> None:
    chosen, backbone, method = case()
    one = estimate_memory(chosen, backbone, method)
    assert one.backbone == backbone.weight_bytes < 4 * backbone.parameter_count()
    always = one.backbone + one.weights + one.optimizer + one.average
    assert one.total == always + max(one.gradients, one.activations)
    for trainer in (TrainerConfig(accumulate=2), TrainerConfig(devices=2)):
        more = estimate_memory(replace(chosen, trainer=replace(trainer, precision="bf16-mixed")), backbone, method)
        assert more.total == always + more.gradients + more.activations


def test_settings_that_fit_are_cheap_first_and_do_fit() -> None:
    chosen, backbone, method = case()
    whole = estimate_memory(chosen, backbone, method).total
    for share in (0.8, 0.5, 0.3):
        fits = settings_that_fit(chosen, backbone, method, share * whole)
        assert len(fits) == 2
        for fit in fits:
            assert fit.memory.total < share * whole
            assert fit.config.data.batch_size * fit.config.trainer.accumulate == 16, "the same optimiser step"
            assert estimate_memory(fit.config, backbone, method) == fit.memory
            assert "--" in str(fit)
    assert [set(fit.settings) for fit in settings_that_fit(chosen, backbone, method, 0.98 * whole)] == [
        {"trainer.compile"},
        {"data.batch_size", "trainer.accumulate"},
    ]
    assert settings_that_fit(chosen, backbone, method, 1000) == []


def test_the_message_names_estimate_peak_and_settings() -> None:
    objective = ObjectiveConfig(cross_entropy=1.0, logit_chunk=1024)
    chosen, backbone, method = case(method=MethodConfig(split=1, denoiser=NET, objective=objective))
    limit = int(0.4 * estimate_memory(chosen, backbone, method).total)
    text = out_of_memory(chosen, backbone, method, peak=limit - 5, limit=limit)
    assert "estimate" in text
    assert "peak when it failed" in text
    assert text.count("(estimate") == 2
    assert "--data.batch_size" in text
    assert "No size of micro-batch fits" in out_of_memory(chosen, backbone, method, peak=1, limit=1000)
