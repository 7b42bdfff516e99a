"""What a state space is: the one thing in which methods differ (regime `generate`).

    tokens --encode--> clean --noised(t)--> noised --network_input--> denoiser --interpret--> Estimate
                                                                                  |-- logits: tokens by the own head
                                                                                  '-- hidden: h^l for the frozen stack

*Clean* and *noised* states are tensors whose meaning is the space's own business; everything outside
passes them on. For `hidden`, `latent` and `embedding` both are normalised vectors (batch, time, dim); for
`simplex` a clean state is its token's id (batch, time) and a noised state the mixture W softmax(z_t), because
z_t itself would be (batch, time, V).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dihal.diffusion.process import Process
from dihal.types import Padding, State, Time, TokenIds

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.data.batch import Batch

__all__ = ["Estimate", "NoiseKey", "Space"]

PositionIds = Int[Tensor, "batch time"]


@dataclass(frozen=True, kw_only=True)
class NoiseKey:
    """What noise depends on: the same key gives the same noise, in any batch and on any number of devices."""

    seed: int
    purpose: str
    ids: Int[Tensor, "batch time"]
    """Key of each position: sample id and position together."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a network output stands for.

    Attributes:
        features: (batch, time, k); :meth:`Space.logits` makes own-head logits of them.
        x0: estimate of the clean state where the network gives one directly (`hidden`, `latent`), else None.
    """

    features: Float[Tensor, "batch time k"]
    x0: State | None


class Space(nn.Module, ABC):
    """A state space. Implementations are final; a built space holds no backbone.

    Attributes:
        split: number l of blocks whose output :meth:`hidden` stands for; the suffix from l reads it.
        input_dim: channels that the denoiser reads per position (:meth:`network_input`, :meth:`feedback`).
        output_dim: channels that it writes.
        predicts_state: True: the network output is in the process's parametrisation and has a state error;
            False: it is features of the own head, trained by cross-entropy.
    """

    split: int
    input_dim: int
    output_dim: int
    predicts_state: bool

    @abstractmethod
    def fit(self, backbone: Backbone, batches: Iterable[Batch]) -> int:
        """Measure what is measured before training (normalisation, principal directions); return the tokens used."""

    @abstractmethod
    def encode(
        self,
        backbone: Backbone,
        input_ids: TokenIds,
        *,
        attention_mask: Padding | None = None,
        position_ids: PositionIds | None = None,
        state: State | None = None,
    ) -> Tensor:
        """Clean states of tokens. ``state`` is h^split of the same tokens where the caller has it already."""

    @abstractmethod
    def noised(self, process: Process, clean: Tensor, t: Time, key: NoiseKey) -> Tensor:
        """Noised states at time t, (batch,) or (batch, time)."""

    @abstractmethod
    def network_input(self, noised: Tensor, t: Time) -> Float[Tensor, "batch time input_dim"]:
        """What the denoiser reads, at about unit variance per channel."""

    @abstractmethod
    def known_input(self, clean: Tensor) -> Float[Tensor, "batch time input_dim"]:
        """What the denoiser reads where the state is given: the limit of :meth:`network_input` at t = 0."""

    @abstractmethod
    def interpret(self, process: Process, out: State, noised: Tensor, t: Time, position_ids: PositionIds) -> Estimate:
        """What a network output (batch, time, output_dim), in fp32, stands for."""

    @abstractmethod
    def logits(self, backbone: Backbone, features: Float[Tensor, "*shape k"]) -> Float[Tensor, "*shape vocab"]:
        """Own-head logits of x_i from position i's features. Callers go chunk by chunk over positions."""

    @abstractmethod
    def clean_features(self, clean: Tensor, position_ids: PositionIds) -> Float[Tensor, "batch time k"] | None:
        """Features of clean states, by which the own head is trained; None where the head needs no such training."""

    @abstractmethod
    def feedback(self, backbone: Backbone, estimate: Estimate) -> Float[Tensor, "batch time input_dim"]:
        """An earlier estimate as the denoiser reads it (self-conditioning)."""

    @abstractmethod
    def hidden(self, backbone: Backbone, estimate: Estimate, position_ids: PositionIds) -> State:
        """h^split of an estimate, differentiable, in the backbone's dtype: what the frozen stack reads."""

    @abstractmethod
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
        """Run the sampler from pure noise along falling ``times`` and return the network's last estimate.

        Args:
            process: noise schedule and parametrisation.
            estimate: (noised, t of shape (batch,)) -> estimate; runs the denoiser.
            project: (estimate, t) -> tokens (batch, time) to project on, or None for no projection at this t.
            start: key of the initial noise; step k draws with the purpose ``f"{start.purpose} {k}"``.
            shape: (batch, time).
            backbone: re-encodes projected tokens.
            times: grid, first 1.0, last 0.0.
            sampler: name of the solver; a space without a continuous state ignores it and says so in its class.
            weight: of the re-encoded state against the network's own estimate, in [0, 1].
            temperature: of tokens drawn by a space that must draw them (simplex), as a function of t.
            encode: tokens (batch, time) -> their clean states, where that takes what only the caller has (text before
                these positions, caches); None: :meth:`encode` of the tokens alone, at positions from 0.
        """

    def auxiliary_loss(
        self, backbone: Backbone, batch: Batch, clean: Tensor, state: State | None, *, seed: int, progress: float
    ) -> tuple[Tensor, dict[str, Tensor]] | None:
        """A loss of the space's own parts (an autoencoder's), or None. While it is trained, nothing else is."""
        return None

    def stage_share(self) -> float:
        """Share of the budget spent on :meth:`auxiliary_loss` before diffusion is trained."""
        return 0.0

    def needs_state(self) -> bool:
        """Whether :meth:`encode` needs h^split, so that blocks below the split must be run."""
        return self.split > 0

    @torch.no_grad()
    def refit(self, backbone: Backbone, batches: Iterable[Batch]) -> None:
        """Measure again what depends on parts trained in the first stage; called once, between the stages."""
