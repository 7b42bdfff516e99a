"""Checkpoints that are either whole or absent, and that say so.

A run folder holds ``checkpoints/step-XXXXXXXX/`` and the text file ``checkpoints/latest``. One
checkpoint is one folder:

====================  =================================================================
``*.safetensors``     weights (``model``, ``ema``, ``optimizer``); nothing is ever pickled
``state.json``        counters: step, tokens, samples_seen, seconds
``config.json``       the resolved :class:`dihal.config.TrainConfig` and its hash
``manifest.json``     format, size and sha256 of every file above, where the numbers came
                      from, and last the sha256 of the manifest itself
====================  =================================================================

A save is staged in the same folder (so that a rename is atomic), every file and the folder are
fsynced, then the folder is renamed, then the pointer. Whatever interrupts it, the checkpoint before
stays valid. A load checks every byte: a flipped bit loads without complaint in every tensor format.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from dihal.config import TrainConfig
from dihal.errors import UsageError
from dihal.io import canonical_json, ensure_dir, hash_json, require_free_space, sha256_file, write_json, write_text
from dihal.ties import untied

__all__ = [
    "FORMAT",
    "Checkpoint",
    "CheckpointWarning",
    "has_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "prune",
    "save_checkpoint",
]

FORMAT = "dihal.checkpoint/1"
"""Written into every manifest; another number means files this version does not read."""

_FOLDER = "checkpoints"
_POINTER = "latest"
_STAGING = ".staging-"
_NAME = re.compile(r"step-(\d{8,})")
_SLACK = 1 << 20


class CheckpointWarning(UserWarning):
    """A checkpoint was passed over."""


class _Invalid(Exception):
    """One checkpoint folder is not what its manifest says; the message names the file."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        path: its folder.
        state: counters (``step``, ``tokens``, ``samples_seen``, ``seconds``, ...).
        manifest: files, backbone reference and fingerprint, data and tokenizer fingerprints, provenance.
        raw_config: the stored configuration as plain data.
    """

    path: Path
    state: dict[str, Any]
    manifest: dict[str, Any]
    raw_config: dict[str, Any] = field(repr=False)

    @property
    def config(self) -> TrainConfig:
        """The configuration it was trained with.

        Raises:
            UsageError: it has options this version does not know.
        """
        from dihal.config.convert import from_dict

        try:
            return from_dict(TrainConfig, self.raw_config)
        except UsageError as error:
            written = (self.manifest.get("provenance") or {}).get("versions", {}).get("dihal")
            raise UsageError(
                f"the configuration in {str(self.path)!r} ({self.manifest['format']}, written by DiHAL {written}) "
                f"does not fit this version: {error} Use the version that wrote it."
            ) from error

    @property
    def names(self) -> tuple[str, ...]:
        """Names :meth:`tensors` accepts."""
        ending = ".safetensors"
        return tuple(sorted(name.removesuffix(ending) for name in self.manifest["files"] if name.endswith(ending)))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Tensors of one file, on the CPU; tied entries come back as one tensor.

        Raises:
            UsageError: there is no such file, with the list of those there are.
        """
        if name not in self.names:
            raise UsageError(
                f"checkpoint {str(self.path)!r} holds no {name!r} tensors. It has: {', '.join(self.names)}."
            )
        loaded = safetensors.torch.load_file(self.path / f"{name}.safetensors")
        for alias, original in self.manifest["aliases"].get(name, {}).items():
            loaded[alias] = loaded[original]
        return loaded


# -- saving ---------------------------------------------------------------------------------------


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _open_permissions(path: Path, mode: int) -> None:
    # Staged files are made private; a checkpoint is as readable as anything else its owner writes.
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, mode & ~mask)


def _seal(body: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(body).encode()).hexdigest()


def _manifest_text(body: dict[str, Any]) -> str:
    return json.dumps({**body, "sha256": _seal(body)}, indent=1) + "\n"


def _stage(
    stage: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    aliases: dict[str, dict[str, str]],
    state: dict[str, Any],
    config: dict[str, Any],
    manifest_extra: dict[str, Any],
) -> None:
    for name, group in tensors.items():
        safetensors.torch.save_file(dict(group), stage / f"{name}.safetensors", metadata={"format": "pt"})
    write_json(stage / "state.json", state)
    write_json(stage / "config.json", {"hash": hash_json(config), "config": config})
    files = {}
    for path in sorted(stage.iterdir()):
        _open_permissions(path, 0o666)
        _fsync(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    body = {"format": FORMAT, "files": files, "aliases": aliases, **manifest_extra}
    body = json.loads(canonical_json(body))  # exactly what a reader will see
    write_text(stage / "manifest.json", _manifest_text(body))
    _fsync(stage / "manifest.json")
    _open_permissions(stage, 0o777)
    _fsync(stage)


def save_checkpoint(
    folder: str | Path,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: dict[str, Any],
    config: dict[str, Any],
    manifest_extra: dict[str, Any],
) -> Path:
    """Write a checkpoint of one step into a run folder and point ``latest`` at it.

    A valid checkpoint of the same step is kept as it is; an invalid one is replaced.

    Args:
        folder: the run folder.
        tensors: file name (without ending) -> tensors by name; on any device, tied ones allowed.
        state: JSON-able counters; ``state["step"]`` names the checkpoint.
        config: the resolved configuration as plain data.
        manifest_extra: JSON-able origin of the numbers, stored in the manifest.

    Returns:
        The checkpoint's folder.

    Raises:
        UsageError: no space, no permission, read-only. Earlier checkpoints are untouched.
    """
    checkpoints = ensure_dir(Path(folder) / _FOLDER)
    target = checkpoints / f"step-{int(state['step']):08d}"
    if target.exists():
        with contextlib.suppress(_Invalid):
            _verify(target)
            return target
    moved: dict[str, dict[str, Tensor]] = {}
    aliases: dict[str, dict[str, str]] = {}
    for name, group in tensors.items():
        moved[name], aliases[name] = untied(group)
    needed = sum(t.numel() * t.element_size() for group in moved.values() for t in group.values())
    try:
        for leftover in checkpoints.glob(f"{_STAGING}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        require_free_space(checkpoints, needed + _SLACK)
        stage = Path(tempfile.mkdtemp(dir=checkpoints, prefix=_STAGING))
        try:
            _stage(stage, moved, {k: v for k, v in aliases.items() if v}, state, config, manifest_extra)
            if target.exists():
                _discard(target)
            os.replace(stage, target)
            _fsync(checkpoints)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
        write_text(checkpoints / _POINTER, target.name + "\n")
        _fsync(checkpoints)
    except (OSError, safetensors.SafetensorError, UsageError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        newest = next((path.name for path in reversed(list_checkpoints(folder))), None)
        before = "there is no earlier checkpoint" if newest is None else f"{newest} is intact"
        raise UsageError(
            f"cannot save the checkpoint of step {state['step']} in {str(checkpoints)!r}: {reason.rstrip('.')}. "
            f"Free some space or fix the permissions, then go on with resume=true; {before}."
        ) from error
    return target


# -- loading --------------------------------------------------------------------------------------


def _verify(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Check every file; return (manifest, state, config).

    Raises:
        _Invalid: naming the file and what is wrong with it.
    """
    manifest_path = path / "manifest.json"
    try:
        text = manifest_path.read_bytes().decode("utf-8")
        manifest = json.loads(text)
    except FileNotFoundError as error:
        raise _Invalid(f"{manifest_path} is missing") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _Invalid(f"{manifest_path} cannot be read ({error})") from error
    if not isinstance(manifest, dict) or "sha256" not in manifest or "format" not in manifest:
        raise _Invalid(f"{manifest_path} is not a checkpoint manifest")
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    # The text itself must be what we would write: otherwise a flip in white space would pass.
    if _seal(body) != manifest["sha256"] or _manifest_text(body) != text:
        raise _Invalid(f"{manifest_path} was altered after it was written")
    if manifest["format"] != FORMAT:
        raise UsageError(
            f"{str(path)!r} has format {manifest['format']!r}; this version of DiHAL reads {FORMAT!r}. "
            "Use the version that wrote it."
        )
    for name, expected in manifest["files"].items():
        file = path / name
        try:
            size = file.stat().st_size
            if size != expected["size"]:
                raise _Invalid(f"{file} has {size} bytes, its manifest says {expected['size']}")
            if sha256_file(file) != expected["sha256"]:
                raise _Invalid(f"{file} was altered after it was written (sha256 differs)")
        except FileNotFoundError as error:
            raise _Invalid(f"{file} is missing") from error
        except OSError as error:
            raise _Invalid(f"{file} cannot be read ({error.strerror or error})") from error
    state, config = (json.loads((path / name).read_text(encoding="utf-8")) for name in ("state.json", "config.json"))
    return manifest, state, config["config"]


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoint folders of a run folder, oldest step first, valid or not."""
    checkpoints = Path(folder) / _FOLDER
    if not checkpoints.is_dir():
        return []
    found = [(int(match[1]), path) for path in checkpoints.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def has_checkpoint(folder: str | Path) -> bool:
    """Whether a run folder holds any checkpoint, valid or not."""
    return bool(list_checkpoints(folder))


def _loudly(message: str) -> None:
    from rich.console import Console

    warnings.warn(message, CheckpointWarning, stacklevel=4)
    Console(file=sys.stderr).print(f"[bold red]checkpoint:[/] {message}", soft_wrap=True, highlight=False)


def _open(path: Path) -> Checkpoint:
    manifest, state, config = _verify(path)
    return Checkpoint(path=path, state=state, manifest=manifest, raw_config=config)


def _newest(folder: Path) -> Checkpoint:
    candidates = list_checkpoints(folder)
    pointer = folder / _FOLDER / _POINTER
    pointed = ""
    with contextlib.suppress(OSError):
        pointed = pointer.read_text(encoding="utf-8", errors="replace").strip()
    # The folder is renamed before the pointer: a newer step than the pointer's is a whole save whose
    # last rename was interrupted. So steps decide, and the pointer only tells what should be there.
    if pointed and pointed not in {path.name for path in candidates}:
        _loudly(f"{str(pointer)!r} names {pointed!r}, which is not there; taking the newest valid checkpoint.")
    problems = []
    for path in reversed(candidates):
        try:
            checkpoint = _open(path)
        except _Invalid as error:
            problems.append(str(error))
            continue
        if problems:
            _loudly(f"{'; '.join(problems)}. Falling back to {path.name}.")
        return checkpoint
    raise UsageError(
        f"no valid checkpoint in {str(folder)!r}: {'; '.join(problems)}. Restore one from a copy, or train again."
    )


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Open and verify a checkpoint.

    Args:
        path: a checkpoint folder, which must then be valid; or a run folder, whose newest valid
            checkpoint is taken, with a warning where that is not the newest.

    Raises:
        UsageError: nothing there (with what is), a named checkpoint that is not whole (with the
            file), another format version.
    """
    path = Path(path)
    if path.name == _FOLDER and path.is_dir() and not (path / _FOLDER).exists():
        path = path.parent
    if has_checkpoint(path):
        return _newest(path)
    if (path / "manifest.json").exists() or (path.is_dir() and _NAME.fullmatch(path.name)):
        try:
            return _open(path)
        except _Invalid as error:
            others = [other.name for other in list_checkpoints(path.parent.parent) if other.name != path.name]
            hint = f"Others in the run folder: {', '.join(others)}." if others else "Restore it from a copy."
            raise UsageError(f"checkpoint {str(path)!r} is not whole: {error}. {hint}") from error
    shown = path if path.is_dir() else next((p for p in path.parents if p.is_dir()), Path("."))
    entries = sorted(entry.name for entry in shown.iterdir() if not entry.name.startswith("."))
    listing = ", ".join(entries[:12]) + (", ..." if len(entries) > 12 else "") if entries else "nothing"
    what = "holds no checkpoint" if path.is_dir() else "does not exist" if not path.exists() else "is a file"
    raise UsageError(
        f"{str(path)!r} {what}. Give a run folder or a checkpoint folder; {str(shown)!r} holds: {listing}."
    )


# -- retention ------------------------------------------------------------------------------------


def _discard(path: Path) -> None:
    # Renamed first, so that a deletion cut short never looks like a checkpoint.
    grave = Path(tempfile.mkdtemp(dir=path.parent, prefix=_STAGING))
    os.replace(path, grave / path.name)
    shutil.rmtree(grave, ignore_errors=True)


def prune(folder: str | Path, keep: int, *, valid: Path | None = None) -> list[Path]:
    """Delete all but the newest ``keep`` checkpoints; return those deleted.

    Args:
        folder: the run folder.
        keep: how many stay, at least 1.
        valid: a checkpoint known to be whole (the one just saved). Without it the kept ones are
            verified, and the newest valid checkpoint stays even where it is older than them.
    """
    found = list_checkpoints(folder)
    kept, old = found[-max(1, keep) :], found[: -max(1, keep)]
    if old and valid not in kept:
        for path in reversed(found):
            with contextlib.suppress(_Invalid):
                _verify(path)
                old = [other for other in old if other != path]
                break
        else:
            return []  # nothing is valid: leave all of it to whoever repairs it
    for path in old:
        _discard(path)
    return old
