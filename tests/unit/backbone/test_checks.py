"""Bad arguments are refused with the fix."""

from __future__ import annotations

import pytest
import torch

from dihal.backbone import checks
from dihal.errors import UsageError
from tests.kit import tiny_backbone

# The helpers are called directly where the shape annotations of the public methods, which are
# enforced only under pytest, would speak first.


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(5, dtype=torch.long), "expected \\(batch, time\\).*input_ids\\[None\\]"),
        (torch.zeros(1, 2, 3, dtype=torch.long), "expected \\(batch, time\\)"),
        (torch.zeros(2, 0, dtype=torch.long), "both at least 1"),
        (torch.zeros(2, 3), "Use input_ids.long"),
        (torch.full((1, 2), 97), "token id 97 is outside the vocabulary of 97"),
        (torch.full((1, 2), -1), "token id -1 is outside"),
    ],
)
def test_token_ids(ids: torch.Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        checks.require_token_ids(ids, 97)


@pytest.mark.parametrize("state", [torch.zeros(3, 8), torch.zeros(2, 3, 7), torch.zeros(2, 3, 8, dtype=torch.long)])
def test_states(state: torch.Tensor) -> None:
    with pytest.raises(UsageError, match="expected floating point \\(batch, time, 8\\)"):
        checks.require_state(state, 8)


def test_arguments_of_the_backbone() -> None:
    backbone = tiny_backbone(num_blocks=3)
    ids = torch.zeros(2, 4, dtype=torch.long)
    state = backbone.prefix(ids, 1)
    with pytest.raises(UsageError, match="outside the vocabulary"):
        backbone.prefix(ids + 500, 1)
    with pytest.raises(UsageError, match=r"attention_mask of shape \(2, 3\): expected \(2, 4\)"):
        backbone.prefix(ids, 1, attention_mask=torch.ones(2, 3))
    with pytest.raises(UsageError, match="valid splits are 0 to 2"):
        backbone.suffix(state, 3)
    with pytest.raises(UsageError, match=r"dim|time, 32"):
        backbone.suffix(state[..., :31], 1)
    with pytest.raises(UsageError, match="logits_to_keep 5 is out of range"):
        backbone.suffix(state, 1, logits_to_keep=5)
    with pytest.raises(UsageError, match="logits_to_keep -1 is out of range"):
        backbone.suffix(state, 1, logits_to_keep=-1)
    with pytest.raises(UsageError, match="out of range"):
        backbone.new_cache(2, 4)
    with pytest.raises(UsageError, match="out of range"):
        backbone.fingerprint(5)


def test_a_cache_of_other_blocks() -> None:
    backbone = tiny_backbone(num_blocks=3)
    ids = torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(UsageError, match=r"holds blocks 1 to 3 .* new_cache\(0, 1\)"):
        backbone.prefix(ids, 1, cache=backbone.new_cache(1, 3))
    cache = backbone.new_cache(0, 1)
    backbone.prefix(ids, 1, cache=cache)
    with pytest.raises(UsageError, match=r"expected \(2, 5\), one entry per cached and per new token"):
        backbone.prefix(ids[:, :1], 1, cache=cache, attention_mask=torch.ones(2, 1))


def test_learned_positions_end() -> None:
    backbone = tiny_backbone("gpt2", max_position_embeddings=8)
    ids = torch.zeros(1, 9, dtype=torch.long)
    with pytest.raises(UsageError, match="learned positions for 8"):
        backbone.prefix(ids, 1)
    cache = backbone.new_cache(0, 0)
    backbone.prefix(ids[:, :5], 0, cache=cache)
    with pytest.raises(UsageError, match="9 tokens, but"):
        backbone.prefix(ids[:, :4], 0, cache=cache)
    assert tiny_backbone("llama").max_positions is None


def test_default_positions() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert checks.default_positions(mask, 5).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]
    assert checks.default_positions(mask.bool(), 2).tolist() == [[1, 2], [2, 2]]
    assert checks.default_positions(None, 5) is None
