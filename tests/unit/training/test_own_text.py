"""Text that the backbone writes by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dihal.config.parts import DataConfig
from dihal.errors import UsageError
from dihal.training.own_text import own_text, own_text_flops
from tests.kit import tiny_backbone, tiny_tokenizer


@pytest.fixture
def backbone(tmp_path, monkeypatch):
    monkeypatch.setenv("DIHAL_CACHE", str(tmp_path / "cache"))
    return tiny_backbone("llama", tokenizer=tiny_tokenizer())


def test_spans_follow_the_backbones_distribution(backbone) -> None:
    """Second tokens against the probabilities of a plain forward pass; the first ones are uniform."""
    config = DataConfig(own=0.5, own_tokens=40_000, own_length=2)
    spans = torch.from_numpy(own_text(backbone, config).astype(np.int64))
    assert spans.shape == (20_000, 2)
    special = sorted(set(backbone.tokenizer.all_special_ids))
    assert not torch.isin(spans, torch.tensor(special)).any()
    first = torch.bincount(spans[:, 0], minlength=backbone.vocab_size).double()
    ordinary = backbone.vocab_size - len([i for i in special if i < backbone.vocab_size])
    expected = torch.full_like(first, len(spans) / ordinary)
    expected[special] = 0.0
    rest = expected > 0
    assert ((first - expected)[rest].square() / expected[rest]).sum() < ordinary + 5 * (2 * ordinary) ** 0.5
    lead = torch.full((backbone.vocab_size, 1), backbone.start_token_id)
    inputs = torch.cat([lead, torch.arange(backbone.vocab_size)[:, None]], dim=1)
    logits = backbone.forward(inputs)[:, -1].double()
    logits[:, special] = float("-inf")
    probability = logits.softmax(-1)
    # log p of the drawn tokens: its mean is the negative entropy, with the variance of log p
    logs = probability.log().nan_to_num(neginf=0.0)
    mean = (probability * logs).sum(-1)
    variance = (probability * logs.square()).sum(-1) - mean.square()
    drawn = logs[spans[:, 0], spans[:, 1]]
    z = (drawn - mean[spans[:, 0]]).sum() / variance[spans[:, 0]].sum().sqrt()
    assert abs(float(z)) < 4


def test_spans_depend_on_number_and_seed_only(backbone) -> None:
    many = own_text(backbone, DataConfig(own=0.5, own_tokens=600, own_length=6))
    few = own_text(backbone, DataConfig(own=0.5, own_tokens=300, own_length=6))
    other = own_text(backbone, DataConfig(own=0.5, own_tokens=300, own_length=6, seed=1))
    assert (many[: len(few)] == few).all()
    assert (few != other).any()


def test_cache_is_used_and_a_damaged_one_replaced(backbone, tmp_path, caplog) -> None:
    config = DataConfig(own=0.5, own_tokens=300, own_length=6)
    first = own_text(backbone, config)
    (file,) = (tmp_path / "cache" / "own-text").iterdir()
    assert (own_text(backbone, config, write=False) == first).all()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert (own_text(backbone, config) == first).all()
    assert "damaged" in caplog.text


def test_flops_are_those_of_one_pass(backbone) -> None:
    per_token = backbone.flops_per_token(0, backbone.num_blocks, 6.5) + backbone.head_flops_per_token()
    total = own_text_flops(backbone, DataConfig(own=0.5, own_tokens=1200, own_length=12))
    assert total == pytest.approx(1200 * per_token, rel=0.1)


def test_share_out_of_range_is_refused(backbone, tmp_path) -> None:
    from dihal.data.packing import PackedStream
    from dihal.data.tokens import Tokenised

    one = np.arange(10, dtype=np.uint32)
    tokens = Tokenised(tokens=one, ends=np.array([10]), token_bytes=one)
    with pytest.raises(UsageError, match=r"data\.own"):
        PackedStream(tokens, sequence_length=4, start_token_id=None, end_token_id=None, seed=0, own=1.5)
