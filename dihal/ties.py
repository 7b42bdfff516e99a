"""Tensors that share memory, and a file format that refuses them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

__all__ = ["untied"]


def untied(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return contiguous CPU tensors that share no storage, and alias -> original for tied ones.

    Two names of one tensor are stored once; a name of a part of another tensor is copied. Tensors
    that are fine as they are are not copied: write them before they change.
    """
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple, str] = {}
    storages: set[tuple] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        view = (*storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and view in seen:
            aliases[name] = seen[view]
            continue
        seen[view] = name
        moved = tensor.to("cpu").contiguous()
        if storage in storages and moved.untyped_storage().data_ptr() == storage[1]:
            moved = moved.clone()  # a view of another entry; the file format refuses shared memory
        storages.add(storage)
        kept[name] = moved
    return kept, aliases
