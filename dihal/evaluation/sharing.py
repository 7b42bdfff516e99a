"""Work shared by the processes of one evaluation: whoever does a piece, all of them know what came of it, in order.

Every process calls these functions with the same arguments, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

from dihal.errors import UsageError
from dihal.geometry.ranks import Ranks

__all__ = ["everywhere", "in_turn", "on_first"]

Item = TypeVar("Item")


def in_turn(ranks: Ranks, count: int, work: Callable[[int], Item]) -> Iterator[Item]:
    """Yield ``work(0) .. work(count - 1)`` on every process; each piece is done by the process that owns it.

    Results travel between processes after every round of one piece each: they should hold NumPy arrays or numbers,
    not tensors of a device.

    Args:
        ranks: the processes.
        count: pieces.
        work: does the piece of this number.

    Raises:
        UsageError: from a piece (that of the lowest number), on the first process.
        SystemExit: the same on the others, which end with status 0 and say nothing.
    """
    if ranks.size == 1:
        for number in range(count):
            yield work(number)
        return
    for begin in range(0, count, ranks.size):
        own: dict[int, Item | UsageError] = {}
        if begin + ranks.rank < count:
            try:
                own[ranks.rank] = work(begin + ranks.rank)
            except UsageError as error:
                own[ranks.rank] = error
        for found in ranks.gather(own, min(ranks.size, count - begin)):
            if isinstance(found, UsageError):
                _end(found, ranks)
            yield found


def everywhere(ranks: Ranks, work: Callable[[], Item]) -> Item:
    """Do the same on every process and go on when all have; return this one's result.

    Raises:
        UsageError, SystemExit: as :func:`in_turn`, whichever process had the error.
    """
    results: list[Item] = []

    def piece(number: int) -> None:
        results.append(work())

    for _ in in_turn(ranks, ranks.size, piece):
        pass
    return results[0]


def on_first(ranks: Ranks, work: Callable[[], Item]) -> Item:
    """Do something on the first process alone; return its result on all.

    Raises:
        UsageError, SystemExit: as :func:`in_turn`.
    """
    (found,) = in_turn(ranks, 1, lambda number: work())
    return found


def _end(error: UsageError, ranks: Ranks) -> NoReturn:
    if ranks.rank > 0:
        raise SystemExit(0)  # the first process tells; a bad status here would make torchrun kill it before it does
    raise error
