"""Induction on unrelated words: what followed a word before follows it again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dihal.circuits.tasks.base import Draw, Recipe, Words
from dihal.circuits.tasks.text import Prompt, shared_words
from dihal.errors import UsageError

__all__ = ["TEMPLATES", "induction"]

TEMPLATES = {"words": "{words}"}
_WORDS = 400
FEWEST = 40
"""Words below which prompts repeat too many of them."""


def induction(tokenizers: Sequence[Any], *, length: int = 16, corruption: str = "key") -> Recipe:
    """The recipe: `length` different words, then one of them again; the answer is the word that followed it.

    Args:
        tokenizers: the words are one token in all.
        length: words before the repeated one, 4 to 32.
        corruption: `key`: the first occurrence of the repeated word is another word: there is nothing to look up;
            `value`: the word after it is another word: the answer changes.

    Raises:
        UsageError: an option out of range, or too few words.
    """
    if not 4 <= length <= 32:
        raise UsageError(f"induction takes 4 to 32 words, got length={length}.")
    if corruption not in ("key", "value"):
        raise UsageError(f"induction knows no corruption {corruption!r}. Choose key or value.")
    words = shared_words(tokenizers, _WORDS)
    if len(words) < max(FEWEST, length + 2):
        raise UsageError(
            f"{len(words)} words are one token in the given tokenizers; induction over {length} words needs "
            f"{max(FEWEST, length + 2)}. Choose another task, or models whose tokenizers have words."
        )

    def make(draw: Draw) -> Prompt:
        *shown, fresh = draw.some(words, length + 1)
        # Not among the last two: the word before the end would be its own answer's neighbour.
        place = draw.index(length - 2)
        again, value = shown[place], shown[place + 1]
        others = [word for i, word in enumerate(shown) if i not in (place, place + 1)]
        changed = list(shown)
        changed[place if corruption == "key" else place + 1] = fresh
        foil = fresh if corruption == "value" else draw.pick(others)
        return Prompt(
            clean=" ".join(["The words are", *shown, again]),
            corrupted=" ".join(["The words are", *changed, again]),
            answers=(f" {value}",),
            foils=(f" {foil}",),
            template="words",
            key=(again, value),
            meta={"distance": length - place},
        )

    said = {
        "key": "the first occurrence of the repeated word is replaced: nothing to look up",
        "value": "the word after its first occurrence is replaced: the answer changes",
    }
    return Recipe(
        name="induction",
        templates=TEMPLATES,
        words=Words(lists={"words": tuple(words)}),
        make=make,
        corruption=said[corruption],
        options={"length": length, "corruption": corruption},
    )
