"""The cache of a range of blocks: counting, truncating, reordering."""

from __future__ import annotations

import pytest
import torch

from dihal.errors import UsageError
from tests.kit import FAMILIES, tiny_backbone


def make_ids(batch: int = 3, time: int = 10) -> torch.Tensor:
    return torch.randint(4, 97, (batch, time), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_an_upper_cache_counts(family: str) -> None:
    # The library asks block 0, which an upper cache never fills.
    backbone = tiny_backbone(family)
    cache = backbone.new_cache(2, 4)
    assert cache.length == cache.get_seq_length() == 0
    backbone.suffix(backbone.prefix(make_ids(), 2), 2, cache=cache)
    assert cache.length == cache.get_seq_length() == cache.get_seq_length(3) == 10
    assert all(not layer.is_initialized for layer in cache.layers[:2])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("split", [0, 2])
def test_truncate_is_as_if_never_seen(family: str, split: int) -> None:
    backbone, ids = tiny_backbone(family), make_ids()
    fresh = [backbone.new_cache(0, split), backbone.new_cache(split, 4)]
    cut = [backbone.new_cache(0, split), backbone.new_cache(split, 4)]

    def run(new: torch.Tensor, caches: list) -> torch.Tensor:
        return backbone.suffix(backbone.prefix(new, split, cache=caches[0]), split, cache=caches[1])

    run(ids[:, :6], fresh)
    run(ids[:, :6], cut)
    run(ids[:, 3:9], cut)
    for cache in cut:
        cache.truncate(6)
        assert cache.length == 6
    assert torch.equal(run(ids[:, 6:], cut), run(ids[:, 6:], fresh))
    with pytest.raises(UsageError, match="cannot truncate a cache of 10 tokens to 11"):
        cut[1].truncate(11)


@torch.no_grad()
def test_a_window_that_dropped_keys_is_not_truncated() -> None:
    backbone, ids = tiny_backbone("mistral"), make_ids()
    state = backbone.prefix(ids, 2)
    cache = backbone.new_cache(2, 4)
    backbone.suffix(state[:, :4], 2, cache=cache)
    cache.truncate(2)  # the window of 5 is not full yet
    resumed = backbone.suffix(state[:, 2:], 2, cache=cache)
    torch.testing.assert_close(resumed, backbone.suffix(state, 2)[:, 2:], atol=1e-4, rtol=0)
    with pytest.raises(UsageError, match="sliding window of 5"):
        cache.truncate(3)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_reorder_rows(family: str) -> None:
    backbone, ids = tiny_backbone(family), make_ids()
    rows = torch.tensor([2, 0])
    caches = [backbone.new_cache(0, 2), backbone.new_cache(2, 4)]
    plain = [backbone.new_cache(0, 2), backbone.new_cache(2, 4)]

    def run(new: torch.Tensor, pair: list) -> torch.Tensor:
        return backbone.suffix(backbone.prefix(new, 2, cache=pair[0]), 2, cache=pair[1])

    run(ids[:, :7], caches)
    for cache in caches:
        cache.reorder(rows)
    run(ids[rows, :7], plain)
    torch.testing.assert_close(run(ids[rows, 7:], caches), run(ids[rows, 7:], plain), atol=1e-5, rtol=0)
