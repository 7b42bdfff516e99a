"""Sums per document do not depend on who summed what."""

from __future__ import annotations

import itertools
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from dihal.errors import UsageError
from dihal.evaluation.sharing import everywhere, in_turn, on_first
from dihal.evaluation.sums import DocumentSums, contributions
from dihal.geometry.ranks import Ranks

POSITIONS, DOCUMENTS, DIM = 500, 9, 3


def text() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Positions of documents of unlike length, with numbers whose sum depends on the order."""
    generator = torch.Generator().manual_seed(0)
    documents = torch.randint(0, DOCUMENTS, (POSITIONS,), generator=generator).sort().values
    scale = 10.0 ** torch.randint(-6, 6, (POSITIONS, 1), generator=generator)
    vectors = torch.randn(POSITIONS, DIM, generator=generator).double() * scale
    return documents, {"number": vectors[:, 0].contiguous(), "vector": vectors}


def summed(size: int, *, continuing: bool = True) -> dict[str, np.ndarray]:
    """Sums over batches of so many positions, each of which went through another process."""
    documents, values = text()
    sums = DocumentSums(DOCUMENTS, {"number": (), "vector": (DIM,)})
    begun = 0
    for part in torch.arange(POSITIONS).split(size):
        chosen = {name: value[part] for name, value in values.items()}
        found = contributions(documents[part], chosen, begun=begun if continuing else 0)
        sums.add(pickle.loads(pickle.dumps(found)))
        begun = int(documents[part[-1]]) + 1
    return sums.numpy()


@pytest.mark.parametrize("size", [1, 7, 64, POSITIONS])
def test_sums_are_those_of_adding_position_after_position(size: int) -> None:
    documents, values = text()
    wanted = {"number": np.zeros(DOCUMENTS), "vector": np.zeros((DOCUMENTS, DIM))}
    for position, document in enumerate(documents.tolist()):
        for name, value in values.items():
            wanted[name][document] += value[position].numpy()
    found = summed(size)
    for name in wanted:
        assert np.array_equal(found[name], wanted[name]), name


def test_it_takes_the_single_positions_of_documents_that_go_on() -> None:
    assert not np.array_equal(summed(7, continuing=False)["vector"], summed(7)["vector"])
    np.testing.assert_allclose(summed(7, continuing=False)["vector"], summed(7)["vector"], rtol=1e-9)


def test_a_batch_hands_over_one_row_per_document_and_the_positions_of_the_one_that_goes_on() -> None:
    documents = torch.tensor([4, 4, 4, 5, 5, 6])
    values = {"number": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)}
    found = contributions(documents, values, begun=5)
    assert found.documents.tolist() == [4, 4, 4, 5, 6]
    assert found.values["number"].tolist() == [1, 2, 3, 9, 6]
    assert contributions(documents, values, begun=0).values["number"].tolist() == [6, 9, 6]
    empty = contributions(documents[:0], {"number": values["number"][:0]}, begun=5)
    assert len(empty.documents) == len(empty.values["number"]) == 0


def test_one_process_does_all_pieces_one_after_another() -> None:
    done: list[int] = []

    def work(number: int) -> int:
        done.append(number)
        return 10 * number

    assert list(itertools.islice(in_turn(Ranks(), 5, work), 2)) == [0, 10]
    assert done == [0, 1], "nothing is held that is not needed"
    assert list(in_turn(Ranks(), 0, work)) == []
    assert everywhere(Ranks(), lambda: 3) == on_first(Ranks(), lambda: 3) == 3


@dataclass(frozen=True, kw_only=True)
class Played(Ranks):
    """One of several processes; what the others do is known beforehand."""

    others: dict[int, Any]

    def gather(self, own: dict[int, Any], count: int) -> list[Any]:
        assert set(own) <= {self.rank}
        return [own.get(number, self.others.get(number)) for number in range(count)]


def test_every_process_knows_all_pieces_in_order() -> None:
    ranks = Played(rank=1, size=3, others={0: "first", 2: "last"})
    done: list[int] = []
    found = list(in_turn(ranks, 5, lambda number: done.append(number) or str(number)))
    assert done == [1, 4], "its own"
    assert found == ["first", "1", "last", "first", "4"]
    assert on_first(ranks, lambda: "here") == "first"
    assert everywhere(ranks, lambda: "here") == "here"


def test_an_error_ends_all_and_the_first_process_tells() -> None:
    def fail(number: int) -> None:
        raise UsageError(f"piece {number}")

    first = Played(rank=0, size=2, others={1: UsageError("elsewhere")})
    other = Played(rank=1, size=2, others={0: None})
    with pytest.raises(UsageError, match="piece 0"):
        list(in_turn(first, 4, fail))
    with pytest.raises(UsageError, match="elsewhere"):
        list(in_turn(first, 4, lambda number: number))
    with pytest.raises(SystemExit) as ended:
        list(in_turn(other, 4, fail))
    assert ended.value.code == 0, "torchrun kills the first process where another fails before it"
