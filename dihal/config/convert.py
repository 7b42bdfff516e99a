"""Configuration dataclasses <-> plain data, strictly."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from dihal.errors import UsageError, unknown_name
from dihal.io import hash_json

__all__ = ["config_hash", "flatten", "from_dict", "named_in", "to_dict"]

Config = TypeVar("Config")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON data; tuples become lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def config_hash(config: Any) -> str:
    """Hash of everything in a configuration; equal configurations, equal hash."""
    return hash_json(to_dict(config))


def from_dict(kind: type[Config], data: Any, where: str = "") -> Config:
    """Inverse of :func:`to_dict`. A field that is missing takes its default.

    Raises:
        UsageError: an unknown field (near match suggested) or a value of another type, naming where.
    """
    return _read(kind, data, where or kind.__name__)


def _read(kind: Any, data: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if data is None and types.NoneType in arguments:
            return None
        errors = []
        for option in arguments:
            if option is not types.NoneType:
                try:
                    return _read(option, data, where)
                except UsageError as error:
                    errors.append(error)
        raise errors[0]
    if dataclasses.is_dataclass(kind):
        if not isinstance(data, dict):
            raise _mistyped(where, "an object", data)
        hints = typing.get_type_hints(kind)
        names = [field.name for field in dataclasses.fields(kind)]
        for key in data:
            if key not in names:
                raise unknown_name(f"field of {where}", key, names)
        return kind(**{key: _read(hints[key], value, f"{where}.{key}") for key, value in data.items()})
    if origin is tuple:
        if not isinstance(data, (list, tuple)):
            raise _mistyped(where, "a list", data)
        items = arguments if Ellipsis not in arguments else (arguments[0],) * len(data)
        if len(items) != len(data):
            raise _mistyped(where, f"{len(items)} values", data)
        return tuple(_read(item, value, where) for item, value in zip(items, data))
    if origin is typing.Literal:
        if data not in arguments:
            raise unknown_name(where, data, [str(a) for a in arguments])
        return data
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if not isinstance(data, kind) or (isinstance(data, bool) and kind is not bool):
        raise _mistyped(where, kind.__name__, data)
    return data


def _mistyped(where: str, wanted: str, data: Any) -> UsageError:
    return UsageError(f"{where}: expected {wanted}, found {data!r}.")


def flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of every leaf of nested dicts."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flatten(item, f"{name}.{key}" if name else key)
    else:
        yield name, value


def named_in(name: str, entries: Sequence[str]) -> bool:
    """Whether a dotted name is one of the entries, or below one that ends with a dot."""
    return any(name == entry or (entry.endswith(".") and name.startswith(entry)) for entry in entries)
