"""Frontier evaluation: text generated at several temperatures and steps, likelihood against entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dihal.config.parts import BackboneConfig, DataConfig

__all__ = ["FrontierConfig"]


@dataclass(frozen=True, kw_only=True)
class FrontierConfig:
    """`dihal frontier`: likelihood of generated text against its entropy, beside real text, the backbone and n-grams."""

    checkpoints: tuple[str, ...] = ()
    """Run folders or checkpoint folders of either regime; all must share backbone, tokenizer and validation text."""
    backbone: BackboneConfig | None = None
    """How to hold the backbone; None: as trained."""
    data: DataConfig | None = None
    """Text of the prompts; None: the validation documents of the first checkpoint's data."""
    samples: int = 1_024
    """Continuations per point and seed, each of a prompt of its own."""
    prompt_tokens: int = 32
    """Tokens given, start token included."""
    new_tokens: int = 96
    """Tokens written (fixed length)."""
    windows_per_document: int | None = None
    """Prompts taken from one document at most; null: as many as it has windows. Documents are what intervals resample."""
    temperatures: tuple[float, ...] = (0.7, 0.8, 0.9, 1.0, 1.1)
    """Sampling temperatures of every row; under `generate` the temperature of the tokens read at the end."""
    steps: tuple[int, ...] = (64,)
    """Sampling steps of `generate` checkpoints, per block."""
    bridge_steps: tuple[int, ...] = (1,)
    """Sampling steps per token of `replace` checkpoints."""
    variants: tuple[str, ...] = ()
    """Ways to write with each `generate` checkpoint, one row each: `LABEL: KEY=VALUE ...` with keys of `method.writing`. An option named here wins over the checkpoint's and over `steps` and `temperatures`. Empty: as the checkpoint says."""
    ngrams: tuple[int, ...] = (1, 2, 3)
    """Orders of the n-gram samplers fitted on the training tokens; empty: none."""
    scorer: str | None = None
    """Hub id or folder of the causal LM that scores; None: the backbone itself, marked as self-graded."""
    entropy: Literal["backbone", "scorer"] = "backbone"
    """Tokenizer in which the entropy of the frontier is counted; both are stored."""
    entropies: tuple[float, ...] = ()
    """Entropies (nats) at which rows are compared; empty: that of the real text. They depend on `new_tokens` and the tokenizer."""
    area: tuple[float, float] | None = None
    """Range of entropies (nats) of the frontier area; None: from one nat below the real text's entropy up to it."""
    self_bleu_samples: int = 256
    """Samples (the first ones) among which self-BLEU is computed."""
    frechet_channels: int = 64
    """Leading principal directions of the real text's features in which the Frechet distance is taken."""
    mauve: bool = True
    """Compute MAUVE where the library mauve-text is installed."""
    bound_cuts: int = 12
    """Noise levels at which the likelihood bound of a `generate` checkpoint in a space of vectors is taken (two estimates each); the best counts. 0: no bound."""
    seeds: tuple[int, ...] = (0,)
    """Sampling seeds; each point writes `samples` continuations with each."""
    batch_size: int = 32
    """Continuations written at once."""
    weights: Literal["ema", "raw"] = "ema"
    """Averaged or last weights (a checkpoint without an average has only the last)."""
    texts: int = 3
    """Continuations per point whose text is stored."""
    bootstrap: int = 1_000
    """Document resamples behind each interval."""
    confidence: float = 0.95
    """Coverage of the intervals."""
    seed: int = 0
    """Seed of the choice of documents and of the resamples."""
    results: tuple[str, ...] = ()
    """Row files, or folders of them, of earlier calls to show in the same tables."""
    measure: bool = True
    """Off: only make tables, figure and page again from the files in `out` and `results`."""
    out: str = "results/frontier"
    """Folder for one JSON per row, the tables, the figure and the page."""
