"""A causal LM of which only a part has weights: embedding and lower blocks, or everything.

The whole module tree is built without memory (on torch's ``meta`` device), so that names, indices,
shapes and costs are those of the whole model. Then the part that is wanted gets tensors, from a
file (``partial.py``) or at random; the rest stays without.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dihal.backbone.layout import Layout, find_layout
from dihal.errors import UsageError

__all__ = ["assign", "build_skeleton", "fill_buffers", "fill_random", "wanted_names"]


def build_skeleton(config: Any, attention: str) -> tuple[nn.Module, Layout]:
    """The family's causal LM with no tensor in memory.

    Raises:
        UsageError: an unknown family.
    """
    from transformers import AutoModelForCausalLM

    _, layout = find_layout(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager" if layout.eager_only else attention
        )
    return model.eval().requires_grad_(False), layout


def _modules(model: nn.Module, layout: Layout, blocks: int | None) -> Iterator[tuple[str, nn.Module]]:
    """Modules with weights: all of them, or those of embedding and blocks below ``blocks``."""
    path = f"{layout.decoder}.{layout.blocks}."
    norm = f"{layout.decoder}.{layout.norm}"
    for name, module in model.named_modules():
        if blocks is not None:
            if not name.startswith(f"{layout.decoder}.") or name == norm or name.startswith(f"{norm}."):
                continue
            if name.startswith(path) and int(name[len(path) :].split(".")[0]) >= blocks:
                continue
        yield name, module


def wanted_names(model: nn.Module, layout: Layout, blocks: int | None) -> list[str]:
    """Names of the stored tensors that a model with so many blocks needs; tied ones once."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    stored = model.state_dict().keys()
    names = [
        f"{prefix}.{own}" if prefix else own
        for prefix, module in _modules(model, layout, blocks)
        for own in [*module._parameters, *module._buffers]
    ]
    # named_parameters() lists a tied tensor under its first name only.
    return [name for name in names if name in stored and name in named]


def assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor where a parameter or buffer of that name is."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def fill_buffers(model: nn.Module, layout: Layout, blocks: int | None, device: torch.device) -> None:
    """Compute what no file holds: rotary frequencies, embedding scales, causal patterns."""
    for name, module in list(_modules(model, layout, blocks)):
        missing = [n for n in module._non_persistent_buffers_set if module._buffers[n] is not None]
        if not missing:
            continue
        for own in missing:
            module._buffers[own] = torch.full_like(module._buffers[own], _UNSET, device=device)
        # The library's own initialisation of the module; parameters are still without memory.
        model._init_weights(module)
        for own in missing:
            buffer = module._buffers[own]
            if buffer.is_floating_point() and bool((buffer == _UNSET).any()):
                raise UsageError(
                    f"{type(model).__name__} does not say how to make the buffer {name}.{own}, so it cannot be loaded in "
                    "part. Load it whole (blocks=None)."
                )


_UNSET = -7919.0
"""Stands in a buffer until the library computes it; no rotary frequency or scale is negative."""


@torch.no_grad()
def fill_random(
    model: nn.Module, layout: Layout, blocks: int | None, device: torch.device, dtype: torch.dtype, seed: int
) -> None:
    """Give the wanted part the library's initial weights, drawn on the device in the dtype."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    for name in wanted_names(model, layout, blocks):
        kind = dtype if named[name].is_floating_point() else named[name].dtype
        assign(model, name, torch.empty_like(named[name], dtype=kind, device=device))
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        for _, module in _modules(model, layout, blocks):
            model._init_weights(module)
    model.tie_weights()
