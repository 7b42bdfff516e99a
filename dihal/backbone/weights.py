"""Weights of a backbone: which belong to a part, their fingerprint, their cost."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dihal.errors import UsageError

if TYPE_CHECKING:
    from dihal.backbone.model import Backbone

__all__ = [
    "attention_window",
    "block_flops",
    "count",
    "fingerprint",
    "fingerprint_of",
    "linear_layers",
    "linear_names",
    "lower_fingerprint",
    "named_weights",
]


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in module.state_dict(keep_vars=True).items():
        # peft renames what it wraps and adds its adapters; neither is the backbone.
        if "lora_" not in name:
            yield name.replace("base_layer.", ""), tensor


def named_weights(backbone: Backbone, first_block: int, *, embedding: bool, head: bool) -> list[tuple[str, Tensor]]:
    """Weights by role, in a fixed order: ``embedding.*``, ``block.<index>.*``, ``norm.*``, ``head.*``.

    Names are by role, not by the library's path, which changes between releases. A tied head
    appears under ``head`` as well when the embedding is there.
    """
    layout, decoder = backbone.layout, backbone.decoder
    parts: list[tuple[str, nn.Module]] = []
    if embedding:
        parts += [(f"embedding.{name}", decoder.get_submodule(name)) for name in layout.embeddings]
    parts += [(f"block.{i}", block) for i, block in enumerate(backbone.blocks) if i >= first_block]
    if head:
        parts += [("norm", decoder.get_submodule(layout.norm)), ("head", backbone.output_embedding)]
    return [(f"{role}.{name}", tensor) for role, module in parts for name, tensor in _own(module)]


def count(backbone: Backbone, first_block: int, *, embedding: bool, head: bool) -> int:
    """See `Backbone.parameter_count`."""
    parts = named_weights(backbone, first_block, embedding=embedding, head=head)
    return sum(tensor.numel() for tensor in {id(tensor): tensor for _, tensor in parts}.values())


def _digest(item: tuple[str, Tensor], dtype: torch.dtype | None) -> bytes:
    name, tensor = item
    data = tensor.detach().to(dtype=dtype).cpu().contiguous()
    digest = hashlib.sha256(f"{name} {data.dtype} {tuple(data.shape)}\n".encode())
    digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def fingerprint(parts: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None) -> str:
    """Hex sha256 over the sha256 of every tensor (name, type, shape, bytes, cast to ``dtype`` if given), in the order given."""
    items = list(parts)
    # A tensor's own digest lets the threads work at once: hashlib releases the interpreter lock.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(lambda item: _digest(item, dtype), items))
    return hashlib.sha256(b"".join(digests)).hexdigest()


def fingerprint_of(backbone: Backbone, first_block: int, *, embedding: bool, head: bool, dtype: str | None) -> str:
    """See `Backbone.fingerprint`."""
    cast = None if dtype is None else getattr(torch, dtype)
    if cast is not None and cast != backbone.dtype and cast.itemsize >= backbone.dtype.itemsize:
        raise UsageError(
            f"the weights are held as {str(backbone.dtype).removeprefix('torch.')}, their {dtype} fingerprint cannot be "
            f"taken from it. Load the backbone with dtype {dtype}."
        )
    parts = named_weights(backbone, first_block, embedding=embedding, head=head)
    if backbone.held is not None and any(tensor.is_meta for _, tensor in parts):
        raise UsageError(
            f"only the embedding and {backbone.held} blocks of {backbone.reference.id!r} were loaded: the other weights have "
            "no fingerprint here. Load it whole (blocks=None), or ask for `lower_fingerprint`."
        )
    return fingerprint(parts, cast)


def lower_fingerprint(backbone: Backbone, split: int, dtype: str | None = None) -> str:
    """Hex sha256 over embedding and blocks below ``split``: what a bridge trained on state error alone has read."""
    cast = None if dtype is None else getattr(torch, dtype)
    path = tuple(f"block.{index}." for index in range(split))
    named = named_weights(backbone, 0, embedding=True, head=False)
    return fingerprint([item for item in named if item[0].startswith(("embedding.", *path))], cast)


def linear_layers(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every matrix product of a block: ``nn.Linear``, and GPT-2's transposed one."""
    from transformers.pytorch_utils import Conv1D

    return [(name, module) for name, module in block.named_modules() if isinstance(module, (nn.Linear, Conv1D))]


def linear_names(backbone: Backbone, first_block: int) -> list[str]:
    """See `Backbone.linear_names`."""
    path = f"{backbone.layout.decoder}.{backbone.layout.blocks}"
    blocks = list(enumerate(backbone.blocks))[first_block:]
    return [f"{path}.{index}.{name}" for index, block in blocks for name, _ in linear_layers(block)]


def attention_window(backbone: Backbone, index: int) -> float:
    """Positions that a block attends to at most; infinite without a sliding window."""
    window = getattr(backbone.config, backbone.layout.windows, None) if backbone.layout.windows else None
    types = getattr(backbone.config, "layer_types", None)
    if window is None or (types is not None and types[index] != "sliding_attention"):
        return float("inf")
    return float(window)


def block_flops(backbone: Backbone, blocks: range, context: int | float) -> float:
    """See `Backbone.flops_per_token`."""
    total = 0.0
    for index in blocks:
        block = backbone.blocks[index]
        linears = dict(linear_layers(block))
        output = linears[backbone.layout.attention_output]
        # nn.Linear holds (out, in), Conv1D holds (in, out).
        width = output.weight.shape[1] if isinstance(output, nn.Linear) else output.weight.shape[0]
        total += 2.0 * sum(layer.weight.numel() for layer in linears.values())
        total += 4.0 * min(context, attention_window(backbone, index)) * width
    return total
