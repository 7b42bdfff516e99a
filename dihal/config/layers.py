"""Layers of configuration: YAML files and command-line words as one flat table of dotted keys.

Later layers win key by key. A file given for a group (`method: ../method/bridge.yaml`) takes the place of an
earlier file for that group; keys that were given one by one stay unless the new file gives them.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dihal.errors import UsageError

__all__ = ["Entry", "Field", "Layers", "fields_of", "unknown_key"]


@dataclass(frozen=True)
class Field:
    """A field of a configuration, nested ones included."""

    type: Any
    """Declared type, without `None`."""
    optional: bool
    """Whether `None` is allowed."""

    @property
    def is_group(self) -> bool:
        """Whether it is a configuration of its own."""
        return dataclasses.is_dataclass(self.type)

    @property
    def is_list(self) -> bool:
        """Whether it takes several values."""
        return typing.get_origin(self.type) is tuple


@dataclass(frozen=True)
class Entry:
    """A value that was given, and where."""

    value: Any
    where: str
    owner: str | None
    """The group whose file it came from; None: given as a key of its own."""


def fields_of(kind: type, prefix: str = "") -> dict[str, Field]:
    """Return dotted key -> field, groups before their members, in declared order."""
    found: dict[str, Field] = {}
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint, optional = hints[field.name], False
        if typing.get_origin(hint) in (typing.Union, types.UnionType) and types.NoneType in typing.get_args(hint):
            optional = True
            hint = typing.Union[tuple(a for a in typing.get_args(hint) if a is not types.NoneType)]  # noqa: UP007
        key = f"{prefix}{field.name}"
        found[key] = Field(hint, optional)
        if dataclasses.is_dataclass(hint):
            found |= fields_of(hint, f"{key}.")
    return found


def unknown_key(key: str, fields: dict[str, Field], where: str) -> UsageError:
    """Return the error for a key that is not there: near match over all keys, then the keys beside it."""
    names = list(fields)
    near = difflib.get_close_matches(key, names, n=1)
    # `lr` is close to no dotted key as a whole, but it is the end of one.
    last = [name for name in names if name.rpartition(".")[2] == key.rpartition(".")[2]]
    guess = (last or near)[:1] if key.rpartition(".")[0] not in fields else (near or last)[:1]
    suggestion = f" Did you mean {guess[0]!r}?" if guess else ""
    group = key.rpartition(".")[0]
    while group and group not in fields:
        group = group.rpartition(".")[0]
    beside = [name for name in names if name.rpartition(".")[0] == group]
    place = f"Keys of {group!r}" if group else "Keys"
    return UsageError(f"unknown key {key!r} ({where}).{suggestion} {place}: {', '.join(beside)}.")


class Layers:
    """The table; files and words are added in order of rising priority."""

    def __init__(self, kind: type) -> None:
        self.fields = fields_of(kind)
        self.entries: dict[str, Entry] = {}

    def nested(self) -> dict[str, Any]:
        """The values given, as nested plain data."""
        root: dict[str, Any] = {}
        for key, entry in self.entries.items():
            *groups, name = key.split(".")
            place = root
            for group in groups:
                place = place.setdefault(group, {})
            place[name] = entry.value
        return root

    # -- files

    def add_file(self, path: str | Path, where: str, *, group: str = "") -> None:
        """Add a YAML file; with `group` it holds the keys of that group.

        Raises:
            UsageError: no such file, not YAML, an unknown key, or a group that is neither mapping nor file.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            kind = "a folder, not a configuration file" if path.is_dir() else "no such configuration file"
            near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
            guess = f" Did you mean {str(path.parent / near[0])!r}?" if near else ""
            raise UsageError(f"{str(path)!r} ({where}): {kind}.{guess}")
        try:
            loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
            node = loader.get_single_node()
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            raise UsageError(_yaml_message(path, error)) from error
        if group:
            self._clear(group)
        if node is None:
            return
        if not isinstance(node, yaml.MappingNode):
            raise UsageError(f"{str(path)!r} must hold `key: value` lines, not {_kind(node)}.")
        self._add_mapping(loader, node, f"{group}." if group else "", path, group or None)

    def _clear(self, group: str) -> None:
        def from_file(entry: Entry) -> bool:
            return entry.owner is not None and f"{entry.owner}.".startswith(f"{group}.")

        self.entries = {key: entry for key, entry in self.entries.items() if not from_file(entry)}

    def _add_mapping(self, loader: Any, node: Any, prefix: str, path: Path, owner: str | None) -> None:
        loader.flatten_mapping(node)  # resolves YAML's `<<` merges
        seen = set()
        for key_node, value_node in node.value:
            where = f"{path}, line {key_node.start_mark.line + 1}"
            key = f"{prefix}{loader.construct_object(key_node, deep=True)}"
            field = self.fields.get(key)
            if field is None:
                raise unknown_key(key, self.fields, where)
            if key in seen:
                raise UsageError(f"{key!r} is given twice in {str(path)!r} (line {key_node.start_mark.line + 1}).")
            seen.add(key)
            if field.is_group and isinstance(value_node, yaml.MappingNode):
                self._add_mapping(loader, value_node, f"{key}.", path, owner)
                continue
            try:
                value = loader.construct_object(value_node, deep=True)
            except (yaml.YAMLError, ValueError) as error:
                raise UsageError(_yaml_message(path, error)) from error
            if field.is_group and isinstance(value, str):
                self.add_file(path.parent / Path(value).expanduser(), where, group=key)
            else:
                self.set(key, value, where, owner)

    def set(self, key: str, value: Any, where: str, owner: str | None = None) -> None:
        """Set one known key.

        Raises:
            UsageError: the key is a group and the value is not None where None is allowed.
        """
        field = self.fields[key]
        if field.is_group and not (value is None and field.optional):
            raise UsageError(f"{key}: expected keys of its own or a YAML file, found {value!r} ({where}).")
        if field.type is int:
            value = _whole(value)
        elif field.type is float:
            value = _number(value)
        # A group set to null has no members, and a member given makes a group that is not null.
        inside, above = f"{key}.", {key[:i] for i, letter in enumerate(key) if letter == "."}
        self.entries = {k: e for k, e in self.entries.items() if not k.startswith(inside) and k not in above}
        self.entries[key] = Entry(value, where, owner)

    # -- command line

    def add_words(self, argv: Sequence[str]) -> set[str]:
        """Add command-line words: `--key VALUE`, `--key=VALUE`, `key=VALUE`; returns the flags among them.

        `--config` files come first in their order, whatever their place; then groups and keys in order. A yes/no
        key needs no value; a key that takes several values takes the following words, or one with commas.

        Raises:
            UsageError: anything that cannot be understood.
        """
        flags: set[str] = set()
        given = []
        for name, values in self._options(list(argv)):
            if name == "config":
                self.add_file(values[0], "--config")
            elif name in _FLAGS:
                flags.add(name)
            else:
                given.append((name, values))
        for name, values in given:
            self._add_option(name, values)
        return flags

    def _options(self, words: list[str]) -> Iterator[tuple[str, list[str]]]:
        while words:
            word = words.pop(0)
            dashed = word.startswith("--")
            name, equals, value = word.removeprefix("--").partition("=")
            # `--dry-run` is `dry_run`; no key has a dash.
            name = name.replace("-", "_")
            if not dashed and not (equals and re.fullmatch(r"[A-Za-z_][\w.]*", name)):
                raise UsageError(f"cannot understand {word!r}: options are --key VALUE, --key=VALUE or key=VALUE.")
            if name in _FLAGS and not equals:
                yield name, []
                continue
            if name != "config" and name not in self.fields:
                raise unknown_key(name, self.fields, "command line")
            field = self.fields.get(name)
            if equals:
                yield name, [value]
            elif field is not None and field.type is bool:
                explicit = bool(words) and words[0].lower() in _BOOLEAN
                yield name, [words.pop(0) if explicit else "true"]
            elif not words or words[0].startswith("--"):
                raise UsageError(f"--{name} needs a value: --{name} VALUE.")
            else:
                values = [words.pop(0)]
                while field is not None and field.is_list and words and not self._is_option(words[0]):
                    values.append(words.pop(0))
                yield name, values

    def _is_option(self, word: str) -> bool:
        name, equals, _ = word.partition("=")
        return word.startswith("--") or bool(equals and name.replace("-", "_") in {*self.fields, "config"})

    def _add_option(self, key: str, values: list[str]) -> None:
        field, where = self.fields[key], "command line"
        value: Any = values[0]
        if field.optional and value in ("null", "None"):
            self.set(key, None, where)
        elif field.is_group:
            self.add_file(value, f"--{key}", group=key)
        elif field.is_list:
            self.set(key, _several(key, values), where)
        else:
            self.set(key, value, where)


_FLAGS = ("print_config",)
_BOOLEAN = ("true", "false", "yes", "no")


def _whole(value: Any) -> Any:
    """1e6 and 3.0 are whole numbers, whatever YAML makes of them; anything else is returned as it is."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+\.?\d*([eE]\+?\d+)?", value.strip()):
        value = float(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _number(value: Any) -> Any:
    """YAML takes `3e-4` and `inf` for text; anything that is no number is returned as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _several(key: str, values: list[str]) -> list[Any]:
    if len(values) == 1 and values[0].startswith("["):
        try:
            found = yaml.safe_load(values[0])
        except yaml.YAMLError as error:
            raise UsageError(f"{key}: {values[0]!r} is not a list: write [a, b] or a,b.") from error
        if isinstance(found, list):
            return found
    return [item for value in values for item in value.split(",") if item]


def _kind(node: Any) -> str:
    return "a list" if isinstance(node, yaml.SequenceNode) else "a single value"


def _yaml_message(path: Path, error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{str(path)!r} is not valid YAML{place}: {problem}. Check indentation, colons and brackets."
