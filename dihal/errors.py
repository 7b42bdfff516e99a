"""The one exception that means "the user can fix this"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["UsageError", "unknown_name"]


class UsageError(ValueError):
    """Bad input. The message says what is wrong *and* what to do about it.

    The command line prints the message on one line and exits with status 2; any other
    exception is a defect of DiHAL and keeps its traceback.
    """


def unknown_name(kind: str, name: object, known: Iterable[str], *, hint: str = "") -> UsageError:
    """Return the error for a name that is not in a registry: near match first, then the list.

    Args:
        kind: what the name should have been, e.g. ``"schedule"``.
        name: what was given.
        known: the valid names.
        hint: an extra sentence, e.g. how to add an entry.
    """
    valid = sorted(known)
    near = difflib.get_close_matches(str(name), valid, n=1)
    suggestion = f" Did you mean {near[0]!r}?" if near else ""
    tail = f" {hint}" if hint else ""
    return UsageError(f"unknown {kind} {name!r}.{suggestion} Valid: {', '.join(valid)}.{tail}")
