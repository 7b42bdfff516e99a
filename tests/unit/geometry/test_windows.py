"""Which tokens are scored, and that chunk size decides nothing."""

from __future__ import annotations

import pytest
import torch

from dihal.config import ScoreConfig
from dihal.errors import UsageError
from dihal.geometry.windows import PILOT_TOKENS, draw_documents, plan_chunks, sample_pool
from tests.kit import tiny_backbone


def documents(count: int = 60, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 120, (count,), generator=generator).tolist()
    return [torch.randint(3, 97, (n,), generator=generator).tolist() for n in lengths]


def config(**changes) -> ScoreConfig:
    return ScoreConfig(**{"tokens": 2500, "sequence_length": 32, "pool": 500, **changes})


def test_windows_hold_one_document_and_begin_with_the_start_token() -> None:
    backbone = tiny_backbone()
    given = documents()
    draw = draw_documents(backbone, given, config(tokens=10**6))
    assert draw.documents == len(given)
    assert draw.tokens == sum(len(window) for window in draw.windows)
    whole: dict[int, list[int]] = {}
    for window, document in zip(draw.windows, draw.document.tolist()):
        assert int(window[0]) == backbone.start_token_id
        assert len(window) <= 32
        whole.setdefault(document, []).extend(window[1:].tolist())
    assert sorted(whole.values()) == sorted(given)


def test_tokens_are_reached_exactly_and_the_last_document_cut() -> None:
    draw = draw_documents(tiny_backbone(), documents(), config(tokens=777))
    assert draw.tokens in (776, 777)  # one token left is no window
    assert draw.documents < 60


def test_the_order_given_does_not_matter_and_the_seed_does() -> None:
    backbone, given = tiny_backbone(), documents()
    one = draw_documents(backbone, given, config())
    other = draw_documents(backbone, given[::-1], config())
    assert one.scored_fingerprint == other.scored_fingerprint
    assert one.fingerprint == other.fingerprint
    assert draw_documents(backbone, given, config(seed=1)).scored_fingerprint != one.scored_fingerprint
    changed = draw_documents(backbone, [*given[:-1], [5]], config())
    assert changed.fingerprint != one.fingerprint


@pytest.mark.parametrize("batch_tokens", [1, 64, 300, 10**6])
def test_chunks_cover_every_token_once(batch_tokens: int) -> None:
    draw = draw_documents(tiny_backbone(), documents(200), config(tokens=6000))
    plan = plan_chunks(draw, batch_tokens)
    assert torch.equal(torch.cat([chunk.index for chunk in plan]).sort().values, torch.arange(draw.tokens))
    flat = torch.cat(draw.windows).long()
    for chunk in plan:
        assert torch.equal(chunk.input_ids[chunk.real], flat[chunk.index])
        assert chunk.input_ids.numel() <= max(batch_tokens, 32)
        assert int(chunk.first.sum()) == len(chunk.input_ids)
    pilot = torch.cat([chunk.index for chunk in plan if chunk.pilot])
    assert torch.equal(pilot.sort().values, torch.arange(len(pilot)))
    assert PILOT_TOKENS <= len(pilot) < PILOT_TOKENS + 32
    assert [chunk.pilot for chunk in plan] == sorted((chunk.pilot for chunk in plan), reverse=True)


def test_pool_is_uniform_sorted_and_without_first_positions() -> None:
    draw = draw_documents(tiny_backbone(), documents(200), config(tokens=6000))
    pool, preference = sample_pool(draw, config())
    assert len(pool) == 500
    assert torch.equal(pool, pool.unique())
    assert not torch.isin(pool, draw.offsets).any()
    assert torch.equal(preference.sort().values, torch.arange(500))
    # halves of the text are equally likely: 250 +- 5 sd of 11
    assert 195 < int((pool < draw.tokens // 2).sum()) < 305
    assert 195 < int((pool[preference[:250]] < draw.tokens // 2).sum()) * 2 < 305
    everything, _ = sample_pool(draw, config(pool=10**6, drop_first=False))
    assert torch.equal(everything, torch.arange(draw.tokens))


def test_text_is_tokenised_without_special_tokens() -> None:
    backbone = tiny_backbone()
    text = "a small text about states"
    draw = draw_documents(backbone, [text, "another one of them"], config())
    ids = backbone.tokenizer(text, add_special_tokens=False).input_ids
    assert any(window[1:].tolist() == ids[:31] for window in draw.windows)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no text to score"),
        (["", "  \n", []], "no text to score"),
        ("one text", "Put it in a list"),
        ([1, 2, 3], "Put it in a list"),
        ([[1, 2, 97]], "outside 0 .. 96"),
        ([[-1, 2]], "outside 0 .. 96"),
        ([torch.zeros(2, 2, dtype=torch.int64)], "not a flat sequence"),
        ([[0.5, 0.25]], "not a flat sequence"),
        ([{"text": "x"}], "neither a string nor a sequence"),
        ([5, 6.0], "Put it in a list"),
    ],
)
def test_what_is_no_text_is_refused(given, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        draw_documents(tiny_backbone(), given, config())
