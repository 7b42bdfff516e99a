"""Annotations are checked while the tests run, for a fraction of what jaxtyping's own hook costs.

That hook wraps every function and builds two checkers for it, again whenever a nested function is defined: a tiny
evaluation spent three quarters of its time there. Here shapes are jaxtyping's as before; annotations without shapes
are checked by beartype alone; a nested function shares the checkers of its first definition; and a function that is
never called gets none.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import threading
import types
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import beartype

__all__ = ["install"]

_WITH_SHAPES = functools.partial(jaxtyping.jaxtyped, typechecker=beartype)
_NESTED: dict[types.CodeType, Callable[..., Any]] = {}
"""Of a nested function's code: call(function, args, kwargs) with the checks of its annotations."""


def install(package: str) -> None:
    """Check the annotations of every module of the package that is imported from now on."""
    # The hook writes `@jaxtyping.jaxtyped(typechecker=...)` above every function and class.
    jaxtyping.jaxtyped = _decorate  # type: ignore[assignment]
    jaxtyping.install_import_hook(package, "beartype.beartype")


def _decorate(*, typechecker: object) -> Callable[[Any], Any]:
    return _checked


def _checked(target: Any) -> Any:
    """A function whose arguments and result are checked, or a dataclass whose fields are when it is made."""
    if isinstance(target, type):
        made = target.__dict__.get("__init__")
        if dataclasses.is_dataclass(target) and made is not None and not hasattr(made, "__wrapped__"):
            target.__init__ = _checked(made)  # type: ignore[misc]
        return target
    if not target.__annotations__:
        return target
    if "<locals>" in target.__qualname__:
        return _nested(target)
    return _lazy(target)


def _lazy(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checked from its first call on: then, every name in its annotations is defined."""
    check: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal check
        if check is None:
            check = (_WITH_SHAPES if _has_shapes(function) else beartype)(function)
        return check(*args, **kwargs)

    return call


def _nested(function: Callable[..., Any]) -> Callable[..., Any]:
    code = function.__code__
    if code not in _NESTED:
        _NESTED[code] = _shared(function)
    checked = _NESTED[code]

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return checked(function, args, kwargs)

    return call


def _shared(function: Callable[..., Any]) -> Callable[..., Any]:
    """The checks of all functions of one code; it holds none of them, nor what they close over."""
    current = threading.local()

    def run(*args: Any, **kwargs: Any) -> Any:
        # Read before anything else runs: a call inside this one sets it anew. Not kept: it may hold a model.
        function, current.function = current.function, None
        return function(*args, **kwargs)

    # In the globals of the function, where its annotations have a meaning.
    stand_in = types.FunctionType(run.__code__, function.__globals__, function.__name__, None, run.__closure__)
    stand_in.__module__, stand_in.__qualname__ = function.__module__, function.__qualname__
    stand_in.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    check = _WITH_SHAPES(stand_in)

    def call(one: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        current.function = one
        return check(*args, **kwargs)

    return call


def _has_shapes(function: Callable[..., Any]) -> bool:
    """Whether an annotation may be one of jaxtyping's: one that cannot be read may."""
    for annotation in function.__annotations__.values():
        if isinstance(annotation, str):
            try:
                annotation = eval(annotation, function.__globals__)
            except Exception:
                return True
        if _is_shape(annotation):
            return True
    return False


def _is_shape(annotation: Any) -> bool:
    if isinstance(annotation, str | typing.ForwardRef):
        return True
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    if typing.get_origin(annotation) is typing.Literal:
        return False
    parts = annotation if isinstance(annotation, list) else typing.get_args(annotation)
    return any(_is_shape(part) for part in parts)
