"""A task: pairs of prompts drawn by a counter, so that the same ids always are the same pairs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from dihal.circuits.tasks.text import Encoded, Prompt, encode
from dihal.circuits.tasks.view import Row, View, look, require_aligned, stack
from dihal.circuits.types import Attention, PairBatch
from dihal.errors import UsageError
from dihal.io import hash_json
from dihal.random import uniform

__all__ = ["Draw", "Recipe", "Task", "Words"]

Split = Literal["discovery", "test"]
SPLITS: tuple[Split, ...] = ("discovery", "test")
_DRAWS = 64
"""Uniform numbers a candidate may use."""
_CHUNK = 256
_TEST = 1 << 40
"""First id of a test pair: ids of the two splits never meet."""
_PATIENCE = 20
"""Candidates in a row without a new pair after which a split counts as used up (times its size so far, at least ten)."""


class Draw:
    """The uniform numbers of one candidate, used up in order."""

    def __init__(self, values: Sequence[float]) -> None:
        self._values = iter(values)

    def index(self, count: int) -> int:
        """A number in 0 .. count-1."""
        return min(int(next(self._values) * count), count - 1)

    def pick(self, options: Sequence[Any]) -> Any:
        """One of the options."""
        return options[self.index(len(options))]

    def some(self, options: Sequence[Any], count: int) -> list[Any]:
        """Different ones of the options, in random order."""
        left = list(options)
        return [left.pop(self.index(len(left))) for _ in range(count)]


@dataclass(frozen=True, kw_only=True)
class Words:
    """What a recipe may fill in, checked in every tokenizer."""

    lists: Mapping[str, tuple[Any, ...]]
    """Name of a list -> its entries."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a task makes a pair out of random numbers; all that tells one task from another."""

    name: str
    templates: Mapping[str, str]
    """Name of a template -> the template: what the provenance hashes."""
    words: Words
    make: Callable[[Draw], Prompt | None]
    """A pair, or None where the numbers make none (they are then skipped)."""
    corruption: str
    """In words: what differs between the two prompts."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The options it was built with."""
    check: Callable[[Prompt, Sequence[Any]], bool] | None = None
    """Whether a pair fits all tokenizers; None: every pair of the recipe must, and one that does not is an error."""


def _split_of(prompt: Prompt) -> Split:
    # A property of template and words alone, not of a seed: no two runs can share a pair across the splits.
    return SPLITS[int(hash_json([prompt.template, *prompt.key]), 16) % 2]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Pairs of prompts for one model. Made by `build_task`; `for_model` turns it to another model."""

    recipe: Recipe
    tokenizers: tuple[Any, ...]
    """All in which answers are one token and pairs equally long."""
    model: int = 0
    """Which of them makes the ids."""
    view: View = field(default_factory=View)
    batch_size: int = 8
    """Lines per batch (memory, not results)."""
    subset: Mapping[str, tuple[int, ...]] | None = None
    """Split -> ids that may be used, in order; None: all."""
    pools: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Split -> what these ids were selected from: `pairs` tried, `solved` by each model, `together` by all."""
    orders: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Sample id -> reveal order of its answer's tokens; others are revealed left to right."""

    @property
    def name(self) -> str:
        """Name of the task."""
        return self.recipe.name

    @property
    def attention(self) -> Attention:
        """`causal` or `full`."""
        return self.view.attention

    def for_model(self, model: int = 0, view: View | None = None) -> Task:
        """The same pairs under the same ids for another of the tokenizers, or another way to look at them."""
        return dataclasses.replace(self, model=model, view=self.view if view is None else view)

    def restricted(
        self, ids: Mapping[str, Sequence[int]], pools: Mapping[str, Mapping[str, Any]] | None = None
    ) -> Task:
        """Only the pairs with these ids, per split, and what they were selected from."""
        return dataclasses.replace(
            self, subset={split: tuple(found) for split, found in ids.items()}, pools=dict(pools or {})
        )

    def revealing(self, orders: Mapping[int, Sequence[int]]) -> Task:
        """The same pairs with these reveal orders (of a clean run, shared by the corrupted one and by other models)."""
        return dataclasses.replace(self, orders={sample: tuple(order) for sample, order in orders.items()})

    def prompts(self, n: int, *, seed: int = 0, split: Split = "discovery") -> dict[int, Prompt]:
        """The first `n` pairs of a split as texts, by id. More are the same ones and then others.

        Raises:
            UsageError: an unknown split, or fewer than `n` different pairs exist.
        """
        if split not in SPLITS:
            raise UsageError(f"split is {split!r}; choose discovery or test.")
        if n < 1:
            raise UsageError(f"{n} pairs were asked for; ask for at least one.")
        if self.subset is None:
            return dict(self._first(n, seed, split))
        wanted = self.subset.get(split, ())[:n]
        if len(wanted) < n:
            raise UsageError(
                f"{len(wanted)} {split} pairs of {self.name!r} are left after the selection, {n} were asked for. "
                "Ask for fewer, or select from a larger pool."
            )
        pool = dict(self._first(max(wanted) % _TEST + 1, seed, split))
        return {sample: pool[sample] for sample in wanted}

    def _first(self, n: int, seed: int, split: Split) -> Iterator[tuple[int, Prompt]]:
        seen: set[str] = set()
        since = 0
        for prompt in self._candidates(seed):
            text = "\0".join(
                map(str, (prompt.clean, prompt.corrupted, prompt.answers, prompt.after, prompt.corrupted_after))
            )
            if text in seen or _split_of(prompt) != split or not self._fits(prompt):
                since += 1
                if since > _PATIENCE * max(10, len(seen)):
                    raise UsageError(
                        f"{self.name!r} has about {len(seen)} different {split} pairs in these tokenizers, {n} were "
                        "asked for. Ask for fewer."
                    )
                continue
            since = 0
            yield len(seen) + _TEST * SPLITS.index(split), prompt
            seen.add(text)
            if len(seen) == n:
                return

    def _candidates(self, seed: int) -> Iterator[Prompt]:
        start, purpose = 0, f"circuits-{self.name}"
        empty = 0
        while True:
            numbers = uniform(seed, torch.arange(start, start + _CHUNK), purpose, (_DRAWS,), dtype=torch.float64)
            for row in numbers.tolist():
                prompt = self.recipe.make(Draw(row))
                empty = 0 if prompt is not None else empty + 1
                if prompt is not None:
                    yield prompt
                elif empty > 1_000 * _PATIENCE:
                    raise UsageError(f"{self.name!r} makes no pair with these options: {dict(self.recipe.options)}.")
            start += _CHUNK

    def _fits(self, prompt: Prompt) -> bool:
        check = self.recipe.check
        return check is None or check(prompt, self.tokenizers)

    def encoded(self, n: int, *, seed: int = 0, split: Split = "discovery") -> dict[int, Encoded]:
        """The same pairs as token ids of this task's model.

        Raises:
            UsageError: as `prompts`, and for a pair that is not equally long or whose answer is not one token, in
                any of the tokenizers.
        """
        found = {}
        for sample, prompt in self.prompts(n, seed=seed, split=split).items():
            each = [encode(prompt, tokenizer) for tokenizer in self.tokenizers]
            found[sample] = each[self.model]
        return found

    def rows(self, n: int, *, seed: int = 0, split: Split = "discovery") -> list[Row]:
        """What the model is shown of the first `n` pairs: one line per pair and looked-at state."""
        pairs = self.encoded(n, seed=seed, split=split)
        looks = (look(pair, sample, self.view, self.orders.get(sample)) for sample, pair in pairs.items())
        return [row for rows in looks for row in rows]

    def pairs(self, n: int, *, seed: int = 0, split: Split = "discovery") -> list[PairBatch]:
        """Batches of equally long lines: shortest first, within a length by id.

        Raises:
            UsageError: as `encoded`, and for prompts that are not aligned (`require_aligned`).
        """
        groups: dict[int, list[Row]] = {}
        for row in self.rows(n, seed=seed, split=split):
            groups.setdefault(len(row.clean), []).append(row)
        batches = []
        for length in sorted(groups):
            rows = groups[length]
            for start in range(0, len(rows), self.batch_size):
                batch = stack(rows[start : start + self.batch_size], self.attention)
                require_aligned(batch, self.view.mask_id)
                batches.append(batch)
        return batches

    @functools.cached_property
    def template_hash(self) -> str:
        """Hash of templates, words and corruption: two runs with the same one drew from the same pairs."""
        recipe = self.recipe
        return hash_json(
            {
                "task": recipe.name,
                "templates": dict(recipe.templates),
                "words": {name: list(entries) for name, entries in recipe.words.lists.items()},
                "corruption": recipe.corruption,
                "options": dict(recipe.options),
            }
        )

    def provenance(self) -> dict[str, Any]:
        """Everything that decides the pairs, as plain JSON data."""
        recipe = self.recipe
        return {
            "task": recipe.name,
            "template_hash": self.template_hash,
            "templates": dict(recipe.templates),
            "words": {name: len(entries) for name, entries in recipe.words.lists.items()},
            "corruption": recipe.corruption,
            "options": dict(recipe.options),
            "split_rule": "hash of template and filled-in words; discovery and test never share such a combination",
            "view": dataclasses.asdict(self.view),
            "tokenizers": len(self.tokenizers),
            "selected": None if self.subset is None else {split: len(ids) for split, ids in self.subset.items()},
            "selected_from": {split: dict(pool) for split, pool in self.pools.items()},
        }
