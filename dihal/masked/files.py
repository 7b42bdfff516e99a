"""The converted model as a plain Hugging Face causal LM in a folder, and back.

Beside transformers' own files lies ``masked.json``: which id is the mask token, what the model was made from and how.
Opened by transformers alone the weights are complete, but the model then attends causally: pass it a 4-D mask that
shows everything (``dihal.masked.attention.full``), put the mask token's id where a token is masked, read token i at
position i - 1, and leave the mask token's logit out.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dihal.config.convert import from_dict, to_dict
from dihal.config.method import LoraConfig, MethodConfig
from dihal.errors import UsageError
from dihal.io import output_dir, read_json, write_json
from dihal.masked.model import MaskedLM

if TYPE_CHECKING:
    from dihal.backbone import Backbone

__all__ = ["FORMAT", "load_masked", "save_masked", "to_causal_lm"]

FORMAT = "dihal.masked/1"
"""Written into every ``masked.json``; another number means files this version does not read."""

_FILE = "masked.json"


@torch.no_grad()
def to_causal_lm(method: MaskedLM, backbone: Backbone, *, dtype: torch.dtype = torch.float32) -> Any:
    """The converted weights as a new model of the backbone's own class, on the CPU.

    Adapters are merged. The mask token's embedding is a row of the embedding: that of its id, or one more where it is a
    new id (the head of an untied model then has one more row of zeros).
    """
    model = copy.deepcopy(backbone.model).cpu()
    _merge(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if method.decoder is not None:
        model.get_submodule(backbone.layout.decoder).load_state_dict(method.decoder.state_dict())
    if method.output is not None:
        model.get_output_embeddings().load_state_dict(method.output.state_dict())
    rows = model.get_input_embeddings().weight.shape[0]
    if method.mask_token_id >= rows:
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        model.resize_token_embeddings(method.mask_token_id + 1, mean_resizing=False)
        if not tied:
            model.get_output_embeddings().weight[rows:] = 0.0
    model.get_input_embeddings().weight[method.mask_token_id] = method.mask_embedding.to("cpu", dtype)
    model.config.mask_token_id = method.mask_token_id
    return model.eval()


def _merge(model: nn.Module) -> None:
    """Put every adapted layer's own layer back, with the adapters' product added to its weight."""
    adapted = [name for name, module in model.named_modules() if hasattr(module, "get_delta_weight")]
    for name in adapted:
        layer = model.get_submodule(name)
        own = layer.get_base_layer()
        own.weight.data += layer.get_delta_weight("default").to(own.weight.dtype)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, own)


def save_masked(
    method: MaskedLM, backbone: Backbone, folder: str | Path, *, dtype: str = "float32", weights: str | None = None
) -> Path:
    """Write the converted model, the backbone's tokenizer and ``masked.json`` into a folder.

    Args:
        method: trained, e.g. from ``dihal.restore.load_method``.
        backbone: what it was converted from.
        folder: made if it is not there.
        dtype: type of the weights written.
        weights: which weights these are (``ema`` or ``raw``), for the record.

    Raises:
        UsageError: a folder that cannot be written, or an unknown dtype.
    """
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise UsageError(f"unknown dtype {dtype!r}. Valid: float32, bfloat16, float64.")
    with output_dir(folder) as path:
        to_causal_lm(method, backbone, dtype=kind).save_pretrained(path)
        backbone.tokenizer.save_pretrained(path)
        write_json(
            path / _FILE,
            {
                "format": FORMAT,
                "mask_token_id": method.mask_token_id,
                "attention": "full",
                "shift": 1,
                "weights": weights,
                "backbone": dataclasses.asdict(backbone.reference),
                "backbone_fingerprint": backbone.fingerprint(),
                "method": to_dict(method.config),
            },
        )
    return path


def load_masked(
    path: str | Path, *, device: str = "auto", dtype: str = "float32", attention: str = "sdpa"
) -> tuple[MaskedLM, Backbone]:
    """Open a folder of :func:`save_masked`.

    Returns:
        The masked diffusion LM, frozen, and the converted model as a backbone: the same weights, for whatever runs a
        causal LM's modules. Both are to be called with this backbone.

    Raises:
        UsageError: no such folder, a training run (with how to open it), or files of another format.
    """
    from dihal.backbone import load_backbone

    path = Path(path)
    if not (path / _FILE).is_file():
        hint = (
            "It is a training run: open it with dihal.restore.load_method, and save it with dihal.masked.save_masked."
            if any((place / "checkpoints").is_dir() for place in (path, *path.parents[:2]))
            else "Give a folder written by dihal.masked.save_masked."
        )
        raise UsageError(f"{str(path)!r} holds no {_FILE}. {hint}")
    about = read_json(path / _FILE)
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise UsageError(f"{str(path / _FILE)!r} is not of the format {FORMAT!r}. Use the version that wrote it.")
    backbone = load_backbone(str(path), device=device, dtype=dtype, attention=attention)
    config = dataclasses.replace(from_dict(MethodConfig, about["method"]), lora=LoraConfig())
    method = MaskedLM(config, backbone, mask_token_id=int(about["mask_token_id"]), shared=True)
    return method.to(backbone.device).eval().requires_grad_(False), backbone
