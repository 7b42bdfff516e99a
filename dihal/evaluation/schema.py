"""JSON data <-> frozen dataclasses, strictly: an unknown, missing or mistyped field is an error that names it."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from dihal.errors import UsageError

__all__ = ["from_data", "to_data"]


def to_data(value: Any) -> Any:
    """Return a dataclass (or list, dict, scalar) as plain JSON data."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_data(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_data(item) for item in value]
    return value


def from_data(kind: Any, data: Any, where: str) -> Any:
    """Return ``data`` as ``kind``: a dataclass, scalar, ``list[...]``, ``dict[str, ...]``, union, or ``Any``.

    Args:
        kind: the declared type.
        data: what JSON held.
        where: path of the field, for messages.

    Raises:
        UsageError: an unknown or missing field, or a value of another type.
    """
    origin = typing.get_origin(kind)
    if kind is Any:
        return data
    if origin in (types.UnionType, typing.Union):
        members = [member for member in typing.get_args(kind) if member is not types.NoneType]
        if data is None and len(members) < len(typing.get_args(kind)):
            return None
        if len(members) == 1:
            return from_data(members[0], data, where)
        raise AssertionError(f"unsupported union at {where}")
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, data, where)
    if origin is list:
        (item,) = typing.get_args(kind)
        _expect(isinstance(data, list), where, "a list", data)
        return [from_data(item, value, f"{where}[{index}]") for index, value in enumerate(data)]
    if origin is dict:
        _, item = typing.get_args(kind)
        _expect(isinstance(data, dict), where, "an object", data)
        return {key: from_data(item, value, f"{where}.{key}") for key, value in data.items()}
    if kind is float:
        _expect(isinstance(data, (int, float)) and not isinstance(data, bool), where, "a number", data)
        return float(data)
    if kind is int:
        _expect(isinstance(data, int) and not isinstance(data, bool), where, "a whole number", data)
        return data
    _expect(isinstance(data, kind), where, kind.__name__, data)
    return data


def _dataclass(kind: Any, data: Any, where: str) -> Any:
    _expect(isinstance(data, dict), where, "an object", data)
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    unknown = [name for name in data if name not in names]
    missing = [name for name in names if name not in data]
    if unknown or missing:
        parts = [f"unknown field {name!r}" for name in unknown] + [f"missing field {name!r}" for name in missing]
        raise UsageError(
            f"{where}: {', '.join(parts)}. Write the file again with `dihal evaluate`; it is not edited by hand."
        )
    return kind(**{name: from_data(hints[name], data[name], f"{where}.{name}") for name in names})


def _expect(valid: bool, where: str, wanted: str, data: Any) -> None:
    if not valid:
        shown = repr(data)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise UsageError(f"{where}: expected {wanted}, found {shown}. Write the file again with `dihal evaluate`.")
