"""Pairs of one's own: a file with one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dihal.circuits.tasks.base import Draw, Recipe, Words
from dihal.circuits.tasks.text import Prompt, encode
from dihal.errors import UsageError
from dihal.io import hash_json

__all__ = ["listed"]

_FIELDS = ("clean", "corrupted", "answers", "foils", "solution", "foil_solution", "after", "corrupted_after")


def listed(tokenizers: Sequence[Any], *, path: str) -> Recipe:
    """The recipe of a `.jsonl` file: each line has `clean`, `corrupted`, and `answers` and `foils` (lists of words with
    their leading space) or `solution` and `foil_solution` (texts of several tokens); optionally `key` (a list of
    words that discovery and test must not share).

    Raises:
        UsageError: the file cannot be read, a line is not such an object, or a pair does not fit a tokenizer.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"cannot read the task file {path!r}: {error.strerror or error}. Check the path.") from error
    prompts = [_prompt(line, f"{path}, line {i}") for i, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise UsageError(f"the task file {path!r} has no lines. Write one JSON object per pair.")
    for prompt in prompts:
        for tokenizer in tokenizers:
            encode(prompt, tokenizer)  # every pair is refused or accepted before any model runs

    def make(draw: Draw) -> Prompt:
        return draw.pick(prompts)

    name = Path(path).stem
    return Recipe(
        name=name,
        templates={"file": hash_json(lines)},
        words=Words(lists={"pairs": tuple(range(len(prompts)))}),
        make=make,
        corruption="as in the file",
    )


def _prompt(line: str, where: str) -> Prompt:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where} is not JSON: {error}.") from error
    unknown = set(data) - {*_FIELDS, "template", "key", "meta"} if isinstance(data, dict) else {"(not an object)"}
    if unknown or "clean" not in data or "corrupted" not in data:
        raise UsageError(
            f"{where} must be an object with clean and corrupted, and answers and foils or solution and foil_solution"
            + (f"; unknown: {', '.join(sorted(unknown))}." if unknown else ".")
        )
    values = {name: data[name] for name in _FIELDS if name in data}
    for name in ("answers", "foils"):
        if isinstance(values.get(name), str):
            raise UsageError(f"{where}: {name} must be a list of words, each with its leading space.")
        values[name] = tuple(values.get(name, ()))
    key = tuple(map(str, data.get("key", (data["clean"],))))
    return Prompt(**values, template=str(data.get("template", "")), key=key, meta=dict(data.get("meta", {})))
