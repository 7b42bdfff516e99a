"""A method: state space, process, denoiser, objective, sampler."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dihal.config.masked import MaskedConfig
from dihal.config.spaces import EmbeddingConfig, KnownConfig, LatentConfig, SimplexConfig, WritingConfig

__all__ = [
    "DenoiserConfig",
    "LoraConfig",
    "MethodConfig",
    "ObjectiveConfig",
    "ProcessConfig",
    "SamplerConfig",
    "TimeConfig",
]

ScheduleName = Literal["cosine", "linear", "log_linear", "tan", "gumbel"]
ParametrisationName = Literal["x0", "eps", "v", "flow"]
SamplerName = Literal["euler", "heun", "ddim", "ancestral", "dpmpp_2m"]


@dataclass(frozen=True, kw_only=True)
class ProcessConfig:
    """Noising process and what the network predicts."""

    schedule: ScheduleName = "cosine"
    """`cosine` (variance preserving), `linear` (flow: alpha = 1 - t, sigma = t), `log_linear` (log-SNR linear in t), `tan` (alpha = 1 / sqrt(1 + d^2 tan^2(pi t / 2))), `gumbel` (log-SNR is Gumbel-distributed over uniform t; location and scale are learned)."""
    parametrisation: ParametrisationName = "x0"
    """Network output: clean state, noise, v = alpha eps - sigma z, or flow = dz_t/dt."""
    log_snr_max: float = 10.0
    """Log-SNR at t = 0 of `log_linear`; its negative at t = 1."""
    shift: float = 1.0
    """Noise relative to signal of `tan` at t = 1/2; above 1: more noise."""
    gumbel_loc: float = 4.723
    """`gumbel`: first location of -log-SNR (LangFlow's for 768 channels; informative noise levels move by the log of the channels' ratio)."""
    gumbel_scale: float = 0.852
    """`gumbel`: first scale of -log-SNR (LangFlow's)."""
    warp: bool = False
    """Learn a monotone reparametrisation of t under which the loss falls linearly (CDCD)."""


@dataclass(frozen=True, kw_only=True)
class TimeConfig:
    """Distribution of the training time t."""

    law: Literal["uniform", "low_discrepancy", "logit_normal"] = "low_discrepancy"
    """`low_discrepancy`: one shifted grid point per sequence of the global batch."""
    mean: float = 0.0
    """Location of `logit_normal`, on the logit scale; positive: more noise."""
    std: float = 1.0
    """Scale of `logit_normal`, on the logit scale."""
    terminal_fraction: float = 0.25
    """Share of sequences trained at t = 1 exactly: pure noise, where one-step sampling starts."""


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig:
    """The transformer that estimates the clean state."""

    width: int = 384
    """Channels of the residual stream."""
    depth: int = 6
    """Number of blocks."""
    heads: int = 6
    """Attention heads; must divide `width`."""
    mlp_ratio: float = 4.0
    """MLP parameters relative to a plain MLP of this expansion (the gated MLP's width is two thirds of it)."""
    init: Literal["random", "backbone"] = "random"
    """`backbone` (`generate` only): start from copies of the backbone's blocks, from that of the split on; needs their shape, `norm` rms and their `qk_norm`."""
    norm: Literal["adaptive", "rms"] = "adaptive"
    """`adaptive`: time modulates every block through zero-initialised scale, shift and gate; `rms`: time is added to the input."""
    qk_norm: bool = True
    """RMS-normalise queries and keys per head."""
    dropout: float = 0.0
    """Dropout of each block's branches."""
    rope_theta: float = 10_000.0
    """Base of the rotary positions."""
    self_conditioning: float = 0.0
    """Probability that a training step also sees its own earlier estimate; 0: off."""
    mask: Literal["causal", "bidirectional", "mixed"] = "causal"
    """Attention mask. `replace` needs `causal`."""
    attention: Literal["auto", "sdpa", "flex"] = "auto"
    """Kernel of the mask `mixed` where nothing is cached: `flex` skips what no position sees, `sdpa` computes all; `auto`: `flex` on CUDA once the blocks are compiled, from 512 positions on."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Weights of the loss terms. A term of weight 0 is not computed."""

    state: float = 1.0
    """Squared error of the network's target per channel, over positions that are not sinks."""
    cross_entropy: float = 0.0
    """Cross-entropy of the next token through the frozen suffix, in nats."""
    kl: float = 0.0
    """KL(backbone || hybrid) of the next-token distribution, in nats."""
    own: float = 0.0
    """`generate`: cross-entropy of the unknown tokens, read by the own head from the denoised state, in nats."""
    own_time: Literal["uniform", "signal"] = "signal"
    """Weight of `own` over time: `uniform`, or the share of signal alpha^2 / (alpha^2 + sigma^2)."""
    read: float = 0.0
    """`generate`: cross-entropy of the tokens, read by the own head from the clean state; trains the head only."""
    norm_clip: float = 4.0
    """A token whose normalised norm exceeds this multiple of sqrt(d) counts by its relative error instead."""
    condition_dropout: float = 0.0
    """Probability that a sequence is trained without its condition (classifier-free guidance)."""
    hidden: float = 0.0
    """`replace`: mean share of tokens that the bridge is not shown, per sequence uniform in [0, twice this]. The target stays the state of the whole text, which is then no function of the condition: there is a posterior to sample."""
    corruption: float = 0.0
    """Mean share of tokens replaced by random vocabulary entries, per sequence uniform in [0, twice this]. The targets are the backbone's own on the changed tokens, so they stay exact; not with `cross_entropy`."""
    renaming: float = 0.0
    """Mean share of distinct tokens renamed to random vocabulary entries, every occurrence in a sequence alike; drawn and exact as `corruption`."""
    suffix_start: float = 0.0
    """Share of the budget after which the terms read by the suffix begin; before it only the state error is trained."""
    suffix_every: int = 1
    """Only every so many-th sequence of a micro-batch is read by the suffix; must divide it. The state error uses all."""
    metric: Literal["channel", "fisher"] = "channel"
    """What the state error is measured in: `channel`, each normalised channel alike; `fisher`, the directions in which the next-token distributions react (Fisher information of the suffix, measured once before training)."""
    metric_floor: float = 0.2
    """`fisher`: share of the identity mixed in, so that no direction is free."""
    metric_tokens: int = 32_768
    """`fisher`: training tokens from which it is measured."""
    logit_chunk: int = 1_024
    """Positions whose logits exist at once (memory, not results)."""


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How a state is drawn."""

    name: SamplerName = "ddim"
    """Solver."""
    steps: int = 1
    """Sampling steps; function evaluations are reported beside (Heun needs two a step)."""
    guidance: float = 1.0
    """Classifier-free guidance weight; 1: none. Needs `condition_dropout` in training."""
    seed: int = 0
    """Seed of the sampling noise."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on the suffix blocks; off by default."""

    rank: int = 0
    """Rank; 0: no adapters, the suffix stays frozen."""
    alpha: float = 16.0
    """Scale numerator."""
    dropout: float = 0.0
    """Dropout before the adapter."""
    targets: tuple[str, ...] = ()
    """Linear layers by name; empty: every linear layer of attention and MLP."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """One entry of `dihal.methods.METHODS` with its parts."""

    name: str = "bridge"
    """Entry of the method registry."""
    split: int | None = None
    """Blocks replaced. Give this or `split_from`."""
    split_from: str | None = None
    """A scores.json whose selected split is used."""
    regime: Literal["replace", "generate", "mask"] = "replace"
    """`replace`: every token of the context is known, causally. `generate`: a prefix is known, the rest is written. `mask`: the backbone itself is post-trained into a masked diffusion LM (method `masked`)."""
    space: Literal["hidden", "embedding", "latent", "simplex", "tokens"] = "hidden"
    """State space. `mask` has the discrete one, `tokens`, and no other regime has it."""
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    """Options of the space `embedding`."""
    latent: LatentConfig = field(default_factory=LatentConfig)
    """Options of the space `latent`."""
    simplex: SimplexConfig = field(default_factory=SimplexConfig)
    """Options of the space `simplex`."""
    masked: MaskedConfig = field(default_factory=MaskedConfig)
    """Options of the regime `mask`."""
    known: KnownConfig = field(default_factory=KnownConfig)
    """What training gives under `generate`; under `mask` with `masked.conditional`."""
    writing: WritingConfig = field(default_factory=WritingConfig)
    """How text is written under `generate` and `mask`."""
    process: ProcessConfig = field(default_factory=ProcessConfig)
    """Noising process."""
    time: TimeConfig = field(default_factory=TimeConfig)
    """Training times."""
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    """Network."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Loss."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """Default sampler of the trained hybrid."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters on the suffix; under `mask` on all blocks, in place of training the weights."""
    normalisation_tokens: int = 65_536
    """Training tokens from which the state's mean and standard deviation are measured."""
