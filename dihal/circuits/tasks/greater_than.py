"""Greater-Than (Hanna et al. 2023): an event that starts in a year ends in a later one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from dihal.circuits.tasks.base import Draw, Recipe, Words
from dihal.circuits.tasks.text import Prompt, next_tokens
from dihal.errors import UsageError

__all__ = ["NOUNS", "TEMPLATES", "greater_than"]

TEMPLATES = {
    "lasted": "The {noun} lasted from the year {start} to the year {century}",
    "began": "The {noun} began in the year {start} and ended in the year {century}",
}
NOUNS = (
    *("war", "siege", "journey", "expedition", "reign", "famine", "rebellion", "strike", "trial", "project"),
    *("campaign", "dispute", "conflict", "plague", "alliance", "occupation", "dynasty", "voyage", "study", "drought"),
)
CENTURIES = tuple(str(century) for century in range(11, 20))
_DIGITS = tuple(str(digit) for digit in range(10))
_PAIRS = tuple(f"{number:02d}" for number in range(100))


def _unit(tokenizers: Sequence[Any]) -> Literal["digit", "pair"] | None:
    """Whether the end year's next token is one digit or two, in all tokenizers alike."""
    before = TEMPLATES["lasted"].format(noun="war", start="1732", century="17")
    for unit, words in (("digit", _DIGITS), ("pair", _PAIRS)):
        # A tokenizer that splits digits reads a pair as two tokens; one with two-digit tokens makes both single.
        wanted = "45" if unit == "digit" else "4"
        counts = [
            (all(len(next_tokens(t, before, w) or ()) == 1 for w in words), len(next_tokens(t, before, wanted) or ()))
            for t in tokenizers
        ]
        if all(single and (unit == "pair" or other == 2) for single, other in counts):
            return unit
    return None


def greater_than(tokenizers: Sequence[Any], *, corruption: str = "zero") -> Recipe:
    """The recipe. Two-digit tokens: answers are all larger numbers. One-digit tokens: all larger tens digits.

    Right and wrong are sets: the metric is the difference of their means. A tens digit equal to the start's says
    nothing yet and counts on neither side.

    Args:
        tokenizers: all must split years alike.
        corruption: `zero`: the start year ends in 01 (tens digit 0): every end is later; `mirror`: its tens digit t
            becomes 9 - t (its number n becomes 99 - n).

    Raises:
        UsageError: an unknown corruption, or tokenizers that split years otherwise.
    """
    if corruption not in ("zero", "mirror"):
        raise UsageError(f"greater_than knows no corruption {corruption!r}. Choose zero or mirror.")
    unit = _unit(tokenizers)
    if unit is None:
        raise UsageError(
            "greater_than needs tokenizers that all write the end of a year as one digit per token, or all as one "
            "token of two digits; these do not. Choose another task."
        )

    def make(draw: Draw) -> Prompt | None:
        template, noun, century = draw.pick(sorted(TEMPLATES)), draw.pick(NOUNS), draw.pick(CENTURIES)
        number = 2 + draw.index(97)
        tens, ones = divmod(number, 10)
        if unit == "digit":
            values, limit = _DIGITS, tens
            other = f"0{ones}" if corruption == "zero" else f"{9 - tens}{ones}"
        else:
            values, limit = _PAIRS, number
            other = "01" if corruption == "zero" else f"{99 - number:02d}"
        answers = tuple(value for value in values if int(value) > limit)
        foils = tuple(value for value in values if int(value) < limit)
        if not answers or not foils or other == f"{number:02d}":
            return None

        def text(end: str) -> str:
            return TEMPLATES[template].format(noun=noun, start=century + end, century=century)

        return Prompt(
            clean=text(f"{number:02d}"),
            corrupted=text(other),
            answers=answers,
            foils=foils,
            template=template,
            key=(noun, century),
            meta={"start": f"{century}{number:02d}"},
        )

    def check(prompt: Prompt, tokenizers: Sequence[Any]) -> bool:
        # Two-digit vocabularies keep some years whole ("1900"): such a pair is not equally long, or not one token.
        return all(
            len(t(prompt.clean).input_ids) == len(t(prompt.corrupted).input_ids)
            and all(len(next_tokens(t, prompt.clean, word) or ()) == 1 for word in (*prompt.answers, *prompt.foils))
            for t in tokenizers
        )

    said = {
        "zero": "the start year's last two digits become 01 (one-digit tokens: its tens digit becomes 0)",
        "mirror": "the start year's number n becomes 99 - n (one-digit tokens: its tens digit t becomes 9 - t)",
    }
    return Recipe(
        name="greater_than",
        templates=TEMPLATES,
        words=Words(lists={"nouns": NOUNS, "centuries": CENTURIES}),
        make=make,
        corruption=said[corruption],
        options={"corruption": corruption, "unit": unit},
        check=None if unit == "digit" else check,
    )
