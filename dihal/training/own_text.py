"""Text a backbone writes by itself, to train a bridge on.

A bridge imitates blocks that were trained on far more text than a user has. What they know about the words of
their own corpus shows in what the model writes: spans drawn from the backbone's next-token distribution, each
after a token drawn uniformly from the whole vocabulary, are the only text of that distribution at hand, and they
show rare tokens with their natural continuations. Training on a model's own samples is data-free distillation
(e.g. Liu et al. 2024, "LLM-QAT", section 3.1, where the first token is random too).
"""

from __future__ import annotations

import hashlib
import logging
import time
from pathlib import Path

import numpy as np
import safetensors
import torch
from jaxtyping import Int, UInt32
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.numpy import save_file
from torch import Tensor

from dihal.backbone import Backbone
from dihal.config.parts import DataConfig
from dihal.io import atomic_path, cache_dir, hash_json
from dihal.meter import Meter
from dihal.random import uniform

__all__ = ["own_text", "own_text_flops"]

_log = logging.getLogger(__name__)

_SCHEMA = 1
_SPANS = 8_192
"""Spans written at once: steps of few sequences are bound by launching kernels."""
_WAIT = 1.0
"""Seconds between two looks for a file."""
_DRAWN = 1 << 27
"""Logits drawn from at once; three fp64 copies are held."""


def own_text(
    backbone: Backbone, config: DataConfig, *, write: bool = True, progress: bool = False
) -> UInt32[np.ndarray, "spans length"]:
    """Spans of the backbone's own text, through the cache.

    Args:
        backbone: whole; it writes at temperature 1.
        config: ``own_tokens``, ``own_length`` and ``seed``.
        progress: show a progress bar on standard error.
        write: False: wait for the process of this node that writes; two would do the same work twice.

    The cache is keyed by the weights' fingerprint and type, for the distribution follows from them.
    """
    spans = max(1, config.own_tokens // config.own_length)
    key = hash_json([_SCHEMA, backbone.fingerprint(), str(backbone.dtype), spans, config.own_length, config.seed])
    target = cache_dir() / "own-text" / f"{key}.safetensors"
    while not write and not target.exists():
        time.sleep(_WAIT)  # before the process group exists; a launcher ends this process when the writer fails
    if target.exists() and (found := _load(target)) is not None:
        return found
    made = _write(backbone, spans, config.own_length, config.seed, progress=progress)
    with atomic_path(target) as staged:
        save_file({"spans": made}, staged, metadata={"sha256": _digest(made)})
    return made


def own_text_flops(backbone: Backbone, config: DataConfig) -> float:
    """FLOPs of writing the spans, whether they came from the cache or not: one forward pass and one head a token."""
    spans = max(1, config.own_tokens // config.own_length)
    meter = Meter(backbone)
    meter.suffix(0, batch=spans, new=config.own_length)
    meter.head(spans * (config.own_length - 1))
    return meter.total


def _digest(spans: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(spans).view(np.uint8).data).hexdigest()


def _load(target: Path) -> np.ndarray | None:
    # As for tokens: a cache can be made again, so a damaged one is reported and replaced.
    try:
        with safetensors.safe_open(target, framework="numpy") as file:
            spans = file.get_tensor("spans")
            expected = (file.metadata() or {}).get("sha256")
        if _digest(spans) == expected:
            return spans
    except (safetensors.SafetensorError, OSError):
        pass
    _log.warning("the cache of own text %s is damaged and is made again", target)
    return None


@torch.inference_mode()
def _write(backbone: Backbone, spans: int, length: int, seed: int, *, progress: bool) -> np.ndarray:
    columns = (TextColumn("the backbone's own text"), BarColumn(), TextColumn("{task.percentage:3.0f}%"))
    out = np.empty((spans, length), dtype=np.uint32)
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not progress) as bar:
        task = bar.add_task("", total=spans * length)
        for first in range(0, spans, _SPANS):
            ids = torch.arange(first, min(first + _SPANS, spans), device=backbone.device)
            out[first : first + len(ids)] = _spans(backbone, ids, length, seed).cpu().numpy()
            bar.advance(task, len(ids) * length)
    return out


def _spans(backbone: Backbone, ids: Int[Tensor, " spans"], length: int, seed: int) -> Int[Tensor, "spans length"]:
    """Draw spans; what a span says depends on its number and the seed only."""
    special = torch.tensor(sorted(set(backbone.tokenizer.all_special_ids)), dtype=torch.long, device=ids.device)
    allowed = torch.ones(backbone.vocab_size, dtype=torch.bool, device=ids.device)
    allowed[special] = False
    ordinary = allowed.nonzero().squeeze(-1)
    start = uniform(seed, ids, "own text/first", dtype=torch.float64)
    tokens = [ordinary[(start * len(ordinary)).long()]]
    cache = backbone.new_cache(0, backbone.num_blocks)
    lead = backbone.start_token_id
    new = tokens[0][:, None]
    if lead is not None:
        new = torch.cat([torch.full_like(new, lead), new], dim=1)
    place = 0
    rows = max(1, _DRAWN // backbone.vocab_size)
    for step in range(1, length):
        positions = torch.arange(place, place + new.shape[1], device=ids.device).expand(len(ids), -1)
        state = backbone.embed(new, position_ids=positions)
        features = backbone.suffix_features(state, 0, position_ids=positions, cache=cache)[:, -1]
        place += new.shape[1]
        drawn = [
            _draw(backbone.head(some[:, None])[:, 0], part, step, seed, special)
            for some, part in zip(features.split(rows), ids.split(rows), strict=True)
        ]
        tokens.append(torch.cat(drawn))
        new = tokens[-1][:, None]
    return torch.stack(tokens, dim=1)


def _draw(logits: Tensor, ids: Tensor, step: int, seed: int, special: Tensor) -> Tensor:
    # The inverse of the cumulative distribution in fp64. Special tokens are left out: what follows the end token
    # would be a text of its own.
    scores = logits.double()
    scores[:, special] = float("-inf")
    cumulative = scores.softmax(-1).cumsum_(-1)
    place = uniform(seed, ids, f"own text/{step}", dtype=torch.float64)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, place).squeeze(-1)
