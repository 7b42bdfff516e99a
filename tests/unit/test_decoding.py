"""Decoding with caches of fixed size writes what generate() writes."""

from __future__ import annotations

import pytest
import torch

from dihal.decoding import StaticDecoder
from dihal.errors import UsageError
from tests.kit import tiny_backbone
from tests.unit.test_hybrid import hybrid

IDS = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(0))
OPTIONS = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2", "gpt_neox", "gpt2"])
def test_the_backbone_by_itself(family: str) -> None:
    backbone = tiny_backbone(family)
    expected = backbone.model.generate(IDS, attention_mask=torch.ones_like(IDS), **OPTIONS)[:, 9:]
    decoder = StaticDecoder(backbone, batch=3, length=20)
    decoder.prefill(IDS)
    found = torch.cat([decoder.write(3), decoder.write(4)], dim=1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_the_hybrid(steps: int, sampler: str) -> None:
    model = hybrid()
    expected = model.generate(IDS, attention_mask=torch.ones_like(IDS), steps=steps, sampler=sampler, **OPTIONS)[:, 9:]
    decoder = StaticDecoder(model.backbone, model.bridge, batch=3, length=16, steps=steps, sampler=sampler)
    decoder.prefill(IDS)
    assert torch.equal(decoder.write(7), expected)


def test_a_second_prompt_forgets_the_first() -> None:
    backbone = tiny_backbone()
    decoder, fresh = (StaticDecoder(backbone, batch=3, length=20) for _ in range(2))
    decoder.prefill(IDS)
    decoder.write(8)
    for one in (decoder, fresh):
        one.prefill(IDS[:, :4])
    assert torch.equal(decoder.write(5), fresh.write(5))


def test_refusals() -> None:
    backbone = tiny_backbone()
    with pytest.raises(UsageError, match="CUDA graph needs"):
        StaticDecoder(backbone, batch=1, length=8, graph=True)
    decoder = StaticDecoder(backbone, batch=3, length=12)
    with pytest.raises(UsageError, match="was made for a batch of 3"):
        decoder.prefill(IDS[:1])
    decoder.prefill(IDS)
    with pytest.raises(UsageError, match="12 positions, 16 are needed"):
        decoder.write(7)
    with pytest.raises(UsageError, match="full attention only"):
        StaticDecoder(tiny_backbone("mistral"), batch=1, length=8)
