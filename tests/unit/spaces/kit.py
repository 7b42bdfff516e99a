"""Batches of tokens and what the tests of all spaces share."""

from __future__ import annotations

import torch

from dihal.backbone import Backbone
from dihal.config.method import MethodConfig
from dihal.data.batch import Batch
from dihal.spaces.base import NoiseKey, Space
from dihal.spaces.build import build_space

__all__ = ["batches", "built", "ids_of", "key", "positions"]


def ids_of(batch: int = 4, time: int = 12, *, vocab: int = 97, seed: int = 0) -> torch.Tensor:
    """Random tokens, the first of every row the start token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (batch, time), generator=generator)
    ids[:, 0] = 0
    return ids


def positions(ids: torch.Tensor) -> torch.Tensor:
    """0, 1, 2, ... in every row."""
    return torch.arange(ids.shape[1]).expand(ids.shape)


def batches(count: int = 4, batch: int = 8, time: int = 16, *, vocab: int = 97) -> list[Batch]:
    """Windows without padding."""
    found = []
    for index in range(count):
        ids = ids_of(batch, time, vocab=vocab, seed=100 + index)
        full = torch.ones_like(ids, dtype=torch.bool)
        found.append(
            Batch(
                input_ids=ids,
                attention_mask=full,
                document_ids=torch.zeros_like(ids),
                loss_mask=full,
                sample_ids=torch.arange(batch) + index * batch,
                full=True,
            )
        )
    return found


def key(ids: torch.Tensor, *, purpose: str = "noise", seed: int = 0) -> NoiseKey:
    """Position i of row r has the key 1000 r + i."""
    rows = torch.arange(ids.shape[0])[:, None] * 1000
    return NoiseKey(seed=seed, purpose=purpose, ids=rows + positions(ids))


def built(config: MethodConfig, backbone: Backbone) -> Space:
    """The space of a method, fitted on `batches()`."""
    space = build_space(config, dim=backbone.hidden_size, vocab=backbone.vocab_size)
    space.fit(backbone, batches(vocab=backbone.vocab_size))
    return space
