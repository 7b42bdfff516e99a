"""Tasks: pairs of prompts that differ in what decides the answer.

A task is a recipe (`ioi.py`, ...) and everything that is the same for all of them (`base.py`): drawing by a counter,
the two splits, token ids, the way a model looks at a pair (`view.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from dihal.circuits.tasks.base import Recipe, Task
from dihal.circuits.tasks.countdown import countdown
from dihal.circuits.tasks.greater_than import greater_than
from dihal.circuits.tasks.induction import induction
from dihal.circuits.tasks.infill import infill
from dihal.circuits.tasks.ioi import ioi
from dihal.circuits.tasks.listed import listed
from dihal.circuits.tasks.selection import jointly_solved, reveal_orders
from dihal.circuits.tasks.view import View, require_aligned
from dihal.errors import UsageError, unknown_name

__all__ = ["TASKS", "Recipe", "Task", "View", "build_task", "jointly_solved", "require_aligned", "reveal_orders"]

TASKS: dict[str, Callable[..., Recipe]] = {
    "ioi": ioi,
    "greater_than": greater_than,
    "countdown": countdown,
    "infill": infill,
    "induction": induction,
}
"""Task name -> function of tokenizers and options that makes its recipe."""


def build_task(
    name: str, tokenizers: Sequence[Any], *, view: View | None = None, batch_size: int = 8, **options: Any
) -> Task:
    """A task for the first of the tokenizers; `Task.for_model` turns it to the others.

    Args:
        name: a key of `TASKS`, or a `.jsonl` file of one's own pairs (`listed`).
        tokenizers: those of all models to be compared: answers are one token and pairs equally long in each.
        view: how the model looks at a pair; None: causal.
        batch_size: prompts per batch (memory, not results).
        options: of the recipe, e.g. `corruption`.

    Raises:
        UsageError: an unknown task or option, or tokenizers the task does not fit.
    """
    if not tokenizers:
        raise UsageError("a task needs at least one tokenizer: the model's own.")
    if name.endswith(".jsonl"):
        options, recipe = {**options, "path": name}, listed
    elif name in TASKS:
        recipe = TASKS[name]
    else:
        raise unknown_name("task", name, TASKS, hint="A file of one's own pairs ends in .jsonl.")
    known = list(inspect.signature(recipe).parameters)[1:]
    for option in options:
        if option not in known:
            raise unknown_name(f"option of {name}", option, known)
    made = recipe(tuple(tokenizers), **options)
    return Task(recipe=made, tokenizers=tuple(tokenizers), view=View() if view is None else view, batch_size=batch_size)
