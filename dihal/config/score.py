"""Options of the geometry score."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dihal.config.parts import BackboneConfig, DataConfig

__all__ = ["Coordinates", "ScoreConfig", "ScoreRunConfig"]

Coordinates = Literal["raw", "rms", "standardized"]


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Definitions of the score."""

    tokens: int = 16_384
    """Tokens scored; documents are drawn whole until they are reached."""
    sequence_length: int = 512
    """Longest window of a document seen by the backbone at once, in tokens."""
    batch_tokens: int = 2_048
    """Tokens per forward pass (memory, not results)."""
    coordinates: tuple[Coordinates, ...] = ("raw", "rms", "standardized")
    """Coordinates in which the proxies are computed; `select_by` must be one of them."""
    select_by: Coordinates = "rms"
    """Coordinates whose score selects the split."""
    drop_first: bool = True
    """Drop position 0 of every window (attention sink)."""
    norm_factor: float = 10.0
    """Drop tokens whose norm exceeds this multiple of the layer's median; inf keeps all."""
    neighbours: int = 32
    """k of the local curvature."""
    anchors: int = 512
    """Anchor tokens of the local curvature."""
    pool: int = 6_144
    """Tokens kept per layer for neighbours and intervals (a uniform sample when more are scored)."""
    rho: float = 1e-3
    """Ridge of the global stiffness, in units of the mean eigenvalue."""
    stiffness: Literal["smallest_precision", "mean_precision", "log_det"] = "smallest_precision"
    """Definition of the global stiffness."""
    rank: Literal["entropy", "participation"] = "entropy"
    """Definition of the effective rank."""
    bootstrap: int = 1_000
    """Document resamples behind the intervals; 0: no intervals."""
    confidence: float = 0.95
    """Coverage of the intervals."""
    seed: int = 0
    """Seed of documents, pool, anchors and resamples."""


@dataclass(frozen=True, kw_only=True)
class ScoreRunConfig:
    """`dihal score`: score the hidden layers of a backbone by geometry."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The backbone."""
    data: DataConfig = field(default_factory=DataConfig)
    """The text. Scoring uses the training documents only."""
    score: ScoreConfig = field(default_factory=ScoreConfig)
    """The score."""
    out: str = "runs/score"
    """Output folder for scores.json, scores.png and scores.svg."""
