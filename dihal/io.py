"""Files that are either whole or absent: staged beside the target, fsynced, renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dihal.errors import UsageError

__all__ = [
    "atomic_path",
    "cache_dir",
    "canonical_json",
    "ensure_dir",
    "hash_json",
    "output_dir",
    "read_json",
    "require_free_space",
    "sha256_file",
    "write_json",
    "write_text",
]


def cache_dir() -> Path:
    """Folder for things that can be made again: ``$DIHAL_CACHE`` or ``~/.cache/dihal``."""
    root = os.environ.get("DIHAL_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "dihal"
    )
    return Path(root)


def ensure_dir(path: str | Path) -> Path:
    """Create a folder for output, or say why it cannot be written to.

    Raises:
        UsageError: the path is a file, or the folder cannot be created or written.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"cannot write to the output folder {str(folder)!r}: {error.strerror or error}. "
            "Choose another folder, free some space, or fix its permissions."
        ) from error
    return folder


@contextlib.contextmanager
def output_dir(path: str | Path) -> Iterator[Path]:
    """Create a folder for output as :func:`ensure_dir` does, before the work that fills it.

    If that work fails, the folders created here are removed again as far as they are empty.

    Raises:
        UsageError: as :func:`ensure_dir`.
    """
    folder = Path(path)
    missing = [place for place in (folder, *folder.parents) if not os.path.exists(place)]
    try:
        yield ensure_dir(folder)
    except BaseException:
        for place in missing:  # a folder that is not empty, or was never created, stays as it is
            with contextlib.suppress(OSError):
                place.rmdir()
        raise


def require_free_space(folder: str | Path, needed: int) -> None:
    """Refuse to start writing ``needed`` bytes where they do not fit.

    Raises:
        UsageError: fewer than ``needed`` bytes (plus 5 %) are free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed * 1.05:
        raise UsageError(
            f"{str(folder)!r} has {free / 2**20:.1f} MiB free, {needed * 1.05 / 2**20:.1f} MiB are needed. "
            "Free some space or choose another output folder; nothing was overwritten."
        )


@contextlib.contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the target's own folder; on success fsync and rename over it.

    On any error the temporary file is removed and an existing target is untouched.

    Raises:
        UsageError: the file system refuses (full, read-only, no permission).
    """
    target = Path(target)
    ensure_dir(target.parent)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    staged = Path(name)
    try:
        yield staged
        with open(staged, "rb+") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(staged, 0o666 & ~mask)
        os.replace(staged, target)
    except OSError as error:
        raise UsageError(
            f"cannot write {str(target)!r}: {error.strerror or error}. "
            "Free some space or choose another output folder; an earlier file of that name is unchanged."
        ) from error
    finally:
        staged.unlink(missing_ok=True)


def write_text(target: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(target) as staged:
        staged.write_text(text, encoding="utf-8")


def _plain(value: Any) -> Any:
    # JSON has no NaN: a missing number is null, never an invalid token that other readers reject.
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def write_json(target: str | Path, data: Any) -> None:
    """Write JSON atomically; non-finite numbers become null."""
    write_text(target, json.dumps(_plain(data), indent=1, sort_keys=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON.

    Raises:
        UsageError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"no file {str(path)!r}. Check the path.") from error
    except IsADirectoryError as error:
        raise UsageError(f"{str(path)!r} is a folder, a JSON file was expected.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{str(path)!r} is not valid JSON ({error}). It may be truncated: write it again.") from error


def canonical_json(data: Any) -> str:
    """JSON with sorted keys and no spaces: equal data, equal text."""
    return json.dumps(_plain(data), sort_keys=True, separators=(",", ":"), allow_nan=False)


def hash_json(data: Any) -> str:
    """First 16 hex digits of the sha256 of the canonical JSON."""
    return hashlib.sha256(canonical_json(data).encode()).hexdigest()[:16]


def sha256_file(path: str | Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
