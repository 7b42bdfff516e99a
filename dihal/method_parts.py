"""What a method is made with: its checks, its loss record, its cache, its corrupted tokens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dihal.config.method import MethodConfig
from dihal.errors import UsageError
from dihal.lora import Adapters
from dihal.meter import Meter
from dihal.nn.cache import DenoiserCache, StaticDenoiserCache, StaticPlace
from dihal.random import fuse_normals, uniform
from dihal.spaces.recovery import Kernel, divergence, suffix_loss
from dihal.types import Mask, Padding, State, TokenIds

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.config.method import ObjectiveConfig
    from dihal.data.batch import Batch
    from dihal.nn.transformer import DenoiserTransformer
    from dihal.spaces.hidden import HiddenSpace

__all__ = [
    "LossOutput",
    "ReadBySuffix",
    "SamplingCache",
    "StaticSamplingCache",
    "check_method",
    "corrupt",
    "metered",
    "own_dtype",
    "positions_of",
    "suffix_terms",
]


def positions_of(attention_mask: Padding) -> Int[Tensor, "batch total"]:
    """Position ids under left or right padding: the first real token of each row is 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """Outcome of one micro-batch.

    Attributes:
        total: scalar to differentiate; weighted mean over counted positions.
        terms: detached scalars by name (``state``, ``explained``, ``cross_entropy``, ``kl``).
        tokens: positions denoised, the unit of the budget.
        flops: what was executed, forward and backward, by part of ``dihal.meter.PARTS``.
    """

    total: Float[Tensor, ""]
    terms: dict[str, Tensor]
    tokens: int
    flops: dict[str, float]


class SamplingCache:
    """One denoiser cache per function evaluation of the sampler.

    Position i's evaluation number k attends to what earlier positions looked like in *their*
    evaluation number k. With one cache per evaluation, writing a text token by token repeats the
    arithmetic of denoising the whole text at once: same noise, same time, same keys and values.
    """

    def __init__(self) -> None:
        self.caches: list[DenoiserCache] = []

    def at(self, index: int) -> DenoiserCache:
        """Return the cache of evaluation ``index``, made on first use."""
        while len(self.caches) <= index:
            self.caches.append(DenoiserCache())
        return self.caches[index]

    def reorder(self, rows: Int[Tensor, " batch"]) -> None:
        """Select batch rows, as beam search does."""
        for cache in self.caches:
            cache.reorder(rows)

    @property
    def length(self) -> int:
        """Positions held."""
        return self.caches[0].length if self.caches else 0


class StaticSamplingCache:
    """A :class:`SamplingCache` of fixed size: what a captured pass writes in place."""

    def __init__(self, place: StaticPlace) -> None:
        self._place = place
        self._caches: list[StaticDenoiserCache] = []

    def at(self, index: int) -> StaticDenoiserCache:
        """Return the cache of evaluation ``index``, made on first use."""
        while len(self._caches) <= index:
            self._caches.append(StaticDenoiserCache(self._place))
        return self._caches[index]


class ReadBySuffix(nn.Module):
    """What methods of both regimes have beside their state space: a loss kernel, and adapters in the suffix that reads them.

    Abstract: :class:`dihal.methods.Method` and :class:`dihal.writer.Writer` add ``config``, ``denoiser`` and ``split``.
    """

    config: MethodConfig
    denoiser: DenoiserTransformer

    def __init__(self) -> None:
        super().__init__()
        self.kernel: Kernel = divergence
        """How losses are computed from logits; :meth:`compile_parts` replaces it by the compiled one."""
        self.lora = nn.ParameterList()
        """Weights of the adapters in the backbone's suffix; empty until :meth:`attach`."""
        self._adapters: Adapters | None = None

    def compile_parts(self) -> None:
        """Compile the denoiser's blocks in place, the loss read off the logits, and the generator of noise."""
        self.denoiser.compile_blocks()
        self.kernel = torch.compile(divergence, dynamic=False)
        fuse_normals()

    def attach(self, backbone: Backbone, *, trainable: bool = True) -> None:
        """Inject the LoRA adapters into the backbone's suffix, if the configuration has any. Call it once."""
        if self.config.lora.rank > 0 and self._adapters is None:
            self._adapters = Adapters(backbone, self.config.lora, self.split, trainable=trainable)
            self.lora = nn.ParameterList(self._adapters.parameters())

    @property
    def adapters(self) -> Adapters | None:
        """The adapters of the suffix, if any."""
        return self._adapters

    def reading(self) -> AbstractContextManager[None]:
        """Scope in which the backbone's suffix reads this method's states: with its adapters, if any."""
        if self.config.lora.rank > 0 and self._adapters is None:
            raise UsageError("this method has LoRA adapters: call attach(backbone) before its states are read.")
        return nullcontext() if self._adapters is None else self._adapters.active(training=self.training)


def check_method(config: MethodConfig) -> None:
    """Refuse options that contradict each other.

    Raises:
        UsageError: naming the options and what to set.
    """
    if config.split is None:
        raise UsageError("method.split is not set. Give method.split, or method.split_from a scores.json.")
    if config.regime == "replace" and config.space != "hidden":
        raise UsageError(
            f"regime 'replace' has the space 'hidden' only, not {config.space!r}: every token is known there, so a space "
            "of tokens is known without any diffusion. Set method.regime to generate, or method.space to hidden."
        )
    if config.regime == "replace" and config.denoiser.mask != "causal":
        raise UsageError(
            f"regime 'replace' needs method.denoiser.mask 'causal', not {config.denoiser.mask!r}: "
            "a bridge that sees later tokens leaks the answer."
        )
    if config.regime == "replace" and config.denoiser.init != "random":
        raise UsageError(
            f"method.denoiser.init is {config.denoiser.init!r}: copies of the blocks that are replaced would be no "
            "replacement. Set it to random, or method.regime to generate."
        )
    if config.sampler.guidance != 1.0 and config.objective.condition_dropout == 0.0:
        raise UsageError(
            "method.sampler.guidance needs method.objective.condition_dropout > 0: "
            "without it the unconditional estimate is never trained."
        )
    weights = (config.objective.state, config.objective.cross_entropy, config.objective.kl)
    if min(weights) < 0 or max(weights) == 0:
        raise UsageError(
            "the weights method.objective.state, .cross_entropy and .kl must not be negative, "
            f"and one must be positive; got {weights}."
        )
    if config.lora.rank > 0 and config.objective.cross_entropy == config.objective.kl == 0.0:
        raise UsageError(
            "method.lora needs a loss read by the suffix: set method.objective.kl or .cross_entropy above 0, "
            "or method.lora.rank to 0."
        )
    if config.objective.suffix_every < 1:
        raise UsageError(f"method.objective.suffix_every is {config.objective.suffix_every}; it must be at least 1.")
    if not 0.0 <= config.objective.metric_floor <= 1.0:
        raise UsageError(f"method.objective.metric_floor is {config.objective.metric_floor}; it must be in [0, 1].")
    if not 0.0 <= config.objective.hidden <= 0.5:
        raise UsageError(f"method.objective.hidden is {config.objective.hidden}; it must be in [0, 0.5].")
    for name in ("corruption", "renaming"):
        share = getattr(config.objective, name)
        if not 0.0 <= share <= 0.5:
            raise UsageError(f"method.objective.{name} is {share}; it must be in [0, 0.5].")
        if share > 0 and config.objective.cross_entropy > 0:
            raise UsageError(
                f"method.objective.{name} makes next tokens random: it cannot be trained with cross_entropy. "
                "Set one of them to 0."
            )


def corrupt(
    ids: TokenIds, sample_ids: Int[Tensor, " batch"], *, scattered: float, renamed: float, seed: int, vocab: int
) -> TokenIds:
    """Put random vocabulary entries in the place of some tokens; never of the first.

    Args:
        ids: tokens.
        sample_ids: key of each sequence's draws.
        scattered: mean share of positions changed, each by its own entry.
        renamed: mean share of distinct tokens changed, every occurrence within a sequence by the same entry, as
            text about something else would have it.
        seed: of the run.
        vocab: entries to draw from.

    Per sequence each share is uniform in [0, twice the mean].
    """
    time = ids.shape[1]
    changed = ids
    if renamed > 0:
        words = sample_ids[:, None] * vocab + ids
        rate = 2 * renamed * uniform(seed, sample_ids, "rename/rate").unsqueeze(-1)
        other = (vocab * uniform(seed, words, "rename/token", dtype=torch.float64)).long()
        changed = torch.where(uniform(seed, words, "rename/which") < rate, other, changed)
    if scattered > 0:
        rate = 2 * scattered * uniform(seed, sample_ids, "corruption/rate").unsqueeze(-1)
        chosen = uniform(seed, sample_ids, "corruption/place", (time,)) < rate
        other = (vocab * uniform(seed, sample_ids, "corruption/token", (time,), dtype=torch.float64)).long()
        changed = torch.where(chosen, other, changed)
    return torch.cat([ids[:, :1], changed[:, 1:]], dim=1)


def hide(sample_ids: Int[Tensor, " batch"], time: int, mean: float, seed: int) -> Mask:
    """True for tokens that the bridge is not shown: a share uniform in [0, 2 ``mean``] per sequence; never the first."""
    rate = 2 * mean * uniform(seed, sample_ids, "hidden/rate").unsqueeze(-1)
    chosen = uniform(seed, sample_ids, "hidden/place", (time,)) < rate
    return chosen & (torch.arange(time, device=chosen.device) > 0)


def own_dtype(backbone: Backbone) -> torch.autocast:
    """No autocast inside the backbone: the target and the reading of it must be what evaluation will see."""
    return torch.autocast(backbone.device.type, enabled=False)


def metered(
    backbone: Backbone, network: DenoiserTransformer, ids: TokenIds, config: MethodConfig, *, null: bool
) -> Meter:
    """What a bridge's loss runs, but for the suffix terms.

    Args:
        backbone: the backbone.
        network: the denoiser.
        ids: the tokens of the micro-batch.
        config: the method.
        null: conditions were dropped.
    """
    meter, training = Meter(backbone), torch.is_grad_enabled()
    size = {"batch": ids.shape[0], "new": ids.shape[1]}
    meter.prefix(config.split or 0, **size)
    if config.denoiser.self_conditioning > 0:
        meter.denoiser(network, **size, part="self_conditioning")
    meter.denoiser(network, **size, backward=training, null=null)
    if config.objective.metric == "fisher":
        gradient = "input" if training and config.objective.state > 0 else "none"
        meter.product(network.state_dim, network.state_dim, ids.numel(), part="metric", gradient=gradient)
    return meter


def suffix_terms(
    backbone: Backbone,
    space: HiddenSpace,
    objective: ObjectiveConfig,
    batch: Batch,
    clean: State,
    x0: State,
    position_ids: Int[Tensor, "batch time"],
    *,
    meter: Meter,
    every: int = 1,
    kernel: Kernel = divergence,
    reading: AbstractContextManager[None] | None = None,
    adapters: Sequence[Tensor] = (),
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Cross-entropy and KL of the estimate, read by the frozen suffix.

    Args:
        backbone: its blocks from the split on.
        space: of the estimate.
        objective: weights of the terms.
        batch: the tokens, all of them uncorrupted where cross-entropy counts.
        clean: the backbone's own h^l of the tokens that the estimate is for.
        x0: estimate of the normalised state.
        position_ids: of the tokens.
        meter: told what is run.
        every: only every so many-th sequence is read.
        kernel: see :func:`~dihal.spaces.recovery.suffix_loss`.
        reading: scope in which the suffix reads the estimate, with its adapters; the teacher is the frozen suffix.
        adapters: weights of the adapters that are active in it, for the meter.

    Returns:
        Weighted sum (mean over the positions read), and each term by name.

    Raises:
        UsageError: fewer sequences than ``every``.
    """
    if batch.input_ids.shape[0] % every:
        raise UsageError(
            f"method.objective.suffix_every is {every}, which does not divide the micro-batch of "
            f"{batch.input_ids.shape[0]} sequences. Change one of them."
        )
    rows = slice(None, None, every)
    clean, x0, position_ids = clean[rows], x0[rows], position_ids[rows]
    keywords = {"attention_mask": None if batch.full else batch.attention_mask[rows], "position_ids": position_ids}
    with own_dtype(backbone):
        teacher = None
        if objective.kl > 0:
            with torch.no_grad():
                teacher = backbone.suffix_features(clean, space.split, **keywords).flatten(0, 1)
        estimate = space.denormalise(x0, position_ids).to(clean.dtype)
        with reading or nullcontext():
            features = backbone.suffix_features(estimate, space.split, **keywords).flatten(0, 1)
        counted, real = batch.loss_mask[rows].float(), batch.attention_mask[rows].float()
        weight_ce = objective.cross_entropy * counted / counted.sum().clamp_min(1)
        weight_kl = objective.kl * real / real.sum().clamp_min(1)
        loss = suffix_loss(
            features,
            batch.input_ids[rows].roll(-1, dims=1).flatten(),
            backbone.head,
            weight_ce=weight_ce.flatten(),
            weight_kl=weight_kl.flatten(),
            teacher=teacher,
            chunk=objective.logit_chunk,
            kernel=kernel,
        )
    sizes = {"batch": x0.shape[0], "new": x0.shape[1]}
    backward = features.requires_grad
    meter.suffix(space.split, **sizes, adapters=adapters, backward=backward)
    meter.head(len(features), backward=backward)
    if teacher is not None:
        meter.suffix(space.split, **sizes, part="teacher_suffix")
        meter.head(len(teacher))
    terms = {}
    if objective.cross_entropy > 0:
        terms["cross_entropy"] = (loss.cross_entropy * weight_ce.flatten()).sum() / objective.cross_entropy
    if objective.kl > 0:
        terms["kl"] = (loss.kl * weight_kl.flatten()).sum() / objective.kl
    return loss.total, terms
