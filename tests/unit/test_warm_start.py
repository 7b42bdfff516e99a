"""A denoiser that begins as a copy of the backbone's blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dihal.config import DenoiserConfig, MethodConfig, ObjectiveConfig
from dihal.config.spaces import LatentConfig
from dihal.data.batch import Batch
from dihal.errors import UsageError
from dihal.methods import build_method
from dihal.writer import Writer
from dihal.writing.warm_start import first_block
from tests.kit import tiny_backbone

DIM, BLOCKS = 32, 6
SHAPE: dict[str, Any] = {
    "init": "backbone", "width": DIM, "heads": 4, "mlp_ratio": 3.0, "norm": "rms", "qk_norm": False, "depth": 3,
    "mask": "mixed", "self_conditioning": 0.5,
}  # fmt: skip


def config(space: str = "hidden", *, split: int = 2, objective: dict[str, Any] | None = None, **denoiser: Any):
    own = {"own": 1.0, "own_time": "uniform", "state": 1.0 if space in ("hidden", "latent") else 0.0}
    return MethodConfig(
        regime="generate",
        space=space,
        split=0 if space == "embedding" else split,
        denoiser=DenoiserConfig(**{**SHAPE, **denoiser}),
        objective=ObjectiveConfig(**{**own, **(objective or {})}),
        latent=LatentConfig(dim=8, hidden=32, stage=0.5),
    )


def batch(count: int = 24, length: int = 20, *, seed: int = 0, padded: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (count, length), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        mask[0, -3:] = False
    rows = torch.arange(count)
    return Batch(
        input_ids=ids, attention_mask=mask, document_ids=rows[:, None].expand(-1, length), loss_mask=mask,
        sample_ids=rows, full=not padded,
    )  # fmt: skip


def trunk(writer: Writer, backbone: Any, data: Batch) -> torch.Tensor:
    """The residual stream after the denoiser's blocks where every position is known."""
    seen: list[torch.Tensor] = []
    hook = writer.denoiser.final_norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    known = torch.ones_like(data.attention_mask)
    positions = torch.arange(data.input_ids.shape[1]).expand_as(data.input_ids)
    clean = writer.space.encode(backbone, data.input_ids)
    writer.denoiser(
        writer.space.known_input(clean), torch.zeros_like(positions, dtype=torch.float32),
        writer.condition(backbone, data.input_ids, positions), known=known,
    )  # fmt: skip
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("family", "qk_norm"), [("llama", False), ("qwen3", True)])
def test_known_positions_go_through_the_very_blocks(family: str, qk_norm: bool, padded: bool) -> None:
    sizes = {"head_dim": DIM // 4} if family == "qwen3" else {}
    backbone = tiny_backbone(family, num_blocks=BLOCKS, hidden_size=DIM, **sizes)
    writer = build_method(config(qk_norm=qk_norm), backbone).eval()
    writer.fit_normalisation(backbone, [batch(64, padded=padded)])
    data = batch(4, seed=1)
    with torch.no_grad():
        found = trunk(writer, backbone, data)
        wanted = backbone.prefix(data.input_ids, 2 + 3)
    # Some slack for the first position, whose state has a scale of its own.
    rest = slice(1, None)
    error = (found - wanted)[:, rest].norm() / wanted[:, rest].norm()
    assert error < 0.08, error
    fresh = build_method(config(qk_norm=qk_norm, init="random"), backbone).eval()
    fresh.fit_normalisation(backbone, [batch(64)])
    with torch.no_grad():
        assert (trunk(fresh, backbone, data) - wanted)[:, rest].norm() / wanted[:, rest].norm() > 0.5


@pytest.mark.parametrize(("space", "slack"), [("embedding", 0.4), ("simplex", 0.1)])
def test_token_spaces_start_near_the_embeddings(space: str, slack: float) -> None:
    """A unit-length row is not its embedding, and what the condition can add is linear: the slack of `embedding`."""
    backbone = tiny_backbone(num_blocks=BLOCKS, hidden_size=DIM)
    writer = build_method(config(space, split=0), backbone).eval()
    writer.fit_normalisation(backbone, [batch(64)])
    data = batch(4, seed=1)
    with torch.no_grad():
        found, wanted = trunk(writer, backbone, data), backbone.prefix(data.input_ids, 3)
    error = (found - wanted)[:, 1:].norm() / wanted[:, 1:].norm()
    assert error < slack, error


def test_which_blocks_are_copied() -> None:
    backbone = tiny_backbone(num_blocks=BLOCKS, hidden_size=DIM)
    assert [first_block(backbone, split, 3) for split in range(BLOCKS)] == [0, 1, 2, 3, 3, 3]
    writer = build_method(config(split=5), backbone)
    writer.fit_normalisation(backbone, [batch(64)])
    for own, block in zip(writer.denoiser.blocks, backbone.blocks[3:], strict=True):
        assert torch.equal(own.mlp.down.weight, block.mlp.down_proj.weight)
        assert torch.equal(own.attention.qkv.weight[:DIM], block.self_attn.q_proj.weight)


def test_unknown_positions_are_read_by_the_same_map_and_training_goes_on() -> None:
    backbone = tiny_backbone(num_blocks=BLOCKS, hidden_size=DIM)
    writer = build_method(config(), backbone).train()
    data = batch(64)
    writer.fit_normalisation(backbone, [data])
    with torch.no_grad():
        state = backbone.prefix(data.input_ids, 2)
        z = writer.space.known_input(writer.space.encode(backbone, data.input_ids))
        weight, bias = writer.denoiser.input.weight[:, :DIM], writer.denoiser.input.bias
        assert ((z @ weight.T + bias - state)[:, 1:].norm() / state[:, 1:].norm()) < 1e-2
    out = writer.loss(backbone, data, seed=0, step=0, batch_index=torch.arange(64), global_batch=64)
    out.total.backward()
    assert writer.denoiser.head.weight.grad.abs().sum() > 0
    optimizer = torch.optim.Adam(writer.parameters(), lr=3e-3)
    losses = []
    for step in range(60):
        optimizer.zero_grad()
        out = writer.loss(backbone, data, seed=0, step=step, batch_index=torch.arange(64), global_batch=64)
        out.total.backward()
        optimizer.step()
        losses.append(out.total.item())
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def test_a_space_of_two_stages_starts_when_its_second_begins() -> None:
    backbone = tiny_backbone(num_blocks=BLOCKS, hidden_size=DIM)
    writer = build_method(config("latent"), backbone).train()
    before = writer.denoiser.blocks[0].mlp.down.weight.clone()
    data = batch(64)
    writer.fit_normalisation(backbone, [data])
    assert torch.equal(writer.denoiser.blocks[0].mlp.down.weight, before)
    writer.loss(backbone, data, seed=0, step=0, batch_index=torch.arange(64), global_batch=64, progress=0.9)
    assert torch.equal(writer.denoiser.blocks[0].mlp.down.weight, backbone.blocks[2].mlp.down_proj.weight)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"width": 64}, "method.denoiser.width=32"),
        ("llama", {"heads": 2, "qk_norm": True}, "heads=4.*qk_norm=False"),
        ("llama", {"norm": "adaptive"}, "norm=rms"),
        ("llama", {"mlp_ratio": 4.0}, "mlp_ratio=3.0"),
        ("llama", {"depth": 7}, "there are 6 blocks"),
        ("llama", {"rope_theta": 5.0}, "rope_theta=10000.0"),
        ("qwen2", {}, "without biases"),
        ("gpt2", {}, "built otherwise"),
    ],
)
def test_blocks_of_another_shape_are_refused(family: str, changes: dict[str, Any], message: str) -> None:
    backbone = tiny_backbone(family, num_blocks=BLOCKS, hidden_size=DIM)
    with pytest.raises(UsageError, match=message):
        build_method(config(**changes), backbone)


def test_a_replacement_must_not_be_what_it_replaces() -> None:
    backbone = tiny_backbone(num_blocks=BLOCKS, hidden_size=DIM)
    wrong = MethodConfig(split=2, denoiser=DenoiserConfig(**{**SHAPE, "mask": "causal", "self_conditioning": 0.0}))
    with pytest.raises(UsageError, match="no replacement"):
        build_method(wrong, backbone)
