"""Python's own documentation as text: always there, about 2 MB of technical English, no network.

Documents are the topics of `pydoc` (language reference) and, one per module, the docstrings of the
standard library. Sources are parsed, never imported.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from dihal.data.sources import Record
from dihal.errors import UsageError
from dihal.io import cache_dir, canonical_json, hash_json, read_json, write_json

__all__ = ["pydoc_records", "stdlib_docstrings"]

# Raise when the extraction below changes what it yields: old caches are then ignored.
_SCHEMA = 1

# Not documentation: test suites, generated or vendored code, what other projects installed.
_SKIPPED = {
    "__pycache__",
    "dist-packages",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}


def pydoc_records(stdlib: Path | None = None) -> Iterator[Record]:
    """Iterate records with the fields `text`, `kind` (`topics` or `docstrings`) and `module`, in a fixed order.

    The extraction takes seconds and is cached per Python version under `cache_dir()`.

    Args:
        stdlib: folder of the standard library's sources; None: this interpreter's.

    Raises:
        UsageError: the interpreter ships neither topics nor sources.
    """
    folder = Path(sysconfig.get_path("stdlib")) if stdlib is None else stdlib
    for kind, module, text in _cached(folder):
        yield Record(f"pydoc {kind} {module!r}", {"text": text, "kind": kind, "module": module})


def _cached(folder: Path) -> list[list[str]]:
    key = hash_json([_SCHEMA, sys.implementation.name, sys.version, str(folder)])
    target = cache_dir() / "pydoc" / f"{key}.json"
    if target.exists():
        # A cache can be made again: one that is damaged is replaced, not trusted and not fatal.
        try:
            stored = read_json(target)
            if stored["sha256"] == _digest(stored["documents"]):
                return stored["documents"]
        except (UsageError, KeyError, TypeError):
            pass
        warnings.warn(f"the cache {str(target)!r} is damaged and is made again", stacklevel=2)
    documents = [["topics", name, text] for name, text in _topics()]
    documents += [["docstrings", name, text] for name, text in stdlib_docstrings(folder)]
    write_json(target, {"sha256": _digest(documents), "documents": documents})
    return documents


def _digest(documents: list[list[str]]) -> str:
    return hashlib.sha256(canonical_json(documents).encode()).hexdigest()


def _topics() -> list[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UsageError(
            "this Python ships without pydoc_data, so the `pydoc` text is not there. "
            "Install the full standard library, or set data.source to your own files."
        ) from error
    return sorted(topics.items())


def stdlib_docstrings(folder: Path) -> list[tuple[str, str]]:
    """Return (module name, its docstrings in source order, joined by blank lines), sorted by module name.

    Raises:
        UsageError: the folder holds no source with a docstring.
    """
    found = []
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        if _SKIPPED.isdisjoint(parts) and (text := _docstrings(path)):
            found.append((".".join(parts).removesuffix(".__init__"), text))
    if not found:
        raise UsageError(
            f"this Python ships without the sources of its standard library (looked in {str(folder)!r}), "
            "so the `pydoc` text is not there. Use a full Python, or set data.source to your own files."
        )
    return sorted(found)


def _docstrings(path: Path) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        # Templates and deliberately broken samples lie among the sources; they document nothing.
        return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return "\n\n".join(text for node in nodes if (text := ast.get_docstring(node)))
