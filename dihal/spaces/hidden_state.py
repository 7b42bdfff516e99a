"""The space `hidden(l)` under the regime `generate`: normalised residual streams, with an own head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dihal.diffusion.process import Process
from dihal.diffusion.samplers import SAMPLERS, evaluation_times
from dihal.random import normal
from dihal.spaces.base import Estimate, NoiseKey, Space
from dihal.spaces.hidden import HiddenSpace
from dihal.spaces.readout import OwnReadout, head_logits
from dihal.types import Mask, Padding, State, Time, TokenIds

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.data.batch import Batch

__all__ = ["HiddenStateSpace", "VectorSpace", "clean_state", "gaussian_noise", "split_states", "walk_states"]

PositionIds = Int[Tensor, "batch time"]


def gaussian_noise(key: NoiseKey, dim: int, *, purpose: str | None = None) -> State:
    """Standard normal noise (batch, time, dim) of a key."""
    return normal(key.seed, key.ids, key.purpose if purpose is None else purpose, (dim,))


def _positions(input_ids: TokenIds, attention_mask: Padding | None) -> PositionIds:
    batch, time = input_ids.shape
    if attention_mask is None:
        return torch.arange(time, device=input_ids.device).expand(batch, time)
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -time:]


@torch.no_grad()
def clean_state(
    backbone: Backbone,
    input_ids: TokenIds,
    split: int,
    attention_mask: Padding | None,
    position_ids: PositionIds | None,
    state: State | None,
) -> tuple[State, PositionIds]:
    """h^split of tokens (``state`` itself where the caller has it) and their positions; outside of autocast."""
    if position_ids is None:
        position_ids = _positions(input_ids, attention_mask)
    if state is None:
        with torch.autocast(backbone.device.type, enabled=False):
            state = backbone.prefix(input_ids, split, attention_mask=attention_mask, position_ids=position_ids)
    return state, position_ids


def split_states(backbone: Backbone, batches: Iterable[Batch], split: int) -> Iterator[tuple[State, Tensor, Mask]]:
    """(h^split, position ids, real-token mask) of each batch, as :meth:`HiddenSpace.fit` reads them."""
    for item in batches:
        batch = item.to(backbone.device)
        mask = None if batch.full else batch.attention_mask
        state, positions = clean_state(backbone, batch.input_ids, split, mask, None, None)
        yield state, positions, batch.attention_mask


def walk_states(
    process: Process,
    estimate: Callable[[Tensor, Time], Estimate],
    x0_of: Callable[[Estimate], State],
    project: Callable[[Estimate, float], Tensor | None],
    encode: Callable[[TokenIds], Tensor],
    start: NoiseKey,
    dim: int,
    *,
    times: Sequence[float],
    sampler: str,
    weight: float,
) -> Estimate:
    """:meth:`Space.walk` of every space whose states are vectors: a solver on clean-state estimates.

    With projection the solver is given (1 - weight) x0 + weight encode(tokens). The estimate returned is the
    network's own last one.

    Args:
        process: gives the schedule.
        estimate: runs the denoiser.
        x0_of: clean-state estimate of an :class:`Estimate`.
        project: called once per evaluation, whatever the weight.
        encode: tokens -> clean states.
        start: key of the noise.
        dim: channels of a state.
        times: falling grid.
        sampler: entry of ``dihal.diffusion.SAMPLERS``.
        weight: of the re-encoded state.
    """
    at = iter(evaluation_times(sampler, times))
    last: Estimate | None = None

    def denoise(z_t: State, t: Time) -> State:
        nonlocal last
        last = estimate(z_t, t)
        x0 = x0_of(last)
        tokens = project(last, next(at))
        return x0 if tokens is None or weight == 0.0 else torch.lerp(x0, encode(tokens).to(x0.dtype), weight)

    SAMPLERS[sampler](
        denoise,
        process.schedule,
        gaussian_noise(start, dim),
        times,
        lambda step: gaussian_noise(start, dim, purpose=f"{start.purpose} {step}"),
    )
    assert last is not None, "a grid of times has at least one step"
    return last


class VectorSpace(Space):
    """A space whose states are vectors: any solver of ``dihal.diffusion`` walks in it. Abstract."""

    def clean_estimate(self, backbone: Backbone, estimate: Estimate) -> State:
        """The clean state that an estimate stands for: the network's own, where it gives one."""
        assert estimate.x0 is not None, "a space whose network gives no state says here what its estimates stand for"
        return estimate.x0

    def walk(
        self,
        process: Process,
        estimate: Callable[[Tensor, Time], Estimate],
        project: Callable[[Estimate, float], Tensor | None],
        start: NoiseKey,
        shape: tuple[int, int],
        *,
        backbone: Backbone,
        times: Sequence[float],
        sampler: str,
        weight: float,
        temperature: Callable[[float], float],
        encode: Callable[[TokenIds], Tensor] | None = None,
    ) -> Estimate:
        """Any solver of ``dihal.diffusion``; ``temperature`` is not used, the caller's projection has it already."""
        return walk_states(
            process,
            estimate,
            lambda last: self.clean_estimate(backbone, last),
            project,
            (lambda tokens: self.encode(backbone, tokens)) if encode is None else encode,
            start,
            self.input_dim,
            times=times,
            sampler=sampler,
            weight=weight,
        )


class HiddenStateSpace(VectorSpace):
    """h^l normalised per channel; the network writes in the process's parametrisation.

    Args:
        split: the layer index l.
        dim: hidden size d.
        clip: rms beyond which a state (a sink) is shortened before the network sees it.
    """

    predicts_state = True

    def __init__(self, split: int, dim: int, *, clip: float) -> None:
        super().__init__()
        self.split = split
        self.input_dim = self.output_dim = dim
        self.clip = clip
        self.normaliser = HiddenSpace(split, dim)
        self.readout = OwnReadout(dim)

    @torch.no_grad()
    def fit(self, backbone: Backbone, batches: Iterable[Batch]) -> int:
        """Measure mean and deviation per channel; return the tokens used."""
        return self.normaliser.fit(split_states(backbone, batches, self.split))

    @torch.no_grad()
    def encode(
        self,
        backbone: Backbone,
        input_ids: TokenIds,
        *,
        attention_mask: Padding | None = None,
        position_ids: PositionIds | None = None,
        state: State | None = None,
    ) -> State:
        """Normalised h^l, fp32."""
        state, position_ids = clean_state(backbone, input_ids, self.split, attention_mask, position_ids, state)
        return self.normaliser.normalise(state, position_ids)

    def noised(self, process: Process, clean: State, t: Time, key: NoiseKey) -> State:
        """z_t = alpha z + sigma eps."""
        return process.noise(clean, t, gaussian_noise(key, self.input_dim))

    def network_input(self, noised: State, t: Time) -> State:
        """The noised state, outliers shortened."""
        return self.normaliser.squash(noised, self.clip)

    def known_input(self, clean: State) -> State:
        """The clean state, outliers shortened."""
        return self.normaliser.squash(clean, self.clip)

    def interpret(self, process: Process, out: State, noised: State, t: Time, position_ids: PositionIds) -> Estimate:
        """Clean-state estimate and its readout."""
        x0 = process.to_x0(out, noised, t)
        return Estimate(features=self.readout(x0), x0=x0)

    def logits(self, backbone: Backbone, features: Float[Tensor, "*shape k"]) -> Float[Tensor, "*shape vocab"]:
        """The backbone's head on the readout's features."""
        return head_logits(backbone, features)

    def clean_features(self, clean: State, position_ids: PositionIds) -> State:
        """The readout of clean states."""
        return self.readout(clean)

    def feedback(self, backbone: Backbone, estimate: Estimate) -> State:
        """The clean-state estimate, detached, outliers shortened."""
        return self.normaliser.squash(estimate.x0.detach(), self.clip)

    def hidden(self, backbone: Backbone, estimate: Estimate, position_ids: PositionIds) -> State:
        """The estimate in the residual stream's own units."""
        return self.normaliser.denormalise(estimate.x0, position_ids).to(backbone.dtype)
