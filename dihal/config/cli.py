"""Command lines and YAML files to configurations, and back.

jsonargparse coerces and checks values by their declared types and writes the help; `dihal.config.layers` decides
which value counts. The defaults stay where they are: in the dataclasses.
"""

from __future__ import annotations

import difflib
import functools
import sys
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

import yaml

from dihal.config.convert import config_hash, from_dict, to_dict
from dihal.config.layers import Entry, Field, Layers, fields_of
from dihal.errors import UsageError

__all__ = ["config_hash", "dump", "from_dict", "parse", "to_dict"]

Config = TypeVar("Config")


def parse(config_class: type[Config], argv: Sequence[str], *, prog: str, description: str | None = None) -> Config:
    """Turn a command line into a configuration.

    Words: `--config FILE.yaml` (repeatable, later ones win), `--GROUP FILE.yaml` for one nested group, and
    `--key VALUE`, `--key=VALUE` or `key=VALUE` with dotted keys, which win over files. Inside a YAML file a group
    may name another file, relative to the first. `--help` and `--print_config` print and leave with status 0.

    Args:
        config_class: a configuration dataclass.
        argv: the words after the command's name.
        prog: the command, for the help.
        description: one paragraph for the help; None: the class's docstring.

    Raises:
        UsageError: an unknown key, a wrong value, or a file that cannot be used.
        SystemExit: status 0 after `--help` or `--print_config`.
    """
    wanted = [word for word in argv if word in ("-h", "--help")]
    if wanted:
        print(_help(config_class, prog, description))
        sys.exit(0)
    layers = Layers(config_class)
    flags = layers.add_words(argv)
    config = _build(config_class, layers)
    if "print_config" in flags:
        print(dump(config), end="")
        sys.exit(0)
    return config


def dump(config: Any) -> str:
    """Return a configuration as YAML, every value written out; `--config` reads it back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120)


def _parser(config_class: type, **options: Any) -> Any:
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return ArgumentParser(exit_on_error=False, default_env=False, **options)


@functools.cache
def _checker(config_class: type) -> Any:
    """What checks the values of a class; reading its fields and their docstrings takes a quarter of a second."""
    parser = _parser(config_class)
    parser.add_class_arguments(config_class, as_group=False)
    return parser


def _build(config_class: type[Config], layers: Layers) -> Config:
    parser = _checker(config_class)
    try:
        values = parser.parse_object(layers.nested()).as_dict()
    except Exception as error:
        # The first value that fails on its own is the culprit: no need to take jsonargparse's message apart.
        for key, entry in layers.entries.items():
            alone = Layers(config_class)
            alone.set(key, entry.value, entry.where)
            try:
                parser.parse_object(alone.nested())
            except Exception as cause:
                raise _wrong_value(key, entry, layers.fields[key]) from cause
        raise UsageError(f"the configuration cannot be used: {error}") from error
    return from_dict(config_class, values)


def _wrong_value(key: str, entry: Entry, field: Field) -> UsageError:
    options = typing.get_args(field.type) if typing.get_origin(field.type) is typing.Literal else ()
    near = difflib.get_close_matches(str(entry.value), [str(option) for option in options], n=1)
    suggestion = f" Did you mean {near[0]!r}?" if near else ""
    expected = _describe(field.type) + (" or null" if field.optional else "")
    return UsageError(f"{key}: expected {expected}, found {entry.value!r} ({entry.where}).{suggestion}")


def _describe(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments)) if len(arguments) > 1 else repr(arguments[0])
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list, each item {_describe(arguments[0])}"
        return f"a list of {len(arguments)} values, each {_describe(arguments[0])}"
    if arguments:
        return " or ".join(map(_describe, arguments))
    names = {int: "a whole number (int)", float: "a number (float)", bool: "true or false (bool)", str: "text (str)"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def _help(config_class: type, prog: str, description: str | None) -> str:
    text = (description or config_class.__doc__ or "").strip()
    parser = _parser(
        config_class,
        prog=prog,
        usage=f"{prog} [--config FILE.yaml ...] [--GROUP FILE.yaml] [--key VALUE | key=VALUE ...]",
        description=f"{text} Later ones win, and keys win over --config files.",
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML with some of the keys below; repeatable")
    parser.add_argument("--print_config", action="store_true", help="Print the resolved configuration as YAML and exit")
    fields = fields_of(config_class)
    # An optional group is one value to jsonargparse; its keys are shown like those of any other group.
    hidden = {key for key, field in fields.items() if field.is_group and field.optional and "." not in key}
    parser.add_class_arguments(config_class, as_group=False, sub_configs=True, skip=hidden)
    for key in sorted(hidden):
        parser.add_class_arguments(fields[key].type, key, sub_configs=True, help=f"{key} (none of its keys: null)")
    return parser.format_help().rstrip()
