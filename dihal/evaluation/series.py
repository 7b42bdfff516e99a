"""What the figures draw, the same for the page and for the pictures."""

from __future__ import annotations

from dataclasses import dataclass

from dihal.evaluation.ranking import Board, Entry

__all__ = ["Mark", "Series", "frontier", "kl_against_error", "kl_by_row", "kl_by_steps"]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A point with the interval of its y value."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    label: str = ""
    best: bool = True


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one row. ``colour`` counts trained rows from 0; None: a bound or control, drawn in grey."""

    label: str
    kind: str
    colour: int | None
    marks: list[Mark]


def _colours(board: Board) -> dict[str, int]:
    trained = [entry.label for entry in board.entries if entry.result.kind == "checkpoint"]
    return {label: index for index, label in enumerate(trained)}


def _series(board: Board, marks_of) -> list[Series]:
    colours = _colours(board)
    found = []
    for place, entry in enumerate(board.entries):
        marks = marks_of(entry, place)
        if marks:
            found.append(
                Series(label=entry.label, kind=entry.result.kind, colour=colours.get(entry.label), marks=marks)
            )
    return found


def _by_steps(entry: Entry) -> list[tuple[str, dict]]:
    return sorted(entry.result.metrics.items(), key=lambda item: int(item[0]))


def _label(entry: Entry, steps: str) -> str:
    return entry.label if len(entry.result.metrics) == 1 else f"{entry.label}, {steps} step{'s' * (steps != '1')}"


def kl_by_row(board: Board) -> list[Series]:
    """KL with its interval, one row each, at the number of steps of the table; x is the KL, y the place."""

    def marks(entry: Entry, place: int) -> list[Mark]:
        kl = entry.result.metrics[entry.steps]["kl"]
        return (
            [] if kl.value is None else [Mark(x=kl.value, y=float(place), low=kl.low, high=kl.high, label=entry.label)]
        )

    return _series(board, marks)


def kl_against_error(board: Board) -> list[Series]:
    """KL (y) against the share of state variance not explained (x), at every number of steps."""

    def marks(entry: Entry, place: int) -> list[Mark]:
        found = []
        for steps, metrics in _by_steps(entry):
            kl, error = metrics["kl"], metrics["state_error"]
            if kl.value is not None and error.value is not None:
                best = steps == entry.steps
                found.append(Mark(x=error.value, y=kl.value, low=kl.low, high=kl.high, label=entry.label, best=best))
        return found

    return _series(board, marks)


def kl_by_steps(board: Board) -> list[Series]:
    """KL (y) against the number of sampling steps (x), for rows measured at several."""

    def marks(entry: Entry, place: int) -> list[Mark]:
        found = [
            Mark(x=float(steps), y=kl.value, low=kl.low, high=kl.high, best=steps == entry.steps)
            for steps, metrics in _by_steps(entry)
            if (kl := metrics["kl"]).value is not None and steps != "0"
        ]
        return found if len(found) > 1 else []

    return _series(board, marks)


def frontier(board: Board) -> list[Series]:
    """NLL of generated text under the scorer (y) against its unigram entropy (x)."""

    def marks(entry: Entry, place: int) -> list[Mark]:
        return [
            Mark(x=text.entropy, y=text.generative_nll, label=_label(entry, steps), best=steps == entry.steps)
            for steps, text in sorted(entry.result.text.items(), key=lambda item: int(item[0]))
        ]

    return _series(board, marks)
