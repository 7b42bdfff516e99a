"""prefix(l) then suffix(l) is the model's own forward, bit for bit, for every family at every split."""

from __future__ import annotations

import pytest
import torch

from dihal.backbone import Backbone
from tests.kit import FAMILIES, tiny_backbone

TIME = 12
# Prompt, single tokens, and a chunk after the sliding windows (5 tokens) are full.
CHUNKS = ((0, 7), (7, 8), (8, 9), (9, 11), (11, 12))


@pytest.fixture(scope="module", params=FAMILIES)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return tiny_backbone(request.param)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def make_ids(vocab: int = 97, batch: int = 3, time: int = TIME) -> torch.Tensor:
    return torch.randint(4, vocab, (batch, time), generator=torch.Generator().manual_seed(1))


def make_mask(side: str, batch: int = 3, time: int = TIME) -> torch.Tensor:
    mask = torch.ones(batch, time, dtype=torch.bool)
    for row, padding in enumerate((0, 3, 7)[:batch]):
        if side == "left":
            mask[row, :padding] = False
        elif padding:
            mask[row, -padding:] = False
    return mask


def own_positions(mask: torch.Tensor) -> torch.Tensor:
    # As transformers' generate() counts them, written independently of dihal.backbone.checks.
    positions = torch.zeros(mask.shape, dtype=torch.long)
    for row in range(mask.shape[0]):
        seen = 0
        for column in range(mask.shape[1]):
            positions[row, column] = max(seen + int(mask[row, column]) - 1, 0)
            seen += int(mask[row, column])
    return positions


def test_every_split_unpadded(backbone: Backbone) -> None:
    ids = make_ids()
    own = backbone.model(ids).logits
    assert own.std() > 0.5  # logits that say something
    assert torch.equal(backbone.forward(ids), own)
    for split in range(backbone.num_blocks):
        assert torch.equal(backbone.suffix(backbone.prefix(ids, split), split), own), split


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_split_padded(backbone: Backbone, side: str) -> None:
    ids, mask = make_ids(), make_mask(side)
    own = backbone.model(ids, attention_mask=mask.long(), position_ids=own_positions(mask)).logits
    for split in range(backbone.num_blocks):
        for given in (mask, mask.long()):
            state = backbone.prefix(ids, split, attention_mask=given)
            logits = backbone.suffix(state, split, attention_mask=given)
            # Equal at real positions is what is asked; padded positions are equal as well, since the same code runs.
            assert torch.equal(logits, own), split
            assert torch.isfinite(logits).all(), split


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_real_positions(backbone: Backbone, side: str) -> None:
    # Kernels sum in another order when a mask is given, hence a tolerance: 1e-4 on logits of standard deviation 1.6.
    ids, mask = make_ids(), make_mask(side)
    logits = backbone.suffix(backbone.prefix(ids, 2, attention_mask=mask), 2, attention_mask=mask)
    for row in range(len(ids)):
        alone = backbone.forward(ids[row : row + 1, mask[row]])[0]
        torch.testing.assert_close(logits[row, mask[row]], alone, atol=1e-4, rtol=0)


def test_every_split_cached(backbone: Backbone) -> None:
    from transformers import DynamicCache

    ids = make_ids()
    for split in range(backbone.num_blocks):
        lower, upper = backbone.new_cache(0, split), backbone.new_cache(split, backbone.num_blocks)
        whole = DynamicCache(config=backbone.config)
        for start, end in CHUNKS:
            own = backbone.model(ids[:, start:end], past_key_values=whole, use_cache=True).logits
            state = backbone.prefix(ids[:, start:end], split, cache=lower)
            assert torch.equal(backbone.suffix(state, split, cache=upper), own), (split, start)
            assert lower.length == upper.length == end


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_split_cached_and_padded(backbone: Backbone, side: str) -> None:
    from transformers import DynamicCache

    ids = make_ids()
    mask = torch.cat([make_mask(side, time=7), torch.ones(3, TIME - 7, dtype=torch.bool)], dim=1)
    mask[2, 0:7] = torch.tensor([False] * 4 + [True] * 3) if side == "left" else torch.tensor([True] * 3 + [False] * 4)
    positions = own_positions(mask)
    for split in range(backbone.num_blocks):
        lower, upper = backbone.new_cache(0, split), backbone.new_cache(split, backbone.num_blocks)
        whole = DynamicCache(config=backbone.config)
        for start, end in CHUNKS:
            new, seen = ids[:, start:end], mask[:, :end]
            own = backbone.model(
                new,
                attention_mask=seen.long(),
                position_ids=positions[:, start:end],
                past_key_values=whole,
                use_cache=True,
            ).logits
            state = backbone.prefix(new, split, attention_mask=seen, cache=lower)
            logits = backbone.suffix(state, split, attention_mask=seen, cache=upper)
            assert torch.equal(logits, own), (split, start)


def test_cached_and_uncached_agree(backbone: Backbone) -> None:
    # Not bit-equal in any family: one query against many keys is another kernel than a square. 1e-4 on logits
    # of standard deviation 1.6; the windows are shorter than the sequence, so a wrong window shows.
    ids = make_ids()
    whole = backbone.forward(ids)
    lower, upper = backbone.new_cache(0, 2), backbone.new_cache(2, backbone.num_blocks)
    steps = [
        backbone.suffix(backbone.prefix(ids[:, i : i + 1], 2, cache=lower), 2, cache=upper) for i in range(ids.shape[1])
    ]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_and_untied_heads(family: str) -> None:
    for tied in (True, False):
        backbone = tiny_backbone(family, tied=tied)
        assert backbone.tied == tied
        ids = make_ids()
        for split in range(backbone.num_blocks):
            assert torch.equal(backbone.suffix(backbone.prefix(ids, split), split), backbone.model(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_attention(family: str) -> None:
    backbone = tiny_backbone(family, attention="eager")
    assert backbone.attention == "eager"
    ids, mask = make_ids(), make_mask("left")
    own = backbone.model(ids, attention_mask=mask, position_ids=own_positions(mask)).logits
    for split in range(backbone.num_blocks):
        logits = backbone.suffix(backbone.prefix(ids, split, attention_mask=mask), split, attention_mask=mask)
        assert torch.equal(logits, own)
        assert torch.isfinite(logits).all()


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"use_sliding_window": False}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        ("gemma3_text", {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}),
        ("gemma3_text", {"final_logit_softcapping": 3.0}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("phi3", {"sliding_window": None}),
        ("phi3", {"partial_rotary_factor": 0.5}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 10000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
        ),
    ],
)
def test_variants_of_a_family(family: str, more: dict) -> None:
    from transformers import DynamicCache

    backbone = tiny_backbone(family, **more)
    ids = make_ids()
    own = backbone.model(ids).logits
    for split in range(backbone.num_blocks):
        assert torch.equal(backbone.suffix(backbone.prefix(ids, split), split), own)
        lower, upper = backbone.new_cache(0, split), backbone.new_cache(split, backbone.num_blocks)
        whole = DynamicCache(config=backbone.config)
        for start, end in CHUNKS:
            new = ids[:, start:end]
            state = backbone.prefix(new, split, cache=lower)
            assert torch.equal(
                backbone.suffix(state, split, cache=upper),
                backbone.model(new, past_key_values=whole, use_cache=True).logits,
            )


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "phi3", "qwen2"])
def test_the_tiny_windows_are_in_force(family: str) -> None:
    # The parity above would be empty of meaning for windows if no window were ever shorter than the sequence.
    windowed = tiny_backbone(family)
    more = {"use_sliding_window": False} if family == "qwen2" else {"sliding_window": 512}
    ids = make_ids()
    assert not torch.equal(windowed.forward(ids), tiny_backbone(family, **more).forward(ids))


def test_bfloat16_is_exact_too() -> None:
    for family in FAMILIES:
        backbone = tiny_backbone(family, dtype="bfloat16")
        ids = make_ids()
        for split in range(backbone.num_blocks):
            assert torch.equal(backbone.suffix(backbone.prefix(ids, split), split), backbone.model(ids).logits)


def test_packed_documents_are_split_alike(backbone: Backbone) -> None:
    # Positions that restart make the library mask across documents; both halves do the same.
    ids = make_ids()
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]])
    own = backbone.model(ids, position_ids=positions, use_cache=False).logits
    for split in range(backbone.num_blocks):
        state = backbone.prefix(ids, split, position_ids=positions)
        assert torch.equal(backbone.suffix(state, split, position_ids=positions), own)


def test_logits_to_keep(backbone: Backbone) -> None:
    ids = make_ids()
    state = backbone.prefix(ids, 1)
    whole = backbone.suffix(state, 1)
    last = backbone.suffix(state, 1, logits_to_keep=2)
    assert last.shape == (3, 2, backbone.vocab_size)
    torch.testing.assert_close(last, whole[:, -2:], atol=1e-5, rtol=0)
    features = backbone.suffix_features(state, 1)
    assert torch.equal(backbone.head(features), whole)
