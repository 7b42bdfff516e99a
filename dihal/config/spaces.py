"""Options of the state spaces, and of writing text in them (regime `generate`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["EmbeddingConfig", "KnownConfig", "LatentConfig", "SimplexConfig", "WritingConfig"]


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """Space `embedding`: normalised token embeddings (CDCD, LangFlow, Plaid)."""

    dim: int | None = None
    """Channels; smaller than the hidden size: projected on the leading principal directions. None: all."""
    output_prior: bool = True
    """Add the log-posterior of each token given the noised state alone to the logits (LangFlow, Plaid)."""
    bound: bool = False
    """Train Plaid's variational bound instead of cross-entropy at every noise level."""


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Space `latent`: h^l compressed per token by an autoencoder, trained first, within the same budget."""

    dim: int = 128
    """Channels of a latent."""
    hidden: int = 1_024
    """Width of the hidden layer of encoder and decoder."""
    stage: float = 0.15
    """Share of the budget for the autoencoder; then it is frozen and the latents are diffused."""
    noise: float = 0.15
    """The decoder is trained on latents noised at times uniform in [0, this]."""
    state: float = 1.0
    """Weight of the decoded state's error in the autoencoder's loss."""
    cross_entropy: float = 0.2
    """Weight of the token's cross-entropy through the own readout in the autoencoder's loss."""
    scale: float = 0.1
    """Weight of the square of log(mean square of a latent) above 0: without it latents grow until no noise reaches them."""


@dataclass(frozen=True, kw_only=True)
class SimplexConfig:
    """Space `simplex`: +k at the token and -k elsewhere, read as W softmax(z_t) (SSD-LM, TESS)."""

    k: float = 5.0
    """Height of a vertex."""
    top_p: float = 0.99
    """Nucleus from which the projection draws a token while sampling; 0: its most likely token."""


@dataclass(frozen=True, kw_only=True)
class KnownConfig:
    """What is given in training under the regime `generate`. The rest of a sequence is noise."""

    prefix_min: int = 1
    """Fewest known tokens at the start."""
    prefix_max: float = 0.75
    """Most known tokens at the start, as a share of the sequence; uniform between."""
    infill: float = 0.1
    """Share of sequences whose end is given, too: its tokens are known, their states are not."""
    scattered: float = 0.0
    """Share of sequences with single later tokens given (each with a probability uniform in [0, 1]); `writing.commit` relies on it."""
    reencoded: float = 0.0
    """Share of self-conditioned sequences that are fed the re-encoded states of the tokens read from the earlier estimate, as `writing.project` makes them, in place of the estimate."""


@dataclass(frozen=True, kw_only=True)
class WritingConfig:
    """How text is written (regimes `generate` and `mask`; each refuses what it has no use for)."""

    steps: int = 64
    """Denoising steps per block."""
    sampler: Literal["euler", "heun", "ddim", "ancestral", "dpmpp_2m"] = "ddim"
    """Solver; the space `simplex` renoises its projection instead."""
    log_snr_center: float | None = None
    """Steps at quantiles of a logistic distribution over log-SNR with this median, e.g. -4: where tokens are decided; None: even in time."""
    log_snr_scale: float = 0.75
    """Its scale."""
    readout: Literal["own", "suffix", "fused"] = "own"
    """Tokens from the space's own head, from the frozen stack, or from the log-linear mix of both."""
    suffix_weight: float = 0.5
    """`fused`: log p = (1 - this) log own + this log suffix, normalised."""
    project: float = 0.0
    """Weight of the re-encoded state of the tokens read at each step in the clean estimate; 0: no projection, 1: only it."""
    project_below: float = 1.0
    """Project only where t is at most this."""
    temperature: float = 0.0
    """Temperature of tokens read at the end, and at t = 0 of those projected on; 0: the most likely."""
    temperature_start: float | None = None
    """Temperature of tokens projected on at t = 1, linear in t in between; None: `temperature` at all times, so that with common noise the tokens settle."""
    common_noise: bool = True
    """Draw the tokens of all steps with the same random numbers per position, so that they settle; off: fresh ones."""
    commit: Literal["none", "confidence"] = "none"
    """`confidence`: after every step a further share of the positions, the surest first, is fixed to its tokens."""
    guidance: float = 1.0
    """Classifier-free guidance on everything known; needs `objective.condition_dropout` in training."""
    order: Literal["confidence", "entropy", "random"] = "confidence"
    """`mask`: which positions a step reveals: those whose drawn token is the most probable, whose distribution has the least entropy, or random ones."""
    top_p: float = 1.0
    """`mask`: tokens are drawn from the smallest set that holds this share of the probability; 1: from all."""
    block: int | None = None
    """Positions denoised together, one block after another with the keys and values of what is written; None: all."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Products of the denoiser; states, solver and tokens stay in fp32 and fp64."""
    static: bool = False
    """Keys and values in room of fixed size; on a GPU a block, with all its steps, is then a CUDA graph (`simplex`: every pass). Not for backbones with sliding windows."""
    compile: bool = False
    """`static`: blocks of denoiser and backbone run compiled, for as many positions as `block` (the first pass of a prompt does not). A minute of compiling for each batch and block size, then fewer kernels; worth it on a GPU."""
    seed: int = 0
    """Seed of noise and tokens."""
