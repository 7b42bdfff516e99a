"""Where a number came from: commit, versions, hardware, command."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["provenance"]

_PACKAGES = ("dihal", "torch", "transformers", "lightning", "peft", "safetensors", "scipy", "numpy")


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(
            ("git", *args),
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@functools.cache
def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _hardware() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def provenance() -> dict[str, Any]:
    """Return commit, dirty flag, versions, hardware, command and time as plain JSON data.

    ``commit`` is read from the source checkout, or from ``$DIHAL_COMMIT`` where the source
    travelled without its history; it is null when neither is there. ``dirty`` ignores files git
    does not track. The command is recorded relative to the working folder, without its machine's paths.
    """
    commit = _git("rev-parse", "HEAD") or os.environ.get("DIHAL_COMMIT") or None
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": commit,
        "dirty": None if status is None else bool(status),
        "versions": _versions(),
        "hardware": _hardware(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
