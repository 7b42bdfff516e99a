"""Writing: how many positions a step reveals, which, and with which tokens."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from dihal.config import WritingConfig
from dihal.errors import UsageError
from dihal.masked.reveal import chosen, draw, nucleus, planned
from dihal.writing.checks import check_writing
from dihal.writing.draw import gumbel
from tests.unit.masked.kit import VOCAB, config, converted, with_token
from tests.unit.test_methods import make_batch, randomise

ORDERS = ("confidence", "entropy", "random")


def writing(**changes) -> WritingConfig:
    return dataclasses.replace(WritingConfig(steps=4, temperature=1.0), **changes)


def prompts(batch: int = 3, time: int = 20, lengths: tuple[int, ...] = (4, 6, 9)):
    ids = make_batch(batch, time).input_ids
    known = torch.arange(time)[None] < torch.tensor(lengths)[:, None]
    return ids, known, torch.arange(batch)


def model(**changes):
    backbone, method = converted(**changes)
    randomise(method, scale=0.3)
    return backbone, method


# -- the plan


@pytest.mark.parametrize("steps", [1, 3, 7, 20, 64])
def test_the_plan_reveals_everything_evenly(steps: int) -> None:
    total = torch.tensor([0, 1, 7, 20, 33])
    counts = planned(total, steps)
    assert torch.equal(counts.sum(-1), total)
    assert int((counts.max(-1).values - counts.min(-1).values).max()) <= 1


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("steps", "block"), [(1, None), (4, None), (5, 6), (40, None), (3, 1)])
def test_every_step_reveals_exactly_what_is_planned(order: str, steps: int, block: int | None) -> None:
    backbone, method = model()
    ids, known, keys = prompts()
    out = method.write(
        backbone, ids, known, writing=writing(order=order, steps=steps, block=block), sample_ids=keys, end=False
    )
    assert bool((out.revealed[known] == -1).all())
    assert bool((out.revealed[~known] >= 0).all())
    assert torch.equal(out.tokens[known], ids[known])
    assert bool((out.tokens[~known] < VOCAB).all()), "no mask is left"
    start, calls = 4, 0
    while start < ids.shape[1]:
        size = ids.shape[1] if block is None else block
        part = ~known & (torch.arange(20) >= start) & (torch.arange(20) < start + size)
        for step_counts in planned(part.sum(-1), steps).unbind(-1):
            if not bool(step_counts.any()):
                continue  # a step that reveals nothing is not run
            assert torch.equal(((out.revealed == calls) & part).sum(-1), step_counts)
            calls += 1
        start += size
    assert out.nfe == calls == int(out.revealed.max()) + 1
    assert out.blocks == (1 if block is None else math.ceil(16 / block))


# -- which


def test_the_highest_scores_are_chosen_and_only_masked_ones() -> None:
    score = torch.tensor([[5.0, 1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    hidden = torch.tensor([[False, True, True, True, True], [True, True, False, True, True]])
    found = chosen(score, hidden, torch.tensor([2, 3]))
    assert found.tolist() == [[False, False, True, True, False], [True, True, False, True, False]]


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_is_the_one_asked_for(order: str) -> None:
    """At temperature 0 the first position revealed is the surest one by the model's own distribution."""
    from dihal.masked.attention import full
    from dihal.random import uniform
    from dihal.writing.known import position_keys

    backbone, method = model()
    ids, known, keys = prompts()
    out = method.write(
        backbone, ids, known, writing=writing(order=order, steps=20, temperature=0.0), sample_ids=keys, end=False
    )
    masked = ids.masked_fill(~known, method.mask_token_id)
    states = method.features(backbone, masked, full(torch.ones_like(known)))
    log_p = method.head(backbone, states).double()
    log_p[..., backbone.end_token_id] = -torch.inf
    log_p = log_p.log_softmax(-1).roll(1, 1)  # of token i at place i
    score = {
        "confidence": log_p.max(-1).values,
        "entropy": -torch.special.entr(log_p.exp()).sum(-1),
        "random": uniform(0, position_keys(keys, torch.arange(20).expand(3, 20)), "masked/order", dtype=torch.float64),
    }[order]
    score = score.masked_fill(known, -torch.inf)
    # Rows with fewer masked positions begin later: the row with the most begins at once.
    assert int((out.revealed[0] == 0).nonzero()) == int(score[0].argmax())


# -- tokens


def test_draws_follow_the_distribution_at_their_temperature() -> None:
    logits = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    count = 40_000
    noise = gumbel(0, torch.arange(count), "test", 8)
    for temperature in (0.5, 1.0, 2.0):
        tokens, log_p, entropy = draw(logits.expand(count, 8), noise, temperature=temperature, top_p=1.0)
        expected = (logits / temperature).softmax(-1)
        found = torch.bincount(tokens, minlength=8).double() / count
        assert float((found - expected).abs().max()) < 5 * float((expected * (1 - expected) / count).sqrt().max())
        own = logits.log_softmax(-1)
        assert torch.allclose(log_p, own[tokens]), "confidence is the model's own, whatever the temperature"
        assert torch.allclose(entropy, -(own.exp() * own).sum())
        assert log_p.dtype == torch.float64


def test_the_nucleus_is_the_smallest_set() -> None:
    p = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15]], dtype=torch.float64)
    for top_p, kept in ((0.01, {1}), (0.39, {1}), (0.5, {1, 3}), (0.8, {1, 3, 4}), (1.0, {0, 1, 2, 3, 4})):
        found = nucleus(p.log(), top_p)
        assert set(torch.isfinite(found[0]).nonzero().flatten().tolist()) == kept, top_p
    noise = gumbel(1, torch.arange(2000), "test", 5)
    tokens, _, _ = draw(p.log().expand(2000, 5), noise, temperature=1.0, top_p=0.5)
    assert set(tokens.tolist()) == {1, 3}
    # The nucleus is of the distribution at the temperature asked for.
    tokens, _, _ = draw(p.log().expand(2000, 5), noise, temperature=4.0, top_p=0.5)
    assert set(tokens.tolist()) == {1, 3, 4}


def likely(method, *tokens: int) -> None:
    """Make tokens the most probable ones at about half of all positions."""
    with torch.no_grad():
        method.output.weight[list(tokens)] *= 40.0


@pytest.mark.parametrize("token", [None, "<pad>"])
def test_the_mask_token_and_a_banned_end_are_never_written(token: str | None) -> None:
    backbone, method = model(given=with_token(token))
    likely(method, 1, 2)
    ids, known, keys = prompts(lengths=(1, 1, 1))
    for temperature in (0.0, 1.0):
        options = writing(steps=2, temperature=temperature)
        out = method.write(backbone, ids, known, writing=options, sample_ids=keys, end=False)
        written = out.tokens[~known].tolist()
        assert 1 not in written
        assert (2 in written) == (token is None), "2 is <pad>"
        assert max(written) < VOCAB
        allowed = method.write(backbone, ids, known, writing=options, sample_ids=keys, end=True)
        assert 1 in allowed.tokens[~known].tolist(), "it would be written"


# -- what a token depends on


@pytest.mark.parametrize("order", ORDERS)
def test_rows_do_not_depend_on_their_batch(order: str) -> None:
    backbone, method = model()
    ids, known, keys = prompts()
    options = writing(order=order, steps=3)
    whole = method.write(backbone, ids, known, writing=options, sample_ids=keys, end=False)
    for row in range(3):
        alone = method.write(
            backbone, ids[row, None], known[row, None], writing=options, sample_ids=keys[row, None], end=False
        )
        assert torch.equal(alone.tokens[0], whole.tokens[row])
    other = method.write(
        backbone, ids, known, writing=writing(order=order, steps=3, seed=1), sample_ids=keys, end=False
    )
    assert not torch.equal(other.tokens, whole.tokens)


def test_what_stands_at_unknown_positions_is_not_looked_at() -> None:
    backbone, method = model()
    ids, known, keys = prompts()
    for end in (True, False):
        left = method.write(backbone, ids, known, writing=writing(), sample_ids=keys, end=end)
        right = method.write(backbone, torch.where(known, ids, 1), known, writing=writing(), sample_ids=keys, end=end)
        assert torch.equal(left.tokens, right.tokens)
        assert torch.equal(left.lengths, right.lengths)


def test_a_gap_is_filled_from_both_sides() -> None:
    backbone, method = model()
    ids = make_batch(1, 16).input_ids
    columns = torch.arange(16)[None]
    known, given = columns < 5, columns >= 9
    out = method.write(backbone, ids, known, given=given, writing=writing(temperature=0.0), end=False)
    assert torch.equal(out.tokens[known | given], ids[known | given])
    assert int((out.revealed >= 0).sum()) == 4
    later = ids.clone()
    later[0, 9:] = (later[0, 9:] + 11) % VOCAB
    other = method.write(backbone, later, known, given=given, writing=writing(temperature=0.0), end=False)
    assert not torch.equal(out.tokens[0, 5:9], other.tokens[0, 5:9]), "what follows the gap is read"


def test_fresh_noise_at_every_step() -> None:
    backbone, method = model()
    ids, known, keys = prompts()
    common, fresh = (
        method.write(
            backbone, ids, known, writing=writing(common_noise=common, order="random"), sample_ids=keys, end=False
        )
        for common in (True, False)
    )
    assert not torch.equal(common.tokens, fresh.tokens)


# -- the end


def test_texts_end_where_the_model_writes_its_end() -> None:
    backbone, method = model()
    likely(method, 1)
    ids, known, keys = prompts()
    out = method.write(backbone, ids, known, writing=writing(temperature=0.0), sample_ids=keys)
    for row in range(3):
        ends = ((out.tokens[row] == 1) & ~known[row]).nonzero().flatten().tolist()
        assert int(out.lengths[row]) == (ends[0] if ends else 20)
    assert bool((out.lengths < 20).any()), "the case is there"


def test_blocks_are_left_out_once_every_text_has_ended() -> None:
    backbone, method = model()
    original = method.head

    def ends(backbone, features):
        logits = torch.full_like(original(backbone, features), -50.0)
        logits[..., 1] = 50.0
        return logits

    method.head = ends
    ids, known, keys = prompts()
    out = method.write(backbone, ids, known, writing=writing(block=8, steps=2), sample_ids=keys)
    assert out.blocks == 1
    assert out.lengths.tolist() == [4, 6, 9]
    assert bool((out.revealed[:, 12:] == -1).all())
    assert bool((out.tokens[:, 12:] == 1).all())


# -- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "writing.steps"),
        ({"temperature": -1.0}, "writing.temperature"),
        ({"top_p": 0.0}, "writing.top_p"),
        ({"block": 0}, "writing.block"),
        ({"readout": "fused"}, "writing.readout belongs"),
        ({"project": 0.5}, "writing.project belongs"),
    ],
)
def test_bad_ways_of_writing(changes: dict, message: str) -> None:
    backbone, method = converted()
    ids, known, _ = prompts()
    with pytest.raises(UsageError, match=message):
        method.write(backbone, ids, known, writing=writing(**changes), end=False)


def test_nothing_to_write_and_no_first_token() -> None:
    backbone, method = converted()
    ids, known, _ = prompts()
    with pytest.raises(UsageError, match="nothing is left"):
        method.write(backbone, ids, torch.ones_like(known), writing=writing(), end=False)
    with pytest.raises(UsageError, match="first token"):
        method.write(backbone, ids, torch.zeros_like(known), writing=writing(), end=False)


def test_writers_refuse_what_is_for_masked_models() -> None:
    for changes in ({"order": "random"}, {"top_p": 0.9}):
        with pytest.raises(UsageError, match="regime 'mask'"):
            check_writing(writing(**changes), condition_dropout=0.0)


def test_broken_weights_are_said() -> None:
    backbone, method = converted(given=config())
    with torch.no_grad():
        method.mask_embedding.fill_(float("nan"))
    ids, known, _ = prompts()
    with pytest.raises(UsageError, match="not a number"):
        method.write(backbone, ids, known, writing=writing(), end=False)
