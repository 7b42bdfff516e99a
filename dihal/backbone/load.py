"""One door for backbones: hub id, local folder, .gguf file, live module, embedded default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dihal.backbone.files import Loaded, load_files
from dihal.backbone.layout import find_layout
from dihal.backbone.model import Backbone
from dihal.backbone.reference import BackboneReference, hash_config
from dihal.backbone.tokens import require_fit
from dihal.config.parts import BackboneConfig
from dihal.errors import UsageError, unknown_name

__all__ = ["backbone_from_config", "load_backbone", "pick_device", "random_backbone"]

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def _pick_dtype(dtype: str | torch.dtype) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise unknown_name("dtype", name, _DTYPES)
    return _DTYPES[name]


def pick_device(device: str | torch.device) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device that is there.

    Raises:
        UsageError: no such device.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"unknown device {str(device)!r}. Use auto, cpu, cuda or cuda:N.") from error
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise UsageError(
                f"device {str(device)!r} was asked for, but this machine has no CUDA device. Use device cpu or auto."
            )
        if (chosen.index or 0) >= count:
            raise UsageError(
                f"device {str(device)!r} was asked for, but there are {count} CUDA devices (cuda:0 to cuda:{count - 1})."
            )
    return chosen


def load_backbone(
    source: str | Path | nn.Module = "embedded",
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "auto",
    attention: str = "sdpa",
    trust_remote_code: bool = False,
    tokenizer: Any | None = None,
    blocks: int | None = None,
) -> Backbone:
    """Load a causal LM as a frozen backbone.

    Args:
        source: ``"embedded"`` (SmolLM2-135M-Instruct, from the package index), a local folder, a
            ``.gguf`` file, a Hugging Face hub id, or a live causal LM. A live one is not copied: it
            is moved to ``dtype`` and ``device``, frozen and put into evaluation mode.
        revision: commit, tag or branch; hub ids only.
        dtype: type of weights and states.
        device: ``auto`` (CUDA if there is any), ``cpu``, ``cuda``, ``cuda:N``.
        attention: ``sdpa`` (``eager`` for a family that has no other) or ``eager``.
        trust_remote_code: run Python code that comes with the model.
        tokenizer: a Hugging Face tokenizer to use instead of the source's own.
        blocks: load the embedding and so many blocks from below, and nothing else: neither read nor
            held. `Backbone.states` and `.prefix` up to that split are all that then runs. None: all.

    Raises:
        UsageError: nothing there, an unknown family, a damaged or incomplete file, no network, a
            model that needs its own code, a device that is not there, a tokenizer that does not fit.
    """
    chosen_dtype, chosen_device = _pick_dtype(dtype), pick_device(device)
    if attention not in ("sdpa", "eager"):
        raise unknown_name("attention", attention, ("sdpa", "eager"))
    if isinstance(source, nn.Module):
        if revision is not None or blocks is not None:
            raise UsageError("a live model has no revision, and is there as a whole: leave revision and blocks out.")
        loaded = Loaded(
            source, tokenizer, getattr(getattr(source, "config", None), "_name_or_path", "") or "live", None
        )
    elif blocks is not None:
        from dihal.backbone.partial import load_part

        loaded = load_part(
            str(source),
            blocks,
            revision=revision,
            dtype=chosen_dtype,
            device=chosen_device,
            attention=attention,
            trust_remote_code=trust_remote_code,
            tokenizer=tokenizer,
        )
    else:
        loaded = load_files(
            str(source),
            revision=revision,
            dtype=chosen_dtype,
            trust_remote_code=trust_remote_code,
            tokenizer=tokenizer,
        )
    return _freeze(loaded, chosen_dtype, chosen_device, attention)


def random_backbone(
    config: Any,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "bfloat16",
    seed: int = 0,
    blocks: int | None = None,
    attention: str = "sdpa",
    tokenizer: Any | None = None,
) -> Backbone:
    """A backbone with random weights, made on the device in seconds: for figures of speed and memory.

    Args:
        config: a Hugging Face config, its fields as a dict, or a name in `dihal.backbone.shapes.SHAPES`.
        device, dtype, attention, tokenizer, blocks: as in `load_backbone`.
        seed: of the weights; they differ between kinds of devices.

    Raises:
        UsageError: an unknown name or family.
    """
    from dihal.backbone.shapes import make_config
    from dihal.backbone.skeleton import build_skeleton, fill_buffers, fill_random

    chosen_dtype, chosen_device = _pick_dtype(dtype), pick_device(device)
    resolved, name = make_config(config)
    model, layout = build_skeleton(resolved, attention)
    fill_buffers(model, layout, blocks, chosen_device)
    fill_random(model, layout, blocks, chosen_device, chosen_dtype, seed)
    return _freeze(Loaded(model, tokenizer, name, None, blocks), chosen_dtype, chosen_device, attention)


def backbone_from_config(config: BackboneConfig, *, blocks: int | None = None) -> Backbone:
    """`load_backbone` with the fields of a configuration."""
    return load_backbone(
        config.id,
        revision=config.revision,
        dtype=config.dtype,
        device=config.device,
        attention=config.attention,
        trust_remote_code=config.trust_remote_code,
        blocks=blocks,
    )


def _freeze(loaded: Loaded, dtype: torch.dtype, device: torch.device, attention: str) -> Backbone:
    model = loaded.model
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        raise UsageError(f"{type(model).__name__} is not a Hugging Face causal LM; pass e.g. a LlamaForCausalLM.")
    family, layout = find_layout(config)
    if not hasattr(model, layout.decoder.split(".")[0]) or model.get_output_embeddings() is None:
        raise UsageError(
            f"{type(model).__name__} has no language-model head; load the causal LM (AutoModelForCausalLM) of this {family}."
        )
    model.set_attn_implementation("eager" if layout.eager_only else attention)
    # Collecting every layer or every attention map is exactly what a backbone must not do.
    config.output_hidden_states = False
    config.output_attentions = False
    if loaded.blocks is None:
        model = model.to(device=device)
    model = model.eval().requires_grad_(False)
    # Parameters only: Module.to(dtype) would round the rotary frequencies, which are float32 in every released model.
    for parameter in model.parameters():
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
    decoder = model.get_submodule(layout.decoder)
    reference = BackboneReference(
        id=loaded.id,
        revision=loaded.revision,
        family=family,
        num_blocks=len(decoder.get_submodule(layout.blocks)),
        hidden_size=model.get_input_embeddings().weight.shape[1],
        vocab_size=model.get_input_embeddings().weight.shape[0],
        dtype=str(dtype).removeprefix("torch."),
        config_hash=hash_config(config),
    )
    if loaded.tokenizer is not None:
        require_fit(loaded.tokenizer, reference.vocab_size)
    return Backbone(model, family, layout, reference, loaded.tokenizer, held=loaded.blocks)
