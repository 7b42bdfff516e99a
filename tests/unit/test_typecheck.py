"""The checks of annotations that run under all other tests: what is wrong is refused, what is right is let through."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

from dihal.io import read_json
from dihal.random import normal
from tests.typecheck import install

pytestmark = pytest.mark.skipif(os.environ.get("DIHAL_NO_JAXTYPING") == "1", reason="they are turned off")

SOURCE = """
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from nowhere import Unknown

Rows = Float[Tensor, "rows dim"]
calls = 0


def plain(count: int, kind: Literal["a", "b"] = "a") -> str:
    return "x" * count if count < 3 else None


def shaped(left: Rows, right: list[Rows]) -> Float[Tensor, " dim"]:
    return left.sum(0) if len(left) < 5 else left


def unread(states: Rows, other: Unknown | None = None) -> Rows:
    return states


def adder(offset: float, inner: list) -> Callable:
    def add(states: Rows, depth: int = 0) -> Rows:
        if depth:
            return inner[0](states, depth - 1) + offset
        return states + offset

    return add


def numbers(count: int) -> Iterator[int]:
    yield from range(count)


@dataclass(frozen=True)
class Held:
    states: Rows
    width: int = 0

    @property
    def wrong(self) -> str:
        return self.width

    @classmethod
    def of(cls, states: Float[Tensor, "2 dim"]) -> Held:
        return cls(states)


class Plain:
    def __init__(self, count: int) -> None:
        self.count = count
"""


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    folder = tmp_path_factory.mktemp("checked")
    (folder / "checked_package.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        hooks = list(sys.meta_path)
        install("checked_package")
        try:
            return importlib.import_module("checked_package")
        finally:
            sys.meta_path[:] = hooks


SQUARE = torch.ones(3, 3)


def test_types(checked: ModuleType) -> None:
    assert checked.plain(2, kind="b") == "xx"
    for wrong in (lambda: checked.plain("2"), lambda: checked.plain(2, "c"), lambda: checked.plain(3)):
        with pytest.raises(BeartypeCallHintViolation):
            wrong()
    assert list(checked.numbers(3)) == [0, 1, 2]
    with pytest.raises(BeartypeCallHintViolation):
        list(checked.numbers(1.5))
    assert checked.Plain(1).count == 1
    with pytest.raises(BeartypeCallHintViolation):
        checked.Plain("1")


def test_shapes_of_one_call_agree(checked: ModuleType) -> None:
    assert checked.shaped(SQUARE, [SQUARE]).shape == (3,)
    for wrong in (
        lambda: checked.shaped(SQUARE, [torch.ones(3, 2)]),
        lambda: checked.shaped(SQUARE.long(), [SQUARE]),
        lambda: checked.shaped(torch.ones(6, 3), [torch.ones(6, 3)]),
        lambda: checked.unread(torch.ones(3)),
    ):
        with pytest.raises(TypeCheckError):
            wrong()
    assert checked.unread(SQUARE) is SQUARE


def test_fields_methods_and_properties(checked: ModuleType) -> None:
    assert checked.Held.of(SQUARE[:2]).width == 0
    for wrong in (
        lambda: checked.Held(torch.ones(3)),
        lambda: checked.Held(SQUARE, width="3"),
        lambda: checked.Held.of(SQUARE),
    ):
        with pytest.raises(TypeCheckError):
            wrong()
    with pytest.raises(BeartypeCallHintViolation):
        _ = checked.Held(SQUARE, width=3).wrong


def test_a_nested_function_is_checked_and_each_definition_is_its_own(checked: ModuleType) -> None:
    inner: list = []
    one, ten = checked.adder(1.0, inner), checked.adder(10.0, inner)
    inner.append(ten)
    assert one(SQUARE).mean() == 2
    assert ten(SQUARE).mean() == 11
    assert one(SQUARE, depth=1).mean() == 12, "one calls ten in its middle and goes on as itself"
    for function in (one, ten):
        with pytest.raises(TypeCheckError):
            function(torch.ones(3))
        assert function(SQUARE).shape == (3, 3)


def test_the_package_is_checked() -> None:
    assert normal(0, torch.arange(2), "x", (3,)).shape == (2, 3)
    with pytest.raises(TypeCheckError):
        normal(0, torch.arange(2).float(), "x", (3,))
    with pytest.raises(BeartypeCallHintViolation):
        read_json(3)
