"""Semantic infilling: a missing word that the rest of the sentence decides."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from dihal.circuits.tasks.base import Draw, Recipe, Words
from dihal.circuits.tasks.text import Prompt, single_token, tokens_of
from dihal.errors import UsageError

__all__ = ["FAMILIES", "QUESTIONS", "infill"]

# Family -> sentence around the missing word {x}, and for each word what decides it.
FAMILIES: dict[str, tuple[str, dict[str, str]]] = {
    "animal": (
        "The {x} {cue} loudly in the yard.",
        {
            "dog": "barked",
            "cat": "meowed",
            "cow": "mooed",
            "lion": "roared",
            "wolf": "howled",
            "snake": "hissed",
            "bird": "chirped",
            "duck": "quacked",
            "pig": "oinked",
            "bee": "buzzed",
        },
    ),
    "worker": (
        "The {x} {cue} all morning.",
        {
            "teacher": "taught the class",
            "doctor": "treated the patients",
            "pilot": "flew the plane",
            "farmer": "milked the cows",
            "baker": "baked the bread",
            "painter": "painted the portrait",
            "lawyer": "defended the client",
            "driver": "drove the bus",
            "singer": "sang the songs",
            "writer": "wrote the novel",
        },
    ),
    "place": (
        "They went to the {x} to {cue}.",
        {
            "library": "borrow a book",
            "bakery": "buy some bread",
            "beach": "swim in the sea",
            "bank": "deposit some money",
            "hospital": "visit a sick friend",
            "airport": "catch a flight",
            "cinema": "watch a movie",
            "restaurant": "eat some dinner",
            "museum": "see the old paintings",
            "gym": "lift some weights",
        },
    ),
    "tool": (
        "She used a {x} to {cue}.",
        {
            "knife": "slice the bread",
            "hammer": "hit the nail",
            "pen": "sign the letter",
            "camera": "take a photo",
            "broom": "sweep the floor",
            "needle": "sew the button",
            "ruler": "measure the line",
            "phone": "call her mother",
            "brush": "paint the fence",
            "key": "unlock the door",
        },
    ),
    "colour": (
        "The {x} thing was {cue}.",
        {
            "green": "the fresh grass",
            "blue": "the clear sky",
            "red": "the ripe tomato",
            "white": "the fallen snow",
            "yellow": "the ripe lemon",
            "black": "the piece of coal",
            "brown": "the muddy soil",
            "orange": "the ripe carrot",
        },
    ),
}
QUESTIONS = {
    "blank": 'Fill in the blank: "{gap}" The missing word is',
    "question": 'Sentence: "{gap}" Question: which word belongs in the gap? Answer:',
    "complete": 'The sentence "{gap}" is complete with the word',
    "cloze": 'Cloze test: "{gap}" Solution:',
    "hidden": 'One word of "{gap}" was hidden. It was',
}
_GAP = "___"
FEWEST = 10
"""Pairs of words of equal cue length below which there is no task."""


def infill(tokenizers: Sequence[Any], *, form: str = "question") -> Recipe:
    """The recipe. The corrupted prompt's cue decides for another word of the same family.

    Args:
        tokenizers: all in which the missing words are one token and cues equally long.
        form: `question`: the sentence with a gap, then the answer at the end: a causal model sees both sides of the
            gap; `slot`: the word is masked where it stands, for models that attend in both directions.

    Raises:
        UsageError: an unknown form, or too few words.
    """
    if form not in ("question", "slot"):
        raise UsageError(f"infill knows no form {form!r}. Choose question or slot.")
    pairs = _word_pairs(tokenizers)
    if len(pairs) < FEWEST:
        raise UsageError(
            f"infill finds {len(pairs)} pairs of one-token words with equally long cues in the given tokenizers, "
            f"{FEWEST} are needed. Choose another task, or models whose tokenizers have words."
        )
    templates = QUESTIONS if form == "question" else {"slot": "{gap}"}

    def make(draw: Draw) -> Prompt:
        template = draw.pick(sorted(templates))
        family, right, wrong = draw.pick(pairs)
        if draw.index(2):
            right, wrong = wrong, right
        sentence, cues = FAMILIES[family]
        more = {"family": family, "word": right, "other": wrong}
        key = tuple(sorted((right, wrong)))
        if form == "slot":
            before = sentence.partition(" {x}")[0]
            return Prompt(
                clean=before,
                corrupted=before,
                answers=(f" {right}",),
                foils=(f" {wrong}",),
                after=sentence.partition(" {x}")[2].format(cue=cues[right]),
                corrupted_after=sentence.partition(" {x}")[2].format(cue=cues[wrong]),
                template=template,
                key=key,
                meta=more,
            )

        def text(word: str) -> str:
            return templates[template].format(gap=sentence.format(x=_GAP, cue=cues[word]))

        return Prompt(
            clean=text(right),
            corrupted=text(wrong),
            answers=(f" {right}",),
            foils=(f" {wrong}",),
            template=template,
            key=key,
            meta=more,
        )

    return Recipe(
        name="infill",
        templates={**templates, **{f"family/{name}": sentence for name, (sentence, _) in FAMILIES.items()}},
        words=Words(lists={"pairs": tuple(pairs)}),
        make=make,
        corruption="the words that decide the gap are those of another word of the same family: the answer flips",
        options={"form": form},
    )


def _word_pairs(tokenizers: Sequence[Any]) -> list[tuple[str, str, str]]:
    found = []
    for family, (sentence, cues) in FAMILIES.items():
        words = single_token(cues, tokenizers)
        for one, other in itertools.combinations(words, 2):
            # In place, for a word may be split otherwise elsewhere.
            texts = [sentence.format(x=_GAP, cue=cues[word]) for word in (one, other)]
            if all(len(tokens_of(t, texts[0])) == len(tokens_of(t, texts[1])) for t in tokenizers):
                found.append((family, one, other))
    return found
