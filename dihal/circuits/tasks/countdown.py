"""Countdown: reach a target from numbers by arithmetic; the operator must be planned from the target."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from dihal.circuits.tasks.base import Draw, Recipe, Words
from dihal.circuits.tasks.text import Prompt, next_tokens, tokens_of
from dihal.errors import UsageError

__all__ = ["OPERATORS", "TEMPLATES", "countdown", "solve"]

TEMPLATES = {
    "plain": "Use +-*/ on the numbers, in their order, to reach the last one.\n\n",
    "target": "Combine all numbers but the last with +, -, * or / so that the result is the last one.\n\n",
}
OPERATORS = ("+", "-", "*", "/")
_LARGEST_RESULT = 999


def _apply(a: int, b: int, operator: str) -> int | None:
    if operator == "/":
        return a // b if b and a % b == 0 else None
    return {"+": a + b, "-": a - b, "*": a * b}[operator]


def solve(numbers: Sequence[int], operators: Sequence[str]) -> tuple[int, str] | None:
    """Result and text of applying the operators from left to right; None where a step is not a positive integer."""
    total, steps = numbers[0], []
    for number, operator in zip(numbers[1:], operators, strict=True):
        result = _apply(total, number, operator)
        if result is None or not 0 < result <= _LARGEST_RESULT:
            return None
        steps.append(f"{total}{operator}{number}={result}")
        total = result
    return total, ",".join(steps)


@functools.lru_cache(maxsize=1 << 14)
def _solutions(numbers: tuple[int, ...]) -> dict[int, list[str]]:
    """Target -> texts of all its solutions in this order of the numbers."""
    found: dict[int, list[str]] = {}
    for operators in itertools.product(OPERATORS, repeat=len(numbers) - 1):
        solved = solve(numbers, operators)
        if solved is not None:
            found.setdefault(solved[0], []).append(solved[1])
    return found


def _shape(text: str) -> str:
    """The text with every digit and every operator made alike: equal shapes are equally long digit by digit."""
    return "".join("0" if c.isdigit() else "+" if c in OPERATORS else c for c in text)


_Problem = tuple[tuple[int, ...], int, str]
"""Numbers, target, solution."""


def _other_targets(problem: _Problem) -> Iterator[_Problem]:
    numbers, target, solution = problem
    for other, solutions in _solutions(numbers).items():
        if other != target and len(solutions) == 1 and _shape(solutions[0]) == _shape(solution):
            yield numbers, other, solutions[0]


def _other_operands(problem: _Problem, place: int, largest: int) -> Iterator[_Problem]:
    numbers, target, solution = problem
    for value in range(1, largest + 1):
        changed = (*numbers[:place], value, *numbers[place + 1 :])
        solutions = _solutions(changed).get(target, [])
        if value != numbers[place] and len(solutions) == 1 and _shape(solutions[0]) == _shape(solution):
            yield changed, target, solutions[0]


def countdown(
    tokenizers: Sequence[Any],
    *,
    operands: int = 2,
    largest: int = 20,
    shots: int = 6,
    corruption: str = "target",
    read: str = "operators",
) -> Recipe:
    """The recipe. Answers are the tokens of the clean solution, foils those of the corrupted problem's.

    Both problems have one solution in the given order of the numbers, and the two solutions are equally long digit
    by digit. Answer tokens are teacher-forced: every target sees the clean solution up to it, in both runs.

    Args:
        tokenizers: all in which both solutions have equally many tokens.
        operands: numbers besides the target, 2 to 4.
        largest: largest operand.
        shots: solved examples before the problem.
        corruption: `target`: another target; `operand`: another number in one place, same target.
        read: `operators`: only the operators, where the plan is decided (what follows is arithmetic or copying);
            `all`: every token in which the two solutions differ.

    Raises:
        UsageError: an option out of range.
    """
    if not 2 <= operands <= 4 or largest < 4 or not 0 <= shots <= 8:
        raise UsageError(
            f"countdown takes 2 to 4 operands, a largest of at least 4 and 0 to 8 shots; got operands={operands}, "
            f"largest={largest}, shots={shots}."
        )
    if corruption not in ("target", "operand"):
        raise UsageError(f"countdown knows no corruption {corruption!r}. Choose target or operand.")
    if read not in ("operators", "all"):
        raise UsageError(f"countdown can read operators or all, not {read!r}.")

    def problem(draw: Draw) -> _Problem | None:
        numbers = tuple(1 + draw.index(largest) for _ in range(operands))
        found = _solutions(numbers)
        targets = sorted(target for target, solutions in found.items() if len(solutions) == 1)
        chosen = draw.pick(targets) if targets else None
        return None if chosen is None else (numbers, chosen, found[chosen][0])

    def make(draw: Draw) -> Prompt | None:
        template = draw.pick(sorted(TEMPLATES))
        examples = [problem(draw) for _ in range(shots)]
        drawn = problem(draw)
        if drawn is None or any(example is None for example in examples):
            return None
        numbers, target, solution = drawn
        place = draw.index(operands)
        others = list(_other_targets(drawn) if corruption == "target" else _other_operands(drawn, place, largest))
        others = [other for other in others if read == "all" or _operators(other[2]) != _operators(solution)]
        if not others:
            return None
        other = draw.pick(others)
        shown = "".join(_asked(*example[:2]) + example[2] + "\n\n" for example in examples if example is not None)
        before = TEMPLATES[template] + shown
        return Prompt(
            clean=before + _asked(numbers, target),
            corrupted=before + _asked(other[0], other[1]),
            solution=solution,
            foil_solution=other[2],
            read="".join(OPERATORS) if read == "operators" else "",
            template=template,
            key=tuple(map(str, sorted(numbers))),
            meta={"numbers": list(numbers), "target": target, "solution": solution},
        )

    def check(prompt: Prompt, tokenizers: Sequence[Any]) -> bool:
        for tokenizer in tokenizers:
            right = next_tokens(tokenizer, prompt.clean, prompt.solution or "")
            wrong = next_tokens(tokenizer, prompt.corrupted, prompt.foil_solution or "")
            lengths = [len(tokens_of(tokenizer, text)) for text in (prompt.clean, prompt.corrupted)]
            if right is None or wrong is None or len(right) != len(wrong) or lengths[0] != lengths[1]:
                return False
        return True

    said = {
        "target": "another target that one other choice of operators reaches",
        "operand": "another number in one place, with which other operators reach the same target",
    }
    return Recipe(
        name="countdown",
        templates=TEMPLATES,
        words=Words(lists={"operators": OPERATORS}),
        make=make,
        corruption=said[corruption],
        options={
            "operands": operands,
            "largest": largest,
            "shots": shots,
            "corruption": corruption,
            "read": read,
        },
        check=check,
    )


def _operators(solution: str) -> str:
    return "".join(c for c in solution if c in OPERATORS)


def _asked(numbers: Sequence[int], target: int) -> str:
    # No space after the colon: a tokenizer would join it with the solution.
    return f"Input: {','.join(map(str, [*numbers, target]))}\nOutput:"
