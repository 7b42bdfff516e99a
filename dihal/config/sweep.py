"""Options of the sweep over splits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dihal.config.score import ScoreConfig
from dihal.config.training import TrainConfig

__all__ = ["PredictorConfig", "SweepConfig", "TextTruthConfig"]


@dataclass(frozen=True, kw_only=True)
class PredictorConfig:
    """Predictors beside the geometry score; all see the scored tokens only."""

    probe_folds: int = 4
    """Parts of the documents; the linear probe of a part is fitted on the others."""
    probe_ridges: tuple[float, ...] = (0.03, 0.3, 3.0, 30.0)
    """Ridges of the linear probe, in units of the mean variance of a channel of h^0; the best on held-out documents counts."""
    intrinsic_discard: float = 0.1
    """Share of anchors, those with the largest ratio of distances, that the intrinsic dimension takes as censored."""
    fisher_tokens: int = 8_192
    """Scored tokens whose gradients give the Fisher indicators (tokens x L x d floats are held); 0: no such predictor."""
    fisher_chunk: int = 1_024
    """Positions whose logits exist at once there (memory, not results)."""
    transfer_ridge: float = 0.1
    """Ridge of weights fitted on another model's ranks, in units of the number of its splits."""


@dataclass(frozen=True, kw_only=True)
class TextTruthConfig:
    """The truth under `generate`: likelihood of what is written, at one entropy for all splits."""

    samples: int = 256
    """Continuations per temperature, each of a prompt of its own."""
    prompt_tokens: int = 32
    """Tokens given, start token included."""
    new_tokens: int = 96
    """Tokens written."""
    temperatures: tuple[float, ...] = (0.0, 0.5, 0.7, 0.85, 1.0, 1.15)
    """Temperatures of the tokens read at the end; the curve through them is read off at one entropy."""
    steps: int = 64
    """Denoising steps per block."""
    writing: str = ""
    """Other options of `method.writing` that the evaluation uses, `KEY=VALUE KEY=VALUE ...`."""
    entropy: float | None = None
    """Entropy (nats) at which splits are compared; None: a tenth of the range that all splits' curves cover below its upper end, at most the real text's."""
    scorer: str | None = None
    """Hub id or folder of the causal LM that scores; None: the backbone itself (self-graded)."""
    batch_size: int = 32
    """Continuations written at once (memory, not results)."""
    seed: int = 0
    """Seed of noise and tokens."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """`dihal sweep`: train the same short method at every split, and compare what predicts the outcome."""

    train: TrainConfig = field(default_factory=TrainConfig)
    """What is trained at every split: backbone, text, method, budget. Its `method.split`, `out` and `seed` are set by the sweep."""
    splits: tuple[int, ...] = ()
    """Splits trained; empty: all of them. Split 0 is a control and never selected."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds; the truth is the mean over them."""
    score: ScoreConfig = field(default_factory=ScoreConfig)
    """Geometry score; its tokens, documents, anchors and seed are those of every other predictor."""
    predictors: PredictorConfig = field(default_factory=PredictorConfig)
    """The other predictors."""
    truth: Literal["kl", "nll", "state_error", "text_nll"] | None = None
    """Truth that orders tables and figures (all are reported); None: `kl` under `replace`, `text_nll` under `generate`."""
    tokens: int = 16_384
    """Validation tokens measured at each split."""
    windows_per_document: int | None = 4
    """Windows taken from a validation document at most; null: all."""
    batch_size: int = 8
    """Sequences per forward pass of the evaluation."""
    steps: int = 1
    """Sampling steps of the evaluation under `replace`."""
    text: TextTruthConfig = field(default_factory=TextTruthConfig)
    """Evaluation under `generate`."""
    weights: Literal["ema", "raw"] = "ema"
    """Averaged or last weights."""
    fitted_on: tuple[str, ...] = ()
    """sweep.json files of other models in this regime, on which signs and weights of predictors are fitted."""
    beside: tuple[str, ...] = ()
    """sweep.json files (another regime, another model) shown beside this one in predictors.md."""
    bootstrap: int = 1_000
    """Document resamples behind the intervals, of truths and of predictors."""
    confidence: float = 0.95
    """Coverage of the intervals."""
    seed: int = 0
    """Seed of validation documents, sampling noise and resamples."""
    keep_checkpoints: bool = False
    """Keep the weights trained at each split; off: only its numbers stay."""
    report: bool = True
    """Off: train and measure the named splits only, for processes that share `out`, each with splits of its own; a call without `splits` then makes the report."""
    out: str = "runs/sweep"
    """Folder for sweep.json, tables, figure, and one folder per trained split."""
