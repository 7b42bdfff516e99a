"""What holds for every state space, also in mixed precision."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from dihal.config.method import MethodConfig, ProcessConfig
from dihal.config.spaces import LatentConfig
from dihal.diffusion.process import build_process
from dihal.diffusion.samplers import time_grid
from dihal.spaces.base import Estimate, NoiseKey, Space
from dihal.spaces.build import SPACES
from dihal.spaces.recovery import suffix_loss
from tests.kit import tiny_backbone
from tests.unit.spaces.kit import built, ids_of, key, positions

CONFIGS = {
    "hidden": MethodConfig(split=2, space="hidden"),
    "embedding": MethodConfig(split=0, space="embedding"),
    "latent": MethodConfig(split=2, space="latent", latent=LatentConfig(dim=8, hidden=32)),
    "simplex": MethodConfig(split=2, space="simplex"),
}
BACKBONES = {dtype: tiny_backbone(dtype=dtype) for dtype in ("float32", "bfloat16")}
PROCESS = build_process(ProcessConfig(parametrisation="v"))


def make(name: str, dtype: str = "float32") -> tuple[Space, Any]:
    torch.manual_seed(0)
    backbone = BACKBONES[dtype]
    space = built(CONFIGS[name], backbone)
    for module in space.modules():
        if type(module).__name__ == "OwnReadout":
            torch.nn.init.normal_(module.linear.weight, std=0.3)
    return space, backbone


def test_every_space_is_here() -> None:
    assert set(CONFIGS) == set(SPACES)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "bf16-mixed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_training_step_and_one_walk(name: str, precision: str) -> None:
    space, backbone = make(name, "float32" if precision == "float32" else "bfloat16")
    mixed = torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else contextlib.nullcontext()
    ids = ids_of()
    where = positions(ids)
    weight = (0.1 * torch.randn(space.input_dim, space.output_dim)).requires_grad_()
    with mixed:
        clean = space.encode(backbone, ids)
        t = torch.linspace(0.2, 0.9, 4)
        noised = space.noised(PROCESS, clean, t, key(ids))
        inputs = space.network_input(noised, t)
        assert noised.dtype == inputs.dtype == space.known_input(clean).dtype == torch.float32
        assert inputs.shape == space.known_input(clean).shape == (4, 12, space.input_dim)
        out = (inputs @ weight).float()
        estimate = space.interpret(PROCESS, out, noised, t, where)
        assert (estimate.x0 is not None) == space.predicts_state
        loss = suffix_loss(
            estimate.features.flatten(0, 1),
            ids.flatten(),
            lambda part: space.logits(backbone, part),
            weight_ce=torch.full((48,), 1 / 48),
            weight_kl=torch.zeros(48),
            chunk=10,
        )
        hidden = space.hidden(backbone, estimate, where)
        assert hidden.dtype == backbone.dtype
        assert hidden.shape == (4, 12, 32)
        features = backbone.suffix_features(hidden, space.split)
        (loss.total + features.float().square().mean()).backward()
        feedback = space.feedback(backbone, estimate)
    assert weight.grad is not None
    assert weight.grad.isfinite().all()
    assert weight.grad.abs().sum() > 0
    assert feedback.dtype == torch.float32
    assert not feedback.requires_grad
    assert feedback.shape == inputs.shape

    def denoise(z: torch.Tensor, t: torch.Tensor) -> Estimate:
        return space.interpret(PROCESS, (space.network_input(z, t) @ weight).float(), z, t, where)

    with torch.no_grad():
        last = space.walk(
            PROCESS,
            denoise,
            lambda estimate, t: ids if t < 0.6 else None,
            key(ids),
            (4, 12),
            backbone=backbone,
            times=time_grid(4),
            sampler="ddim",
            weight=0.5,
            temperature=lambda t: 1.0,
        )
    assert last.features.isfinite().all()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_walk_of_a_row_does_not_depend_on_its_batch(name: str) -> None:
    space, backbone = make(name)
    ids = ids_of()
    weight = 0.1 * torch.randn(space.input_dim, space.output_dim)

    def walk(rows: slice) -> Estimate:
        where = positions(ids[rows])

        def denoise(z: torch.Tensor, t: torch.Tensor) -> Estimate:
            return space.interpret(PROCESS, space.network_input(z, t) @ weight, z, t, where)

        held = key(ids)
        return space.walk(
            PROCESS,
            denoise,
            lambda estimate, t: ids[rows],
            NoiseKey(seed=3, purpose="write", ids=held.ids[rows]),
            tuple(ids[rows].shape),
            backbone=backbone,
            times=time_grid(3),
            sampler="ancestral",
            weight=0.3,
            temperature=lambda t: 1.0,
        )

    with torch.no_grad():
        torch.testing.assert_close(walk(slice(1, 3)).features, walk(slice(0, 4)).features[1:3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_does_not_change_clean_states(name: str) -> None:
    space, backbone = make(name)
    ids = ids_of(2, 9)
    padded = torch.cat([torch.full((2, 3), 2), ids], 1)
    mask = torch.ones_like(padded, dtype=torch.bool)
    mask[:, :3] = False
    clean = space.encode(backbone, padded, attention_mask=mask)
    torch.testing.assert_close(clean[:, 3:], space.encode(backbone, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_given_states_are_used_and_blocks_need_not_run(name: str) -> None:
    space, backbone = make(name)
    ids = ids_of()
    state = backbone.prefix(ids, space.split)
    torch.testing.assert_close(space.encode(backbone, ids, state=state), space.encode(backbone, ids))
    assert space.needs_state() == (name in ("hidden", "latent"))


@pytest.mark.parametrize("name", CONFIGS)
def test_no_table_is_in_a_checkpoint(name: str) -> None:
    space, backbone = make(name)
    space.encode(backbone, ids_of())
    sizes = {k: v.numel() for k, v in space.state_dict().items()}
    assert max(sizes.values()) <= 32 * 32, sizes
    assert backbone.vocab_size not in {n for v in space.state_dict().values() for n in v.shape}
