"""The meter against torch's own counter: a training step and writing."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dihal.config import LoraConfig, ObjectiveConfig, WritingConfig
from dihal.meter import PARTS
from tests.unit.masked.kit import config, converted
from tests.unit.test_meter import SHAPE, counted
from tests.unit.test_methods import make_batch

LAYOUTS = {
    "tied": {"tied": True},
    "untied": {"tied": False},
    "gpt2": {"family": "gpt2"},
}
METHODS = {
    "weights": config(),
    "weights, chunks": config(objective=ObjectiveConfig(logit_chunk=7)),
    "adapters": config(lora=LoraConfig(rank=4)),
}


def step(backbone, method, *, train: bool = True, progress: float = 1.0):
    def run():
        with torch.set_grad_enabled(train):
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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", METHODS)
def test_a_training_step_costs_what_torch_counts(name: str, layout: str) -> None:
    backbone, method = converted(**{**SHAPE, **LAYOUTS[layout]}, given=METHODS[name])
    for progress in (0.1, 1.0):
        found, out = counted(step(backbone, method, progress=progress))
        assert set(out.flops) == {"denoiser_forward", "denoiser_backward", "head"} <= set(PARTS)
        assert sum(out.flops.values()) == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("name", METHODS)
def test_validation_has_no_backward_pass(name: str) -> None:
    backbone, method = converted(**SHAPE, given=METHODS[name])
    found, out = counted(step(backbone, method, train=False))
    assert "denoiser_backward" not in out.flops
    assert sum(out.flops.values()) == pytest.approx(found, rel=0.02)


WRITING = {
    "one block": WritingConfig(steps=5),
    "drawn": WritingConfig(steps=5, temperature=1.0, top_p=0.9),
    "blocks": WritingConfig(steps=2, block=8, order="entropy"),
    "more steps than tokens": WritingConfig(steps=99, order="random"),
}


@pytest.mark.parametrize("name", WRITING)
@pytest.mark.parametrize("method", ["weights", "adapters"])
def test_writing_costs_what_torch_counts(method: str, name: str) -> None:
    backbone, built = converted(**SHAPE, given=METHODS[method])
    ids, known = make_batch(2, 40).input_ids, (torch.arange(40) < 12).expand(2, -1)
    found, written = counted(lambda: built.write(backbone, ids, known, writing=WRITING[name], end=False))
    assert sum(written.flops.values()) == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("name", METHODS)
def test_the_plan_is_what_training_spends(name: str) -> None:
    """Over many steps: half of the tokens are masked on average."""
    backbone, method = converted(**SHAPE, given=METHODS[name])
    planned = method.flops_per_token(backbone, batch=64, length=48)
    batch = make_batch(64, 48)
    out = method.loss(backbone, batch, seed=0, step=0, batch_index=torch.arange(64), global_batch=64)
    spent = {part: value / batch.input_ids.numel() for part, value in out.flops.items()}
    assert spent.keys() == planned.keys()
    for part, value in spent.items():
        assert value == pytest.approx(planned[part], rel=0.03), part


def test_passes_count_alike_for_every_reader() -> None:
    """Frozen blocks cost as much backward as forward, trained ones twice as much."""
    parts = {}
    for name in ("weights", "adapters"):
        backbone, method = converted(**SHAPE, given=dataclasses.replace(METHODS[name]))
        parts[name] = step(backbone, method)().flops
    assert parts["adapters"]["denoiser_backward"] < 0.75 * parts["weights"]["denoiser_backward"]
    assert parts["adapters"]["head"] == pytest.approx(0.75 * parts["weights"]["head"])
