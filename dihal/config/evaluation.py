"""Evaluation, leaderboard, generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dihal.config.parts import BackboneConfig, DataConfig

__all__ = ["EvalConfig", "GenerateConfig", "LeaderboardConfig"]


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """`dihal evaluate`: measure checkpoints beside the rows that are always there."""

    checkpoints: tuple[str, ...] = ()
    """Run folders or checkpoint folders; all must share backbone and tokenizer."""
    backbone: BackboneConfig | None = None
    """How to hold the backbone (dtype, device, or where it lies now); None: as trained."""
    data: DataConfig | None = None
    """Text; None: the validation documents of the first checkpoint's data."""
    tokens: int = 8_192
    """Validation tokens measured; documents are drawn until they are reached."""
    windows_per_document: int | None = 4
    """Windows of `sequence_length` taken from a document at most, its first; null: all. Documents are what intervals resample: many short pieces say more than few long ones."""
    batch_size: int = 8
    """Sequences per forward pass."""
    controls: tuple[
        Literal[
            "embedding",
            "mean-state",
            "untrained",
            "oracle",
            "shuffled",
            "random-suffix",
            "unigram",
            "bigram",
            "trigram",
        ],
        ...,
    ] = ("embedding", "mean-state", "untrained", "oracle", "shuffled", "random-suffix", "unigram", "bigram", "trigram")
    """Untrained rows beside backbone and identity. `untrained`, `oracle` and `shuffled` run each checkpoint once more; the others cost a suffix, or less."""
    steps: tuple[int, ...] = (1, 4)
    """Numbers of sampling steps."""
    sampler: Literal["euler", "heun", "ddim", "ancestral", "dpmpp_2m"] | None = None
    """Solver; None: the checkpoint's own."""
    weights: Literal["ema", "raw"] = "ema"
    """Averaged or last weights (a checkpoint without an average has only the last)."""
    samples: int = 16
    """Continuations generated per row; 0: none."""
    prompt_tokens: int = 32
    """Prefix of a validation document given to each continuation."""
    new_tokens: int = 32
    """Tokens generated per continuation (fixed length)."""
    temperature: float = 1.0
    """Sampling temperature; 0: greedy."""
    scorer: str | None = None
    """Hub id or folder of the causal LM that scores samples; None: the backbone itself, marked as self-graded."""
    bootstrap: int = 1_000
    """Document resamples behind each interval."""
    confidence: float = 0.95
    """Coverage of the intervals."""
    reference: str = "backbone"
    """Row against which paired differences are taken."""
    seed: int = 0
    """Seed of documents, sampling noise, generation and resamples."""
    out: str = "results/evaluation"
    """Folder for one JSON per row."""
    leaderboard: bool = True
    """Write the leaderboard of the folder afterwards."""


@dataclass(frozen=True, kw_only=True)
class LeaderboardConfig:
    """`dihal leaderboard`: rank result files that may be compared."""

    results: tuple[str, ...] = ("results",)
    """Result files, or folders searched for them."""
    sort_by: str = "kl"
    """Metric that ranks (lower or higher is better by its own definition)."""
    out: str | None = None
    """Folder for leaderboard.md, .csv and .html; None: terminal only."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """`dihal generate`: continue a prompt with a trained hybrid."""

    checkpoint: str = ""
    """Run folder, checkpoint folder or saved hybrid."""
    prompt: str = ""
    """Text to continue."""
    new_tokens: int = 64
    """Tokens at most."""
    temperature: float = 0.0
    """Sampling temperature; 0: greedy."""
    steps: int | None = None
    """Sampling steps per token; None: the checkpoint's own."""
    seed: int = 0
    """Seed of noise and sampling."""
    backbone: BackboneConfig | None = None
    """How to hold the backbone; None: as trained."""
    compare: bool = False
    """Also print the backbone's own continuation."""
