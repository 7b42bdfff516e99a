"""The converted model in a folder: plain transformers weights, and back."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from dihal.config import LoraConfig, WritingConfig
from dihal.errors import UsageError
from dihal.masked import load_masked, save_masked
from dihal.masked.attention import full
from tests.unit.masked.kit import VOCAB, config, converted, with_token
from tests.unit.test_methods import make_batch, randomise

CASES = {
    "llama, new token": {"tied": False},
    "llama, tied, new token": {"tied": True},
    "llama, tied, own token": {"tied": True, "given": with_token("<pad>")},
    "llama, own token": {"tied": False, "given": with_token("<pad>")},
    "gpt2, new token": {"family": "gpt2"},
    "gemma3, new token": {"family": "gemma3_text"},
    "adapters": {"tied": False, "given": config(lora=LoraConfig(rank=2))},
    "gpt2, adapters": {"family": "gpt2", "given": config(lora=LoraConfig(rank=2))},
}


@pytest.mark.parametrize("case", CASES)
def test_saved_and_loaded_it_is_the_same_model(case: str, tmp_path) -> None:
    backbone, method = converted(**CASES[case])
    randomise(method, scale=0.1)
    fingerprint = backbone.fingerprint()
    save_masked(method, backbone, tmp_path / "out", weights="raw")
    assert backbone.fingerprint() == fingerprint
    loaded, found = load_masked(tmp_path / "out", device="cpu")
    assert loaded.mask_token_id == method.mask_token_id
    assert found.num_blocks == backbone.num_blocks

    time = 5  # no longer than the windows of tests/kit.py
    ids = make_batch(2, time).input_ids
    ids[:, 2] = method.mask_token_id
    visible = full(torch.ones_like(ids, dtype=torch.bool))
    with torch.no_grad():
        before = method.head(backbone, method.features(backbone, ids, visible))
        after = loaded.head(found, loaded.features(found, ids, visible))
        # What anyone gets who knows transformers only.
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        theirs = plain(input_ids=ids, attention_mask=visible.expand(2, 1, time, time)).logits
    rows = [i for i in range(VOCAB) if i != method.mask_token_id]
    torch.testing.assert_close(after[..., rows], before[..., rows], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(theirs[..., rows], before[..., rows], atol=2e-5, rtol=1e-4)
    assert bool(torch.isneginf(after[..., method.mask_token_id]).all())
    assert plain.config.mask_token_id == method.mask_token_id

    known = torch.arange(time)[None] < torch.tensor([[2], [2]])
    options = WritingConfig(steps=2, temperature=1.0)
    texts = [
        model.write(own, ids.masked_fill(~known, 0), known, writing=options, end=False).tokens
        for model, own in ((method, backbone), (loaded, found))
    ]
    assert torch.equal(*texts)
    about = json.loads((tmp_path / "out" / "masked.json").read_text())
    assert about["backbone_fingerprint"] == fingerprint
    assert about["weights"] == "raw"
    assert about["shift"] == 1


def test_half_precision(tmp_path) -> None:
    backbone, method = converted(tied=True)
    save_masked(method, backbone, tmp_path, dtype="bfloat16")
    loaded, found = load_masked(tmp_path, device="cpu", dtype="bfloat16")
    ids = make_batch(1, 6).input_ids
    left = loaded.head(found, loaded.features(found, ids, None)).float()[..., :VOCAB]
    right = method.head(backbone, method.features(backbone, ids, None))
    assert float((left - right).abs().max()) < 0.1 * float(right.abs().max())
    with pytest.raises(UsageError, match="unknown dtype"):
        save_masked(method, backbone, tmp_path, dtype="int8")


def test_what_is_no_converted_model(tmp_path) -> None:
    with pytest.raises(UsageError, match="save_masked"):
        load_masked(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UsageError, match="load_method"):
        load_masked(tmp_path)
    (tmp_path / "masked.json").write_text('{"format": "dihal.masked/0"}')
    with pytest.raises(UsageError, match="format"):
        load_masked(tmp_path)
