"""The n-gram model against a direct reading of its formula, and its draws against its probabilities."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from dihal.errors import UsageError
from dihal.evaluation.ngram import NgramModel

VOCAB = 7


def text(seed: int = 0, documents: int = 6) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [
        generator.choice(VOCAB - 1, size=generator.integers(1, 15), p=[0.4, 0.3, 0.1, 0.1, 0.06, 0.04]).tolist()
        for _ in range(documents)
    ]


def fit(documents: list[list[int]], order: int) -> NgramModel:
    flat = np.array([token for document in documents for token in document], dtype=np.uint32)
    return NgramModel.fit(flat, order=order, vocab=VOCAB, ends=np.cumsum([len(d) for d in documents]))


def kneser_ney(documents: list[list[int]], context: list[int], token: int, order: int) -> float:
    """p(token | context) by the module's docstring, counted with dictionaries."""

    def counts(k: int) -> Counter:
        found: Counter = Counter()
        neighbours: dict[tuple, set] = {}
        for document in documents:
            for at in range(len(document) - k + 1):
                gram = tuple(document[at : at + k])
                found[gram] += 1
                neighbours.setdefault(gram, set()).add(document[at - 1] if at else "beginning")
        return found if k == order else Counter({gram: len(left) for gram, left in neighbours.items()})

    def p(k: int, context: list[int]) -> float:
        if k == 0:
            return 1 / VOCAB
        found = counts(k)
        once, twice = (sum(value == wanted for value in found.values()) for wanted in (1, 2))
        discount = once / (once + 2 * twice) if once else 0.5
        after = {gram[-1]: value for gram, value in found.items() if list(gram[:-1]) == context[len(context) - k + 1 :]}
        if not after:
            return p(k - 1, context)
        total = sum(after.values())
        own = max(after.get(token, 0) - discount, 0) / total
        return own + discount * len(after) / total * p(k - 1, context)

    return p(order, context)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_probabilities_are_those_of_the_formula(order: int, seed: int) -> None:
    documents = text(seed)
    model = fit(documents, order)
    generator = np.random.default_rng(seed)
    contexts = generator.integers(0, VOCAB, (25, 4))  # id 6 is never seen; most contexts of three tokens neither
    found = model.log_probabilities(torch.from_numpy(contexts)).exp()
    for row, context in enumerate(contexts.tolist()):
        wanted = [kneser_ney(documents, context, token, order) for token in range(VOCAB)]
        assert found[row].tolist() == pytest.approx(wanted, rel=1e-12)
    assert torch.allclose(found.sum(-1), torch.ones(25, dtype=torch.float64))


@pytest.mark.parametrize("order", [2, 3])
def test_a_context_that_was_never_seen_gives_the_shorter_one(order: int) -> None:
    model = fit(text(), order)
    shorter = model.of_order(1) if order == 2 else None
    unseen = model.log_probabilities(torch.tensor([[6] * (order - 1), [-1] * (order - 1), [99] * (order - 1)]))
    assert torch.equal(unseen[0], unseen[1])
    assert torch.equal(unseen[0], unseen[2])
    assert torch.allclose(unseen[0], model._base)
    if shorter is not None:
        assert not torch.equal(unseen[0], shorter._base), "below the highest order, neighbours are counted"


def test_text_does_not_run_over_the_end_of_a_document() -> None:
    together, apart = fit([[0, 1, 0, 1, 2, 3]], 2), fit([[0, 1, 0, 1], [2, 3]], 2)
    context = torch.tensor([[1]])
    assert together.log_probabilities(context)[0, 2] > apart.log_probabilities(context)[0, 2] + 0.5


def test_a_lower_order_is_what_fitting_it_gives() -> None:
    documents = text()
    highest = fit(documents, 4)
    contexts = torch.from_numpy(np.random.default_rng(3).integers(-1, VOCAB, (20, 3)))
    for order in (1, 2, 3):
        lower, direct = highest.of_order(order), fit(documents, order)
        assert lower.order == order
        assert torch.equal(lower.log_probabilities(contexts), direct.log_probabilities(contexts))
    with pytest.raises(UsageError, match="up to 4"):
        highest.of_order(5)


def test_documents_shorter_than_the_order() -> None:
    model = fit([[0], [1], [0]], 3)
    found = model.log_probabilities(torch.tensor([[0, 1]])).exp()
    assert found.sum() == pytest.approx(1)
    assert found[0, 1] == pytest.approx(found[0, 0]), "each was seen at a document's beginning and nowhere else"


def test_the_narrow_result_is_the_wide_one_rounded() -> None:
    model = fit(text(), 3)
    contexts = torch.from_numpy(np.random.default_rng(3).integers(-1, VOCAB, (20, 2)))
    narrow = model.log_probabilities(contexts, dtype=torch.float32)
    assert narrow.dtype == torch.float32
    assert torch.allclose(narrow.double(), model.log_probabilities(contexts), atol=1e-6)


def test_contexts_end_at_each_position_and_begin_with_the_row() -> None:
    ids = torch.tensor([[5, 4, 3], [0, 1, 2]])
    model = fit(text(), 3)
    assert model.contexts(ids).tolist() == [[[-1, 5], [5, 4], [4, 3]], [[-1, 0], [0, 1], [1, 2]]]
    assert model.of_order(1).contexts(ids).shape == (2, 3, 0)
    assert model.of_order(2).contexts(ids).squeeze(-1).tolist() == ids.tolist()


def test_draws_follow_the_probabilities_and_depend_on_their_key_only() -> None:
    model = fit(text(1, 12), 3)
    prompts = torch.tensor([[0, 1]]).repeat(4000, 1)
    keys = torch.arange(4000)
    options = {"new_tokens": 2, "temperature": 1.0, "seed": 3}
    made = model.sample(prompts, sample_ids=keys, banned=2, **options)
    p = model.log_probabilities(prompts[:1]).exp()[0]
    p[2] = 0
    p /= p.sum()
    share = torch.bincount(made[:, 0], minlength=VOCAB) / 4000
    assert (share - p).abs().max() < 4 * math.sqrt(0.25 / 4000)
    assert not (made == 2).any()
    some = torch.tensor([17, 3999])
    assert torch.equal(model.sample(prompts[:2], sample_ids=some, banned=2, **options), made[some])
    # The second token is drawn given the first one drawn.
    given = made[made[:, 0] == 0]
    p = model.log_probabilities(torch.tensor([[1, 0]])).exp()[0]
    p[2] = 0
    p /= p.sum()
    share = torch.bincount(given[:, 1], minlength=VOCAB) / len(given)
    assert (share - p).abs().max() < 4 * math.sqrt(0.25 / len(given))


def test_greedy_text_is_the_most_likely_one_and_a_unigram_needs_no_context() -> None:
    model = fit([[0, 1, 2] * 8], 3)
    keys = torch.arange(1)
    made = model.sample(torch.tensor([[0]]), new_tokens=5, temperature=0.0, seed=0, sample_ids=keys)
    assert made.tolist() == [[1, 2, 0, 1, 2]]
    single = fit([[0, 0, 1]], 1)
    made = single.sample(torch.tensor([[1]]), new_tokens=2, temperature=0.0, seed=0, sample_ids=keys)
    assert made.tolist() == [[0, 0]]


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        NgramModel.fit(np.array([1]), order=0, vocab=VOCAB)
    with pytest.raises(UsageError, match="training tokens"):
        NgramModel.fit(np.array([], dtype=np.uint32), order=2, vocab=VOCAB)
    with pytest.raises(UsageError, match="7 entries"):
        NgramModel.fit(np.array([1, 7]), order=2, vocab=VOCAB)
