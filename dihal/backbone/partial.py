"""Part of a checkpoint: embedding and blocks below a split, and no byte of the rest.

Only the files that hold a wanted tensor are opened (from a hub: fetched), and in them only those
tensors are read. On a CPU in the stored type they stay memory-mapped: processes on one node share
the pages. On a GPU each is copied from the map, one at a time: the host never holds the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dihal.backbone.files import Loaded, explained, load_tokenizer, quiet
from dihal.backbone.skeleton import assign, build_skeleton, fill_buffers, wanted_names
from dihal.errors import UsageError

__all__ = ["load_part"]

_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def load_part(
    source: str,
    blocks: int,
    *,
    revision: str | None,
    dtype: torch.dtype,
    device: torch.device,
    attention: str,
    trust_remote_code: bool,
    tokenizer: Any | None,
) -> Loaded:
    """Load embedding and blocks below ``blocks`` of a local folder, a hub id or ``"embedded"``.

    Raises:
        UsageError: no safetensors there, a tensor missing or of another shape, more blocks than there are.
    """
    from transformers import AutoConfig

    name, given_revision = source, revision
    if source == "embedded":
        from dihal.backbone.embedded import EMBEDDED_VERSION, embedded_folder

        source, revision, given_revision = str(embedded_folder()), None, EMBEDDED_VERSION
    if source.endswith(".gguf"):
        raise UsageError(f"{source!r}: a .gguf file is read as a whole. Leave `blocks` out, or use safetensors.")
    options = {} if revision is None else {"revision": revision}
    with quiet(), explained(source):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **options)
        commit = getattr(config, "_commit_hash", None)
        if commit is not None:
            options = {"revision": commit}
        model, layout = build_skeleton(config, attention)
        count = len(model.get_submodule(f"{layout.decoder}.{layout.blocks}"))
        if not 0 <= blocks <= count:
            raise UsageError(f"blocks={blocks} is out of range: {source!r} has {count} blocks.")
        fill_buffers(model, layout, blocks, device)
        _fill(model, wanted_names(model, layout, blocks), source, options, dtype, device)
        model.tie_weights()
    if tokenizer is None:
        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code, **options)
    return Loaded(model, tokenizer, name, commit or given_revision, blocks)


def _fill(
    model: nn.Module, names: list[str], source: str, options: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> None:
    expected = model.state_dict()
    fetch, held_by = _files(source, options)
    stored = {name: _stored_name(name, model, held_by, source) for name in names}
    by_file: dict[str, list[str]] = {}
    for name in names:
        by_file.setdefault(held_by[stored[name]], []).append(name)
    for file, wanted in by_file.items():
        with safe_open(fetch(file), framework="pt", device="cpu") as archive:
            for name in wanted:
                tensor: Tensor = archive.get_tensor(stored[name])
                if tensor.shape != expected[name].shape:
                    raise UsageError(
                        f"{stored[name]!r} in {file!r} of {source!r} has shape {tuple(tensor.shape)}, its configuration "
                        f"says {tuple(expected[name].shape)}. Download or copy the model again."
                    )
                assign(
                    model, name, tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
                )


def _files(source: str, options: dict[str, Any]) -> tuple[Callable[[str], str], dict[str, str]]:
    """How to get a file, and which file holds which tensor."""
    from transformers.utils import cached_file

    def found(name: str) -> str | None:
        if Path(source).is_dir():
            return str(Path(source) / name) if (Path(source) / name).is_file() else None
        return cached_file(source, name, _raise_exceptions_for_missing_entries=False, **options)

    def fetch(name: str) -> str:
        path = found(name)
        if path is None:
            raise UsageError(f"{source!r} lacks the file {name!r} that its index names. Download or copy it again.")
        return path

    index = found(_INDEX)
    if index is not None:
        return fetch, dict(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"])
    whole = found(_ONE_FILE)
    if whole is None:
        raise UsageError(
            f"{source!r} holds no safetensors ({_ONE_FILE} or {_INDEX}), which are needed to load a part. "
            "Leave `blocks` out to load it whole."
        )
    with safe_open(whole, framework="pt", device="cpu") as archive:
        return fetch, dict.fromkeys(archive.keys(), _ONE_FILE)


def _stored_name(name: str, model: nn.Module, held_by: dict[str, str], source: str) -> str:
    """A tensor's name in the file: some checkpoints were saved without the causal LM around the decoder."""
    bare = name.removeprefix(f"{model.base_model_prefix}.")
    for candidate in (name, bare):
        if candidate in held_by:
            return candidate
    raise UsageError(
        f"{source!r} holds no tensor {name!r}: it is incomplete, or named in a way that is only understood when it is "
        "loaded whole. Leave `blocks` out, or download it again."
    )
