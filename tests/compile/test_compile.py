"""What `trainer.compile` does: blocks compiled in place, the same loss, the same weights, no recompilation.

Run by `make test` in a process of its own: run-time shape checks (see tests/conftest.py) break graphs.
"""

from __future__ import annotations

import os

import pytest
import torch

from dihal.backbone import Backbone
from dihal.config import DenoiserConfig, LoraConfig, MethodConfig, ObjectiveConfig, ProcessConfig
from dihal.methods import Method, build_method
from tests.kit import tiny_backbone
from tests.unit.nn.kit import inputs, tiny
from tests.unit.test_methods import make_batch

pytestmark = pytest.mark.skipif(
    os.environ.get("DIHAL_NO_JAXTYPING") != "1", reason="needs DIHAL_NO_JAXTYPING=1 (make test sets it)"
)

BLOCKS = 10  # more than torch's limit of recompilations: a block that needs a graph of its own is noticed
SMALL = DenoiserConfig(width=32, depth=10, heads=4)


def compile_blocks(*blocks: torch.nn.Module) -> None:
    for block in blocks:
        block.compile(backend="aot_eager")


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("norm", ["adaptive", "rms"])
def test_denoiser_blocks_have_no_graph_break(norm: str) -> None:
    plain, compiled = tiny(norm=norm), tiny(norm=norm)
    for block in compiled.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    assert list(compiled.state_dict()) == list(plain.state_dict())
    z, t, c = inputs()
    for mask in (None, torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])):
        expected, found = plain(z, t, c, attention_mask=mask), compiled(z, t, c, attention_mask=mask)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        found.square().mean().backward()


def make(config: MethodConfig) -> tuple[Backbone, Method]:
    backbone = tiny_backbone(num_blocks=BLOCKS)
    torch.manual_seed(0)
    method = build_method(config, backbone)
    method.fit_normalisation(backbone, [make_batch(8, 32, seed=9)])
    method.attach(backbone)
    return backbone, method


def steps(backbone: Backbone, method: Method, first: int, last: int) -> list[float]:
    losses = []
    optimiser = torch.optim.SGD(method.parameters(), lr=1e-3)
    for step in range(first, last):
        batch = make_batch(4, 16, seed=step)
        out = method.loss(backbone, batch, seed=0, step=step, batch_index=torch.arange(4), global_batch=4)
        optimiser.zero_grad()
        out.total.backward()
        optimiser.step()
        losses.append(out.total.item())
    return losses


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objective": ObjectiveConfig(state=1.0, kl=1.0, cross_entropy=0.5)},
        {"objective": ObjectiveConfig(kl=1.0), "lora": LoraConfig(rank=2)},
        {"process": ProcessConfig(parametrisation="v"), "denoiser": DenoiserConfig(width=32, depth=2, heads=4, self_conditioning=0.5)},
    ],
    ids=["state", "suffix", "adapters", "self-conditioning"],
)  # fmt: skip
def test_training_compiled_equals_training_eager(changes: dict) -> None:
    config = MethodConfig(**{"split": 4, "denoiser": SMALL, **changes})
    backbone, method = make(config)
    names = list(method.state_dict()), list(backbone.model.state_dict())
    expected = steps(backbone, method, 0, 4)

    backbone, method = make(config)
    compile_blocks(*method.denoiser.blocks, *backbone.blocks)
    assert (list(method.state_dict()), list(backbone.model.state_dict())) == names
    found = steps(backbone, method, 0, 2)
    after_two = graphs()
    assert after_two > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        found += steps(backbone, method, 2, 4)
    assert graphs() == after_two
    assert found == pytest.approx(expected, rel=1e-5)


def test_blocks_share_their_graphs() -> None:
    """Ten equal blocks: were each compiled by itself, torch's limit would send the rest back to eager."""
    backbone, method = make(MethodConfig(split=4, denoiser=SMALL, objective=ObjectiveConfig(kl=1.0)))
    compile_blocks(*method.denoiser.blocks, *backbone.blocks)
    steps(backbone, method, 0, 2)
    assert graphs() <= 12
