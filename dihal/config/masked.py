"""Conversion of a causal LM into a masked diffusion LM (regime `mask`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dihal.config.parts import BackboneConfig, DataConfig

__all__ = ["BoundConfig", "MaskedConfig"]


@dataclass(frozen=True, kw_only=True)
class MaskedConfig:
    """How the backbone is post-trained. With `lora.rank` 0 all of its weights are (a copy's), else adapters alone."""

    mask_token: str | None = None
    """Token of the vocabulary that stands for a masked position, e.g. an unused special one; it gets a learned embedding of its own, is never written and never predicted. None: a new id, one above the vocabulary."""
    anneal: float = 0.2
    """Share of the budget over which attention opens from causal to full: each pair above the diagonal is visible with a probability that rises linearly; 0: full from the start."""
    weight: Literal["bound", "uniform"] = "bound"
    """Weight of the cross-entropy of masked tokens at time t: `bound`, 1 / t, which makes the loss a bound of the negative log-likelihood; `uniform`, the same at every t."""
    smallest: float = 1e-3
    """Least t of training (t is the probability that a token is masked); below it 1 / t varies too much."""
    conditional: float = 0.0
    """Share of sequences of which `method.known` says what is given: those tokens are never masked, and not predicted."""


@dataclass(frozen=True, kw_only=True)
class BoundConfig:
    """`python -m dihal.evaluation.masked`: bound of the negative log-likelihood of held-out text under a masked diffusion LM, beside the backbone's own."""

    checkpoint: str = ""
    """Run folder or checkpoint folder of the regime `mask`."""
    backbone: BackboneConfig | None = None
    """How to hold the backbone (dtype, device, or where it lies now); None: as trained."""
    data: DataConfig | None = None
    """Text; None: the validation documents of the checkpoint's data."""
    tokens: int = 32_768
    """Validation tokens measured; documents are drawn until they are reached."""
    windows_per_document: int | None = 4
    """Windows of `sequence_length` taken from a document at most, its first; null: all."""
    draws: int = 16
    """Masks per window, evenly spread over the noise levels."""
    batch_size: int = 32
    """Windows per forward pass (memory, not results)."""
    weights: Literal["ema", "raw"] = "ema"
    """Averaged or last weights (a checkpoint without an average has only the last)."""
    bootstrap: int = 1_000
    """Document resamples behind each interval."""
    confidence: float = 0.95
    """Coverage of the intervals."""
    seed: int = 0
    """Seed of documents, masks and resamples."""
    out: str = "results/masked.json"
    """The result file."""
