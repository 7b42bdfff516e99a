"""Indirect object identification (Wang et al. 2022): two names, one returns as the giver, the other receives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dihal.circuits.tasks.base import Draw, Recipe, Words
from dihal.circuits.tasks.text import Prompt, single_token
from dihal.errors import UsageError

__all__ = ["NAMES", "TEMPLATES", "ioi"]

TEMPLATES = {
    "went": "When {A} and {B} went to the {place}, {S} gave a {thing} to",
    "working": "Then, {A} and {B} were working at the {place}. {S} decided to give a {thing} to",
    "long-day": "After {A} and {B} had a long day at the {place}, {S} handed a {thing} to",
    "friends": "The friends {A} and {B} met at the {place}, and {S} passed a {thing} to",
}
NAMES = (
    *("Mary", "John", "Tom", "James", "Anna", "Paul", "Mark", "Sarah", "David", "Kate", "Peter", "Alice"),
    *("Robert", "Emma", "Jack", "Laura", "Simon", "Julia", "Daniel", "Helen", "Michael", "Susan", "George", "Jane"),
    *("William", "Linda", "Henry", "Lisa", "Charles", "Maria", "Thomas", "Rachel", "Andrew", "Elizabeth", "Kevin"),
    *("Jennifer", "Brian", "Jessica", "Martin", "Amy", "Scott", "Michelle", "Steven", "Karen", "Adam", "Nicole"),
)
PLACES = ("store", "school", "park", "hospital", "office", "station", "garden", "restaurant", "house", "beach")
THINGS = ("drink", "book", "ring", "letter", "phone", "box", "key", "picture", "ball", "gift")
FEWEST = 8
"""Names below which prompts hardly differ."""


def ioi(tokenizers: Sequence[Any], *, corruption: str = "s2-io-flip") -> Recipe:
    """The recipe.

    Args:
        tokenizers: all in which a name is one token.
        corruption: `s2-io-flip`: in the corrupted prompt the indirect object gives, so that the right answer is
            the other name; `third-name`: somebody else gives, so that neither name is preferred.

    Raises:
        UsageError: an unknown corruption, or too few one-token names.
    """
    if corruption not in ("s2-io-flip", "third-name"):
        raise UsageError(f"ioi knows no corruption {corruption!r}. Choose s2-io-flip or third-name.")
    names, places, things = (single_token(words, tokenizers) for words in (NAMES, PLACES, THINGS))
    if len(names) < FEWEST or not places or not things:
        raise UsageError(
            f"{len(names)} of {len(NAMES)} names are one token in the given tokenizers; ioi needs {FEWEST}. "
            "Choose another task, or models whose tokenizers have names."
        )

    def make(draw: Draw) -> Prompt:
        template = draw.pick(sorted(TEMPLATES))
        subject, other, third = draw.some(names, 3)
        first = (subject, other) if draw.index(2) else (other, subject)
        place, thing = draw.pick(places), draw.pick(things)

        def text(giver: str) -> str:
            return TEMPLATES[template].format(A=first[0], B=first[1], S=giver, place=place, thing=thing)

        return Prompt(
            clean=text(subject),
            corrupted=text(other if corruption == "s2-io-flip" else third),
            answers=(f" {other}",),
            foils=(f" {subject}",),
            template=template,
            # Who gives does not count: the flipped pair must not turn up in the other split.
            key=tuple(sorted((subject, other))),
            meta={"subject": subject, "indirect_object": other, "order": "ABB" if first[0] == other else "BAB"},
        )

    said = {
        "s2-io-flip": "the second subject is replaced by the indirect object: the right answer flips",
        "third-name": "the second subject is replaced by a third name: neither answer is preferred",
    }
    return Recipe(
        name="ioi",
        templates=TEMPLATES,
        words=Words(lists={"names": tuple(names), "places": tuple(places), "things": tuple(things)}),
        make=make,
        corruption=said[corruption],
        options={"corruption": corruption},
    )
