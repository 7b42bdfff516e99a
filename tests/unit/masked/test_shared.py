"""What the regime shares with the others: the frontier's list of variants, the loop's checks, half precision."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dihal.config import BoundConfig, LoraConfig, OptimConfig, TrainConfig, TrainerConfig, WritingConfig
from dihal.errors import UsageError
from dihal.evaluation.frontier.sources import BackboneSource, Source, WriterSource, writing_cost
from dihal.evaluation.frontier.variants import parse_variants, variants_for
from dihal.evaluation.generation import Prompts
from dihal.evaluation.masked import measure_bound
from dihal.training.plan import estimate_memory, flops_per_token, parameters
from dihal.training.setup import resolve
from tests.unit.masked.kit import config, converted
from tests.unit.test_methods import make_batch


def test_each_regime_takes_the_variants_meant_for_it() -> None:
    texts = ("fused: readout=fused", "few: steps=4", "sure: order=entropy", "cut: top_p=0.9 block=8")
    variants = parse_variants(texts)
    assert [variant.label for variant in variants_for("generate", variants)] == ["fused", "few"]
    assert [variant.label for variant in variants_for("mask", variants)] == ["few", "sure", "cut"]
    (own,) = variants_for("mask", parse_variants(texts[:1]))
    assert (own.label, own.options) == ("", {}), "nothing was meant for it: its own way"


def test_it_writes_through_the_interface_of_every_row() -> None:
    backbone, method = converted()
    prompts = Prompts(prompts=make_batch(5, 6).input_ids, real=make_batch(5, 8, seed=1).input_ids)
    variant = parse_variants(("sure: order=entropy",))[0]
    source = WriterSource(backbone=backbone, writer=method, variant=variant, batch_size=2)
    assert isinstance(source, Source)
    options = {"new_tokens": 8, "steps": 4, "temperature": 1.0}
    made = source.write(prompts, **options, seed=0)
    assert made.tokens.shape == (5, 8)
    assert made.agreement is None
    whole = dataclasses.replace(source, batch_size=5).write(prompts, **options, seed=0)
    assert torch.equal(made.tokens, whole.tokens), "the batch changes nothing"
    cost = writing_cost(source, prompts, **options)
    assert (cost.nfe, cost.encodes, cost.reads) == (4, 0, 0)
    token_by_token = writing_cost(BackboneSource(backbone=backbone, batch_size=2), prompts, **options)
    assert cost.flops_per_token is not None
    assert token_by_token.flops_per_token is not None
    # Four passes over 14 positions against one over each: about four times the work per token.
    assert 2 < cost.flops_per_token / token_by_token.flops_per_token < 6


def test_muon_is_refused() -> None:
    train = TrainConfig(method=config(), optim=OptimConfig(name="muon"), trainer=TrainerConfig(accelerator="cpu"))
    with pytest.raises(UsageError, match=r"optim\.name muon"):
        resolve(train)
    assert resolve(dataclasses.replace(train, optim=OptimConfig())).method.split == 0


@pytest.mark.parametrize("lora", [0, 2])
def test_a_plan_can_be_made(lora: int) -> None:
    given = config(lora=LoraConfig(rank=lora))
    backbone, method = converted(given=given)
    train = TrainConfig(method=given)
    flops = flops_per_token(train, backbone, method)
    assert set(flops) == {"denoiser_forward", "denoiser_backward", "head"}
    memory = estimate_memory(train, backbone, method)
    trainable = parameters(backbone, method)["trainable_parameters"]
    assert memory.weights == 4 * trainable
    assert memory.activations > 0
    assert (trainable > backbone.parameter_count()) == (lora == 0)


@pytest.mark.parametrize("lora", [0, 2])
def test_a_backbone_in_half_precision(lora: int) -> None:
    """Trained weights are fp32, whatever the backbone is held in; products are made in bf16 by autocast."""
    backbone, method = converted(dtype="bfloat16", given=config(lora=LoraConfig(rank=lora)))
    assert {p.dtype for p in method.parameters() if p.requires_grad} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = method.loss(
            backbone, make_batch(4, 16), seed=0, step=0, batch_index=torch.arange(4), global_batch=4, progress=0.1
        )
        out.total.backward()
    assert torch.isfinite(out.total.detach())
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in method.parameters() if p.requires_grad)
    ids, known = make_batch(2, 12).input_ids, (torch.arange(12) < 4).expand(2, -1)
    for precision in ("float32", "bfloat16"):
        options = WritingConfig(steps=2, precision=precision, temperature=1.0)
        assert method.write(backbone, ids, known, writing=options, end=False).nfe == 2


def test_what_has_no_such_bound(tmp_path) -> None:
    for changes, message in (({"draws": 0}, "draws"), ({"confidence": 1.0}, "confidence"), ({}, "no checkpoint")):
        with pytest.raises(UsageError, match=message):
            measure_bound(BoundConfig(out=str(tmp_path / "x.json"), **changes))
