"""Pairs of prompts: equally long, one-token answers in every tokenizer, two splits that share nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dihal.circuits.metrics import solved
from dihal.circuits.tasks import TASKS, View, build_task, jointly_solved, require_aligned, reveal_orders
from dihal.circuits.tasks.base import Task
from dihal.circuits.tasks.countdown import solve
from dihal.circuits.tasks.view import reveal_counts
from dihal.circuits.types import PairBatch
from dihal.errors import UsageError


def _all(task: Task, n: int = 24, split: str = "discovery") -> list[PairBatch]:
    return task.pairs(n, seed=0, split=split)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_pairs_fit_two_tokenizers(name: str, word_tokenizer) -> None:
    tokenizers = [word_tokenizer(), word_tokenizer(missing=("Mary", "dog", "waa"), first="<pad>")]
    task = build_task(name, tokenizers)
    texts = task.prompts(24)
    for model, tokenizer in enumerate(tokenizers):
        batches = _all(task.for_model(model))
        assert sum(len(batch) for batch in batches) == 24
        for batch in batches:
            assert (batch.clean != batch.corrupted).any(1).all()
            assert torch.allclose(batch.weights.sum(1), torch.ones(len(batch)))
            for row, sample in enumerate(batch.ids.tolist()):
                listed = set(batch.answers[row, 0].tolist()) - {-1}
                if texts[sample].answers:
                    words = {tokenizer.decode([token]).strip() for token in listed}
                    assert words == {word.strip() for word in texts[sample].answers}
                assert not listed & set(batch.foils[row, 0].tolist())
    # The same ids are the same prompts for both models.
    ids = [sorted(i for batch in _all(task.for_model(model)) for i in batch.ids.tolist()) for model in (0, 1)]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("name", sorted(TASKS))
def test_splits_never_share_template_and_words(name: str, word_tokenizer) -> None:
    task = build_task(name, [word_tokenizer()])
    used = [
        {
            (prompt.template, prompt.key)
            for seed in (0, 1)
            for prompt in task.prompts(40, seed=seed, split=split).values()
        }
        for split in ("discovery", "test")
    ]
    assert used[0]
    assert used[1]
    assert not used[0] & used[1]
    ids = [set(task.prompts(40, split=split)) for split in ("discovery", "test")]
    assert not ids[0] & ids[1]


def test_more_pairs_begin_with_the_same_ones(word_tokenizer) -> None:
    task = build_task("ioi", [word_tokenizer()])
    few, many = task.prompts(10), task.prompts(50)
    assert {sample: many[sample] for sample in few} == few
    assert task.prompts(10, seed=1) != few
    assert len({(p.clean, p.corrupted) for p in many.values()}) == 50


def test_batch_size_does_not_change_pairs(word_tokenizer) -> None:
    def lines(size: int) -> dict[int, tuple]:
        task = build_task("countdown", [word_tokenizer()], batch_size=size)
        return {
            int(batch.ids[row]): (tuple(batch.clean[row].tolist()), tuple(batch.positions[row].tolist()))
            for batch in _all(task)
            for row in range(len(batch))
        }

    assert lines(1) == lines(7)


def test_the_flip_flips_and_the_third_name_does_not(word_tokenizer) -> None:
    tokenizer = word_tokenizer()
    for prompt in build_task("ioi", [tokenizer]).prompts(20).values():
        subject, other = prompt.meta["subject"], prompt.meta["indirect_object"]
        assert prompt.clean.count(subject) == 2
        assert prompt.clean.count(other) == 1
        assert prompt.corrupted.count(other) == 2
        assert prompt.corrupted.count(subject) == 1
        assert prompt.answers == (f" {other}",)
    for prompt in build_task("ioi", [tokenizer], corruption="third-name").prompts(20).values():
        assert prompt.corrupted.count(prompt.meta["subject"]) == 1
        assert prompt.corrupted.count(prompt.meta["indirect_object"]) == 1
    assert (
        build_task("ioi", [tokenizer]).template_hash
        != build_task("ioi", [tokenizer], corruption="third-name").template_hash
    )


@pytest.mark.parametrize("digits", [1, 2])
def test_greater_than_lists_what_is_greater(digits: int, word_tokenizer) -> None:
    tokenizer = word_tokenizer(digits=digits)
    task = build_task("greater_than", [tokenizer])
    for prompt in task.prompts(30).values():
        number = int(prompt.meta["start"][2:])
        limit = number // 10 if digits == 1 else number
        assert [int(word) for word in prompt.answers] == list(range(limit + 1, 10 if digits == 1 else 100))
        assert [int(word) for word in prompt.foils] == list(range(limit))
    with pytest.raises(UsageError, match="one digit per token"):
        build_task("greater_than", [word_tokenizer(digits=1), word_tokenizer(digits=2)])


@pytest.mark.parametrize("corruption", ["target", "operand"])
@pytest.mark.parametrize("operands", [2, 3])
def test_countdown_has_one_solution_and_reads_the_plan(corruption: str, operands: int, word_tokenizer) -> None:
    tokenizer = word_tokenizer()
    task = build_task("countdown", [tokenizer], operands=operands, corruption=corruption)
    for sample, prompt in task.prompts(12).items():
        steps = prompt.meta["solution"].split(",")
        for step in steps:
            left, right = step.split("=")
            assert eval(left.replace("/", "//")) == int(right)
        assert int(steps[-1].split("=")[1]) == prompt.meta["target"]
        pair = task.encoded(12)[sample]
        read = [tokenizer.decode([pair.clean[at]]) for at, foil in zip(pair.slot, pair.foils) if foil]
        assert read
        assert set(read) <= set("+-*/")
    assert solve((6, 4), ("/",)) is None
    assert solve((6, 3, 5), ("/", "+")) == (7, "6/3=2,2+5=7")


def test_causal_view_reads_one_position_earlier_and_full_view_masks(word_tokenizer) -> None:
    tokenizer = word_tokenizer()
    mask = tokenizer.mask_token_id
    causal = build_task("ioi", [tokenizer], batch_size=1)
    full = causal.for_model(view=View(attention="full", mask_id=mask))
    plain = causal.for_model(view=View(attention="full", mask_id=mask, shift=False))
    rows = {
        name: {int(b.ids[0]): b for b in task.pairs(6)} for name, task in (("c", causal), ("f", full), ("p", plain))
    }
    for sample, one in rows["c"].items():
        shifted, unshifted = rows["f"][sample], rows["p"][sample]
        assert shifted.attention == "full"
        assert shifted.clean[0, :-1].tolist() == one.clean[0].tolist()
        assert shifted.clean[0, -1] == mask == shifted.corrupted[0, -1]
        assert shifted.positions.tolist() == one.positions.tolist() == [[one.time - 1]]
        assert unshifted.positions.tolist() == [[one.time]]


def test_slot_form_is_for_full_attention_only(word_tokenizer) -> None:
    tokenizer = word_tokenizer()
    with pytest.raises(UsageError, match="text after its answer"):
        build_task("infill", [tokenizer], form="slot").pairs(4)
    task = build_task("infill", [tokenizer], form="slot", view=View(attention="full", mask_id=1))
    for batch in task.pairs(8):
        masked = batch.clean == 1
        assert masked.sum(1).tolist() == [1] * len(batch)
        assert torch.equal(masked, batch.corrupted == 1)
        assert torch.equal(batch.positions[:, 0], masked.int().argmax(1) - 1)
        assert bool((masked.int().argmax(1) < batch.time - 1).all())


def test_reveal_trajectory_is_shared_and_reads_what_is_masked(word_tokenizer) -> None:
    tokenizer = word_tokenizer()
    view = View(attention="full", mask_id=tokenizer.mask_token_id, steps=3)
    task = build_task("countdown", [tokenizer], read="all", view=view)
    seen: dict[int, int] = {}
    for batch in task.pairs(6):
        hidden = batch.clean == view.mask_id
        assert torch.equal(hidden, batch.corrupted == view.mask_id)
        for row in range(len(batch)):
            for target in range(batch.positions.shape[1]):
                if batch.weights[row, target] > 0:
                    assert bool(hidden[row, batch.positions[row, target] + 1])
        for sample in batch.ids.tolist():
            seen[sample] = seen.get(sample, 0) + 1
    assert set(seen.values()) == {3}
    assert reveal_counts([True, False, True, False], [0, 1, 2, 3], 2) == [0, 2]
    assert reveal_counts([True, False, False], [0, 1, 2], 8) == [0]
    assert reveal_counts([True, False, False], [2, 1, 0], 8) == [0, 1, 2]


def test_reveal_order_follows_confidence(word_tokenizer) -> None:
    tokenizer = word_tokenizer()
    size = len(tokenizer)
    view = View(attention="full", mask_id=tokenizer.mask_token_id)
    task = build_task("countdown", [tokenizer], view=view)

    def surest_last(batch: PairBatch) -> torch.Tensor:
        return 0.01 * batch.positions[..., None].float() * torch.eye(size)[0]

    orders = reveal_orders(task, surest_last, 4)
    for sample, order in orders.items():
        assert list(order) == list(range(len(order)))[::-1]
        # All answers are revealed from the right now, and the trajectory's first state stays wholly masked.
        first = task.revealing(orders).encoded(4)[sample]
        assert len(first.slot) == len(order)
    with pytest.raises(UsageError, match="reveal order"):
        reveal_orders(task.for_model(view=View()), surest_last, 1)


def _knows(task: Task, right: set[int]):
    """Logits that favour the answer for the given ids only."""

    def logits(batch: PairBatch) -> torch.Tensor:
        out = torch.zeros(*batch.positions.shape, len(task.tokenizers[0]))
        for row, sample in enumerate(batch.ids.tolist()):
            ids = batch.answers if sample in right else batch.foils
            out[row, 0, ids[row, 0][ids[row, 0] >= 0]] = 5.0
        return out

    return logits


def test_jointly_solved_keeps_what_all_models_solve(word_tokenizer) -> None:
    task = build_task("ioi", [word_tokenizer(), word_tokenizer(missing=("John",))])
    tasks = [task.for_model(0), task.for_model(1)]
    models = [_knows(task, set(range(0, 40, 2))), _knows(task, set(range(0, 40, 3)))]
    kept = jointly_solved(tasks, models, {"discovery": 5}, pool=40)
    for one in kept:
        assert sorted(i for batch in one.pairs(5) for i in batch.ids.tolist()) == [0, 6, 12, 18, 24]
    assert kept[0].provenance()["selected"] == {"discovery": 5}
    pool = {"pairs": 40, "solved": [20, 14], "together": 7}
    assert [one.provenance()["selected_from"] for one in kept] == [{"discovery": pool}] * 2
    with pytest.raises(UsageError, match="solve 20, 14, and 7 together"):
        jointly_solved(tasks, models, {"discovery": 8}, pool=40)
    with pytest.raises(UsageError, match="0 together"):
        jointly_solved(tasks, [models[0], _knows(task, set())], {"discovery": 1}, pool=40)
    with pytest.raises(UsageError, match="are left after the selection"):
        kept[0].pairs(6)


def test_a_target_counts_as_solved_only_when_all_are() -> None:
    batch = PairBatch(
        clean=torch.zeros(2, 3, dtype=torch.int64),
        corrupted=torch.ones(2, 3, dtype=torch.int64),
        positions=torch.tensor([[0, 1], [0, 1]]),
        answers=torch.tensor([[[0], [1]], [[0], [0]]]),
        foils=torch.tensor([[[2], [2]], [[2], [2]]]),
        weights=torch.tensor([[0.5, 0.5], [1.0, 0.0]]),
        attention="causal",
        ids=torch.tensor([0, 1]),
    )
    logits = torch.tensor([[[3.0, 0.0, 1.0], [3.0, 0.0, 1.0]], [[3.0, 0.0, 1.0], [0.0, 0.0, 1.0]]])
    assert solved(logits, batch).tolist() == [False, True]


def _file(path: Path, *rows: dict) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def test_own_pairs_and_what_is_wrong_with_them(tmp_path: Path, word_tokenizer) -> None:
    tokenizers = [word_tokenizer()]
    good = {
        "clean": "When Mary and John went to the store , John gave a ring to",
        "answers": [" Mary"],
        "foils": [" John"],
    }
    rows = [
        {
            **good,
            "clean": good["clean"].replace("Mary", name),
            "corrupted": good["clean"].replace("Mary", "Tom"),
            "answers": [f" {name}"],
        }
        for name in ("Anna", "Paul", "Mark", "Sarah", "David", "Kate", "Peter", "Alice")
    ]
    task = build_task(_file(tmp_path / "mine.jsonl", *rows), tokenizers)
    assert task.name == "mine"
    assert len(task.prompts(2)) == 2
    with pytest.raises(UsageError, match="Ask for fewer"):
        task.prompts(9)
    for change, message in (
        ({"corrupted": good["clean"] + " the"}, "must be equally long"),
        ({"corrupted": good["clean"], "answers": [" Mary Tom"]}, "must be one token"),
        ({"corrupted": good["clean"], "answers": []}, "needs answers and foils"),
        ({"corrupted": good["clean"], "answers": " Mary"}, "must be a list of words"),
        ({}, "must be an object with clean and corrupted"),
        ({"corrupted": "a", "target": "b"}, "unknown: target"),
    ):
        with pytest.raises(UsageError, match=message):
            build_task(_file(tmp_path / "bad.jsonl", {**good, **change}), tokenizers)
    with pytest.raises(UsageError, match="cannot read"):
        build_task(str(tmp_path / "none.jsonl"), tokenizers)


def test_pairs_that_are_not_aligned_are_refused() -> None:
    row = torch.zeros(1, 4, dtype=torch.int64)
    rest = {"positions": torch.tensor([[1]]), "answers": torch.tensor([[[1]]]), "foils": torch.tensor([[[2]]])}
    same = PairBatch(
        clean=row, corrupted=row, weights=torch.ones(1, 1), attention="causal", ids=torch.tensor([0]), **rest
    )
    with pytest.raises(UsageError, match="are the same"):
        require_aligned(same)
    other = torch.tensor([[0, 0, 9, 0]])
    masked = PairBatch(
        clean=row, corrupted=other, weights=torch.ones(1, 1), attention="full", ids=torch.tensor([0]), **rest
    )
    with pytest.raises(UsageError, match="different positions"):
        require_aligned(masked, mask_id=9)


def test_refusals_name_the_fix(word_tokenizer) -> None:
    tokenizer = word_tokenizer()
    for call, message in (
        (lambda: build_task("io", [tokenizer]), "Did you mean 'ioi'"),
        (lambda: build_task("ioi", []), "at least one tokenizer"),
        (lambda: build_task("ioi", [tokenizer], corruptions="x"), "Did you mean 'corruption'"),
        (lambda: build_task("ioi", [tokenizer], corruption="none"), "third-name"),
        (lambda: build_task("countdown", [tokenizer], operands=9), "2 to 4 operands"),
        (lambda: build_task("ioi", [tokenizer]).prompts(0), "at least one"),
        (lambda: View(attention="full"), "mask_id"),
    ):
        with pytest.raises(UsageError, match=message):
            call()


def test_a_tokenizer_without_words_is_refused() -> None:
    from tests.kit import tiny_tokenizer

    for name in ("ioi", "infill", "induction"):
        with pytest.raises(UsageError, match=r"tokenizers have|names are one token"):
            build_task(name, [tiny_tokenizer(260)])
