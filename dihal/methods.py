"""Methods: where a state space, a process, a denoiser, an objective and a sampler meet.

``METHODS`` maps a name to its builder. Everything below this file is shared by all of them; this is
the only place that tells one method from another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dihal.config.method import MethodConfig
from dihal.diffusion.guidance import evaluations_per_estimate, guided
from dihal.diffusion.process import Process, build_process
from dihal.diffusion.samplers import nfe, sample
from dihal.diffusion.timesteps import sample_times
from dihal.errors import UsageError, unknown_name
from dihal.masked.model import MaskedLM
from dihal.method_parts import (
    LossOutput,
    ReadBySuffix,
    SamplingCache,
    StaticSamplingCache,
    check_method,
    corrupt,
    hide,
    metered,
    own_dtype,
    positions_of,
    suffix_terms,
)
from dihal.nn.cache import DenoiserCache, StaticDenoiserCache
from dihal.nn.transformer import DenoiserTransformer
from dihal.random import normal, uniform
from dihal.spaces.hidden import HiddenSpace
from dihal.spaces.metric import FisherMetric, build_metric
from dihal.types import Mask, Padding, State, Time, TokenIds
from dihal.writer import Writer
from dihal.writing.warm_start import require_alike

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.data import Batch

__all__ = ["METHODS", "AnyMethod", "LossOutput", "Method", "SamplingCache", "build_method", "positions_of"]

_MAX_POSITIONS = 1 << 20
"""Positions that a sampling-noise key leaves room for: key = sample id * this + position."""


class Method(ReadBySuffix):
    """A trainable replacement of prefix(l). Holds no backbone: every call is given one.

    Args:
        config: the parts; ``config.split`` must be set.
        dim: hidden size of the backbone.
        noise_scale: 1 for diffusion; 0 for the regression control, which sees z_1 = 0 at t = 1 only.
    """

    def __init__(self, config: MethodConfig, dim: int, *, noise_scale: float = 1.0) -> None:
        super().__init__()
        check_method(config)
        self.config = config
        self.dim = dim
        self.noise_scale = noise_scale
        self.space = HiddenSpace(config.split, dim)
        self.condition_space = HiddenSpace(0, dim)
        self.process: Process = build_process(config.process)
        self.denoiser = DenoiserTransformer(config.denoiser, state_dim=dim, condition_dim=dim)
        if config.objective.condition_dropout == config.objective.hidden == 0.0:
            # No loss term reaches it: DDP would wait for its gradient, and a resumed optimiser for its state.
            self.denoiser.null_condition.requires_grad_(False)
        self.metric = build_metric(config.objective, dim)

    @property
    def split(self) -> int:
        """Number of blocks replaced."""
        return self.space.split

    def new_cache(self, backbone: Backbone) -> SamplingCache:
        """An empty cache for :meth:`states`."""
        return SamplingCache()

    @torch.no_grad()
    def fit_normalisation(self, backbone: Backbone, batches: Iterable[Batch]) -> int:
        """Measure mean and deviation of state and condition; return the tokens used. Called once, before training."""
        held = list(batches)

        def states(split: int) -> Iterator[tuple[State, Tensor, Mask]]:
            for item in held:
                batch = item.to(backbone.device)
                mask = batch.attention_mask
                state = backbone.prefix(batch.input_ids, split, attention_mask=None if batch.full else mask)
                yield state, positions_of(mask), mask

        self.condition_space.fit(states(0))
        return self.space.fit(states(self.split))

    def fit_metric(self, backbone: Backbone, batches: Iterable[Batch], *, seed: int) -> None:
        """Measure the metric of the state error, where it is measured at all. Not saved: call it after a resume, too."""
        if isinstance(self.metric, FisherMetric):
            self.metric.fit(backbone, self.space, batches, seed=seed, chunk=self.config.objective.logit_chunk)

    def _condition(self, backbone: Backbone, input_ids: TokenIds, position_ids: Int[Tensor, "batch time"]) -> State:
        """Normalised token embeddings. The first token is scaled as any other: it may be any token."""
        embedded = backbone.embed(input_ids, position_ids=position_ids)
        return self.condition_space.normalise(embedded, torch.ones_like(position_ids))

    def _estimate(
        self,
        z_t: State,
        t: Time,
        condition: State,
        position_ids: Int[Tensor, "batch time"],
        *,
        attention_mask: Padding | None,
        cache: DenoiserCache | StaticDenoiserCache | None = None,
        drop: Bool[Tensor, " batch"] | Mask | None = None,
        previous: State | None = None,
    ) -> tuple[State, State]:
        """Raw network output and the clean-state estimate it stands for."""
        clip = self.config.objective.norm_clip
        out = self.denoiser(
            self.space.squash(z_t, clip),
            t,
            condition,
            position_ids=position_ids,
            attention_mask=attention_mask,
            cache=cache,
            drop_condition=drop,
            self_condition=None if previous is None else self.space.squash(previous, clip),
        )
        out = out.float()
        return out, self.process.to_x0(out, z_t, t)

    def loss(
        self,
        backbone: Backbone,
        batch: Batch,
        *,
        seed: int,
        step: int,
        batch_index: Int[Tensor, " batch"],
        global_batch: int,
        progress: float = 1.0,
    ) -> LossOutput:
        """Training loss of one micro-batch.

        Args:
            backbone: the frozen backbone; its prefix gives the target, its suffix reads it.
            batch: windows of tokens.
            seed: seed of times, noise and dropped conditions.
            step: optimiser step, which keys the low-discrepancy shift of the times.
            batch_index: place of each sequence in the global batch.
            global_batch: sequences in the global batch.
            progress: share of the budget spent, in [0, 1]; the suffix terms start at ``objective.suffix_start``.
        """
        objective = self.config.objective
        ids, mask = batch.input_ids, batch.attention_mask
        if max(objective.corruption, objective.renaming) > 0 and self.training:
            ids = corrupt(
                ids,
                batch.sample_ids,
                scattered=objective.corruption,
                renamed=objective.renaming,
                seed=seed,
                vocab=backbone.vocab_size,
            )
        position_ids = positions_of(mask)
        full = bool(batch.full)  # known on the host: no padding means the fast attention path everywhere
        attention_mask = None if full else mask
        with torch.no_grad(), own_dtype(backbone):
            condition = self._condition(backbone, ids, position_ids)
            clean = backbone.prefix(ids, self.split, attention_mask=attention_mask, position_ids=position_ids)
        z = self.space.normalise(clean, position_ids)
        t = sample_times(
            self.config.time,
            seed=seed,
            step=step,
            sample_ids=batch.sample_ids,
            batch_index=batch_index,
            batch_size=global_batch,
        )
        eps = normal(seed, batch.sample_ids, "noise", tuple(z.shape[1:]), device=z.device)
        # At noise_scale 0 nothing of z may leak through an alpha(1) that is not quite zero.
        z_t = self.noise_scale * self.process.noise(z, t, eps)
        drop = hide(batch.sample_ids, ids.shape[1], objective.hidden, seed) if objective.hidden > 0 else None
        if objective.condition_dropout > 0:
            whole = uniform(seed, batch.sample_ids, "condition", device=z.device) < objective.condition_dropout
            drop = whole if drop is None else drop | whole[:, None]
        previous = None
        if self.config.denoiser.self_conditioning > 0:
            with torch.no_grad():
                _, previous = self._estimate(z_t, t, condition, position_ids, attention_mask=attention_mask, drop=drop)
                share = uniform(seed, batch.sample_ids, "self-condition", device=z.device)
                previous = previous * (share < self.config.denoiser.self_conditioning)[:, None, None]
        out, x0 = self._estimate(
            z_t, t, condition, position_ids, attention_mask=attention_mask, drop=drop, previous=previous
        )
        meter = metered(backbone, self.denoiser, ids, self.config, null=drop is not None)

        real = mask.float()
        count = real.sum().clamp_min(1)
        error = self.metric(out - self.process.target(z, eps, t)).square().mean(-1)
        weight = self.space.outlier_weight(z, objective.norm_clip) * real
        state = (error * weight).sum() / count
        total = objective.state * state if objective.state > 0 else state.new_zeros(())
        with torch.no_grad():
            ordinary = real * (weight == real) * (position_ids > 0)
            residual = ((x0 - z).square().mean(-1) * ordinary).sum()
            explained = 1 - residual / (z.square().mean(-1) * ordinary).sum().clamp_min(1e-12)
        terms = {"state": state.detach(), "explained": explained}

        if (objective.cross_entropy > 0 or objective.kl > 0) and progress >= objective.suffix_start:
            every = objective.suffix_every if self.training else 1
            keywords = {"meter": meter, "every": every, "kernel": self.kernel, "adapters": tuple(self.lora)}
            keywords["reading"] = self.reading()
            extra, read = suffix_terms(backbone, self.space, objective, batch, clean, x0, position_ids, **keywords)
            total = total + extra
            terms |= read
        tokens = int(ids.numel()) if full else int(mask.sum())
        return LossOutput(total=total, terms=terms, tokens=tokens, flops=meter.flops)

    @torch.no_grad()
    def states(
        self,
        backbone: Backbone,
        input_ids: TokenIds,
        *,
        attention_mask: Padding | None = None,
        position_ids: Int[Tensor, "batch time"] | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        seed: int | None = None,
        sample_ids: Int[Tensor, " batch"] | None = None,
        cache: SamplingCache | StaticSamplingCache | None = None,
        hidden: Mask | None = None,
    ) -> State:
        """Draw h^l given the tokens, in the backbone's dtype.

        Args:
            backbone: gives the condition h^0 (its embedding only is used).
            input_ids: new tokens; with a cache, those after the cached ones.
            attention_mask: real tokens; with a cache it covers cached and new ones.
            position_ids: default: counted from the mask.
            steps, sampler, seed: default: ``config.sampler``.
            sample_ids: key of each row's noise; default 0 for all rows, so that a row's result
                does not depend on the batch it is in.
            cache: keys and values of earlier positions; extended in place.
            hidden: tokens that the bridge is not shown; needs ``objective.hidden`` or ``condition_dropout`` in training.

        The noise at a position depends on (seed, sample id, position) only.
        """
        own = self.config.sampler
        steps = own.steps if steps is None else steps
        sampler = own.name if sampler is None else sampler
        seed = own.seed if seed is None else seed
        if self.noise_scale == 0.0 and steps != 1:
            raise UsageError(f"a regression method has one step, {steps} were asked for. Give steps 1.")
        if hidden is not None and self.config.objective.hidden == self.config.objective.condition_dropout == 0.0:
            raise UsageError("hidden= needs method.objective.hidden or .condition_dropout above 0 in training.")
        batch, time = input_ids.shape
        device = backbone.device
        if position_ids is None:
            whole = (
                torch.ones(batch, time, dtype=torch.bool, device=device) if attention_mask is None else attention_mask
            )
            position_ids = positions_of(whole.bool())[:, -time:]
        condition = self._condition(backbone, input_ids, position_ids)
        rows = torch.zeros(batch, dtype=torch.int64, device=device) if sample_ids is None else sample_ids.to(device)
        keys = rows.unsqueeze(-1) * _MAX_POSITIONS + position_ids

        def noise(step: int) -> State:
            return self.noise_scale * normal(seed, keys, f"sample {step}", (self.dim,), device=device)

        evaluation = 0
        previous: State | None = None

        def estimate(z_t: State, t: Time, drop: Tensor | None) -> State:
            nonlocal evaluation
            _, x0 = self._estimate(
                z_t,
                t,
                condition,
                position_ids,
                attention_mask=attention_mask,
                cache=None if cache is None else cache.at(evaluation),
                drop=drop,
                previous=previous,
            )
            evaluation += 1
            return x0

        everyone = torch.ones(batch, dtype=torch.bool, device=device)
        estimator = guided(
            lambda z_t, t: estimate(z_t, t, hidden), lambda z_t, t: estimate(z_t, t, everyone), own.guidance
        )

        def denoise(z_t: State, t: Time) -> State:
            nonlocal previous
            x0 = estimator(z_t, t)
            if self.config.denoiser.self_conditioning > 0:
                previous = x0
            return x0

        with torch.autocast(device.type, enabled=False):
            z = sample(sampler, denoise, self.process, noise(0), steps=steps, noise=lambda step: noise(step + 1))
        return self.space.denormalise(z, position_ids).to(backbone.dtype)

    def evaluations(self, steps: int, sampler: str | None = None) -> int:
        """Number of function evaluations (NFE) of :meth:`states`."""
        return evaluations_per_estimate(self.config.sampler.guidance) * nfe(
            self.config.sampler.name if sampler is None else sampler, steps
        )


AnyMethod = Method | Writer | MaskedLM
"""What the training loop trains and a checkpoint holds: one class per regime."""


def _bridge(config: MethodConfig, backbone: Backbone | int) -> Method | Writer:
    if config.regime == "replace":
        return Method(config, backbone if isinstance(backbone, int) else backbone.hidden_size)
    whole = _whole(config, backbone)
    writer = Writer(config, dim=whole.hidden_size, vocab=whole.vocab_size)
    if config.denoiser.init == "backbone":
        require_alike(writer.denoiser, whole)
    return writer


def _regression(config: MethodConfig, backbone: Backbone | int) -> Method:
    if config.regime != "replace":
        raise UsageError(
            f"regime {config.regime!r} has no method {config.name!r}: without noise there is nothing to write from. "
            "Set method.name to bridge, or method.regime to replace."
        )
    if config.sampler.steps != 1:
        raise UsageError(f"method 'regression' has one step; method.sampler.steps is {config.sampler.steps}.")
    if config.process.parametrisation != "x0":
        raise UsageError("method 'regression' predicts the state: set method.process.parametrisation to x0.")
    dim = backbone if isinstance(backbone, int) else backbone.hidden_size
    return Method(replace(config, time=replace(config.time, terminal_fraction=1.0)), dim, noise_scale=0.0)


def _masked(config: MethodConfig, backbone: Backbone | int) -> MaskedLM:
    return MaskedLM(config, _whole(config, backbone))


def _whole(config: MethodConfig, backbone: Backbone | int) -> Backbone:
    """The backbone, for the regimes that a hybrid does not have."""
    if isinstance(backbone, int):
        raise UsageError(
            f"a method of the regime {config.regime!r} is no causal LM and cannot be loaded as a hybrid: "
            "write with `dihal generate` or dihal.restore.load_method(path)[0].write(...)."
        )
    return backbone


METHODS: dict[str, Callable[[MethodConfig, Backbone | int], AnyMethod]] = {
    "bridge": _bridge,
    "regression": _regression,
    "masked": _masked,
}
"""Name -> builder(config, backbone or its hidden size)."""


def build_method(config: MethodConfig, backbone: Backbone | int) -> AnyMethod:
    """Build a method with fresh weights (`masked`: with the backbone's), in fp32 on the CPU.

    Args:
        config: the method; ``split`` resolved.
        backbone: the backbone; under `replace` its hidden size is enough.

    Raises:
        UsageError: unknown name (with the near match), a split that the backbone does not have, or
            options that contradict each other.
    """
    if config.name not in METHODS:
        raise unknown_name("method", config.name, METHODS, hint="Add a builder to METHODS in dihal/methods.py.")
    if not isinstance(backbone, int) and config.split is not None and not 0 <= config.split < backbone.num_blocks:
        raise UsageError(
            f"method.split {config.split} is out of range: this backbone has {backbone.num_blocks} blocks, "
            f"so splits 0 to {backbone.num_blocks - 1}."
        )
    if config.regime == "mask" and config.name != "masked":
        raise UsageError(f"regime 'mask' has the method 'masked' only, not {config.name!r}. Set method.name to masked.")
    return METHODS[config.name](config, backbone)
