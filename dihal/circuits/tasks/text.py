"""From text to token ids: one pair of prompts, checked in the tokenizer that will read it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dihal.errors import UsageError

__all__ = ["Encoded", "Prompt", "encode", "next_tokens", "shared_words", "single_token", "tokens_of"]

_CARRIER = "The word is"
_Choices = tuple[tuple[int, ...], ...]
# What `shared_words` takes from a vocabulary: lower-case English-looking words after a space.
_PLAIN = re.compile(r"[a-z]{3,8}")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A pair of texts that differ in what decides the answer, and the words that count as right and wrong."""

    clean: str
    corrupted: str
    answers: tuple[str, ...] = ()
    """Continuations of `clean` (with their leading space) that are right; none where `solution` is given."""
    foils: tuple[str, ...] = ()
    """Continuations that are wrong in the clean run, most often the right ones of the corrupted run."""
    solution: str | None = None
    """Text of several tokens that follows `clean`; its tokens are the answers where they differ from `foil_solution`'s."""
    foil_solution: str | None = None
    """The same for `corrupted`; equally many tokens."""
    read: str = ""
    """Characters: of a solution, only tokens made of them are read; empty: all that differ."""
    after: str = ""
    """Text after the answer, which only a model that attends in both directions sees."""
    corrupted_after: str | None = None
    """The same in the corrupted run; None: no other."""
    template: str = ""
    """Name of the template."""
    key: tuple[str, ...] = ()
    """What was filled in, in a fixed order: template and key together are never shared by the two splits."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Anything worth keeping beside the scores."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A pair as token ids; the tokens of the answer are those of the clean run in both."""

    clean: tuple[int, ...]
    corrupted: tuple[int, ...]
    slot: tuple[int, ...]
    """Positions of the answer's tokens, ascending."""
    answers: tuple[tuple[int, ...], ...]
    """Right ids for each position of the slot."""
    foils: tuple[tuple[int, ...], ...]
    """Wrong ids; empty where right and wrong agree, and the position is then not read."""
    meta: dict[str, Any] = field(default_factory=dict)


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text as the tokenizer makes them at the start of a sequence, without an end token."""
    ids = list(tokenizer(text).input_ids)
    end = getattr(tokenizer, "eos_token_id", None)
    return ids[:-1] if end is not None and len(ids) > 1 and ids[-1] == end else ids


def next_tokens(tokenizer: Any, before: str, text: str) -> list[int] | None:
    """Ids that `text` adds after `before`; None where the tokenizer joins the two."""
    start, whole = tokens_of(tokenizer, before), tokens_of(tokenizer, before + text)
    return whole[len(start) :] if whole[: len(start)] == start else None


def single_token(words: Iterable[str], tokenizers: Sequence[Any]) -> list[str]:
    """Those words that are one token after a space in every tokenizer, in their order."""

    def fits(word: str, tokenizer: Any) -> bool:
        found = next_tokens(tokenizer, _CARRIER, f" {word}")
        return found is not None and len(found) == 1 and found[0] != getattr(tokenizer, "unk_token_id", None)

    return [word for word in words if all(fits(word, tokenizer) for tokenizer in tokenizers)]


def shared_words(tokenizers: Sequence[Any], limit: int) -> list[str]:
    """Plain words of the first tokenizer's vocabulary that are one token in all, alphabetical, evenly thinned to `limit`."""
    vocabulary = sorted({token.lstrip("Ġ▁ ") for token in tokenizers[0].get_vocab()})
    words = [word for word in vocabulary if _PLAIN.fullmatch(word)]
    # Most of a vocabulary passes: check a few times as many as are wanted rather than all.
    thinned = words[:: max(1, len(words) // (4 * limit))]
    found = single_token(thinned, tokenizers)
    return found[:: max(1, len(found) // limit)][:limit]


def _one_token(tokenizer: Any, before: str, word: str) -> int:
    found = next_tokens(tokenizer, before, word)
    if found is None or len(found) != 1:
        count = "merged with the prompt" if found is None else f"{len(found)} tokens"
        raise UsageError(
            f"the answer {word!r} is {count} after {before[-40:]!r} in this tokenizer; answers and foils must be one "
            "token. Choose another word, or leave out the tokenizer."
        )
    return found[0]


def encode(prompt: Prompt, tokenizer: Any) -> Encoded:
    """Token ids of a pair.

    Raises:
        UsageError: the texts have unequal token lengths, an answer is not one token, or nothing would be read.
    """
    clean, corrupted = tokens_of(tokenizer, prompt.clean), tokens_of(tokenizer, prompt.corrupted)
    if len(clean) != len(corrupted):
        raise UsageError(
            f"clean and corrupted prompt have {len(clean)} and {len(corrupted)} tokens: {prompt.clean!r} and "
            f"{prompt.corrupted!r}. A pair must be equally long; exchange words of equal token length."
        )
    if prompt.solution is None:
        if not prompt.answers or not prompt.foils or set(prompt.answers) & set(prompt.foils):
            raise UsageError(
                f"the prompt {prompt.clean!r} needs answers and foils that are not the same: answers "
                f"{list(prompt.answers)}, foils {list(prompt.foils)}."
            )
        answers = (tuple(_one_token(tokenizer, prompt.clean, word) for word in prompt.answers),)
        foils = (tuple(_one_token(tokenizer, prompt.clean, word) for word in prompt.foils),)
        slot = [answers[0][0]]
    else:
        slot, answers, foils = _solution(prompt, tokenizer)
    tail = _after(prompt, prompt.after, tokenizer)
    other = tail if prompt.corrupted_after is None else _after(prompt, prompt.corrupted_after, tokenizer)
    if len(tail) != len(other):
        raise UsageError(
            f"the texts after the answer have {len(tail)} and {len(other)} tokens: {prompt.after!r} and "
            f"{prompt.corrupted_after!r}. A pair must be equally long; exchange words of equal token length."
        )
    return Encoded(
        clean=(*clean, *slot, *tail),
        corrupted=(*corrupted, *slot, *other),
        slot=tuple(range(len(clean), len(clean) + len(slot))),
        answers=answers,
        foils=foils,
        meta={**prompt.meta, "template": prompt.template},
    )


def _solution(prompt: Prompt, tokenizer: Any) -> tuple[list[int], _Choices, _Choices]:
    assert prompt.solution is not None
    right = next_tokens(tokenizer, prompt.clean, prompt.solution)
    wrong = next_tokens(tokenizer, prompt.corrupted, prompt.foil_solution or "")
    if right is None or wrong is None or len(right) != len(wrong):
        raise UsageError(
            f"the solutions {prompt.solution!r} and {prompt.foil_solution!r} must have equally many tokens of their own."
        )
    read = [a != b and _among(tokenizer, a, prompt.read) for a, b in zip(right, wrong, strict=True)]
    if not any(read):
        raise UsageError(
            f"the solutions {prompt.solution!r} and {prompt.foil_solution!r} differ in no token that is read: nothing to read."
        )
    foils = tuple((b,) if wanted else () for b, wanted in zip(wrong, read, strict=True))
    return right, tuple((a,) for a in right), foils


def _among(tokenizer: Any, token: int, characters: str) -> bool:
    return not characters or set(tokenizer.decode([token]).strip()) <= set(characters)


def _after(prompt: Prompt, after: str, tokenizer: Any) -> list[int]:
    if not after:
        return []
    word = prompt.solution if prompt.solution is not None else prompt.answers[0]
    tail = next_tokens(tokenizer, prompt.clean + word, after)
    if tail is None:
        raise UsageError(f"the text {after!r} after the answer {word!r} joins it in this tokenizer.")
    return tail
