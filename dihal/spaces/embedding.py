"""The space `embedding`: normalised token embeddings (CDCD, arXiv 2211.15089; LangFlow; Plaid, arXiv 2305.18619).

A token's clean state is its row of the pretrained input embedding: centred, of unit length, scaled to sqrt(dim).
Rows of one length make the posterior of a token given the noised state alone linear in its row, up to the prior:

    log p(w | z_t) = log p(w) - |z_t - alpha e_w|^2 / (2 sigma^2) + const = log p(w) + (alpha / sigma^2) z_t . e_w + const

The network's output v is read as logits v . e_w / sqrt(dim), and with `output_prior` the term above is added, so
that the network supplies what the context says and not what z_t says by itself. The clean-state estimate is the
mean of the rows under these probabilities (score interpolation); it is what solvers and self-conditioning use.

Differences from the publications: the rows are pretrained, frozen and centred (theirs are learned, and centre
themselves); the solver's last step returns probabilities, from which the caller draws or takes the best; the output
prior is not warmed up.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dihal.config.spaces import EmbeddingConfig
from dihal.diffusion.process import Process, expand_time
from dihal.diffusion.schedule import Schedule
from dihal.errors import UsageError
from dihal.spaces.base import Estimate, NoiseKey
from dihal.spaces.hidden_state import VectorSpace, gaussian_noise
from dihal.spaces.readout import TableCache, expected_rows, token_shares
from dihal.spaces.recovery import suffix_loss
from dihal.types import Mask, Padding, PerPosition, State, Time, TokenIds

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.data.batch import Batch

__all__ = ["BoundTerms", "EmbeddingSpace", "check_bound_schedule"]

PositionIds = Int[Tensor, "batch time"]

_LEAST_VARIANCE = 1e-3
"""Noise variance below which the output prior stays as it is: every token is certain there, and numbers stay small."""


@dataclass(frozen=True, kw_only=True)
class BoundTerms:
    """Outcome of :meth:`EmbeddingSpace.bound_terms`, in nats.

    Attributes:
        total: mean over the counted positions; differentiable.
        reconstruction: per position, detached: tokens given the state at t = 0.
        diffusion: per position, detached: the path from noise to it.
        prior: per position: the state at t = 1 against pure noise.
    """

    total: Float[Tensor, ""]
    reconstruction: PerPosition
    diffusion: PerPosition
    prior: PerPosition


def check_bound_schedule(schedule: Schedule) -> None:
    """Refuse schedules under which the bound is infinite.

    Raises:
        UsageError: log-SNR infinite at an end.
    """
    ends = schedule.log_snr(torch.tensor([0.0, 1.0], dtype=torch.float64))
    if not bool(ends.isfinite().all()):
        raise UsageError(
            "method.embedding.bound needs a schedule with finite log-SNR at both ends: "
            "set method.process.schedule to gumbel or log_linear."
        )


class EmbeddingSpace(VectorSpace):
    """Token embeddings of one length; the network writes features of the tied softmax.

    Args:
        config: channels, output prior, bound.
        dim: hidden size d of the backbone.
        vocab: its vocabulary size V.
        chunk: positions whose logits exist at once.

    Raises:
        UsageError: more channels than the backbone has.
    """

    predicts_state = False
    mean: Tensor
    directions: Tensor

    def __init__(self, config: EmbeddingConfig, dim: int, vocab: int, *, chunk: int) -> None:
        super().__init__()
        width = dim if config.dim is None else config.dim
        if not 1 <= width <= dim:
            raise UsageError(f"method.embedding.dim is {width}; it must be in [1, {dim}], the hidden size.")
        self.split = 0
        self.input_dim = self.output_dim = width
        self.config = config
        self.vocab = vocab
        self.chunk = chunk
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("directions", torch.eye(dim, width))
        self._cached = TableCache()
        self._memory: tuple[weakref.ref[Tensor], Tensor] | None = None

    def rows(self, backbone: Backbone) -> Float[Tensor, "vocab width"]:
        """e_w of every token, of length sqrt(width), in the backbone's dtype."""
        width = self.input_dim

        def make(weight: Tensor) -> Tensor:
            centred = weight - self.mean
            if width < len(self.mean):
                # Directions are those of unit rows: a few long rows must not choose them.
                centred = _unit(centred) @ self.directions
            return _unit(centred) * width**0.5

        return self._cached(backbone, "rows", (self.mean, self.directions), make)

    @torch.no_grad()
    def fit(self, backbone: Backbone, batches: Iterable[Batch]) -> int:
        """Measure the mean row over training tokens, and the leading principal directions of unit rows around it."""
        weight = backbone.input_embedding.weight.detach().double()
        share, seen = token_shares(backbone, batches)
        # Around the mean over the text, where unit variance is wanted; unseen tokens are centred with it.
        self.mean.copy_((share * weight).sum(0))
        if self.input_dim < len(self.mean):
            unit = _unit(weight - self.mean)
            moment = (unit * share).T @ unit
            _, vectors = torch.linalg.eigh(moment)
            self.directions.copy_(vectors.flip(-1)[:, : self.input_dim])
        return seen

    @torch.no_grad()
    def encode(
        self,
        backbone: Backbone,
        input_ids: TokenIds,
        *,
        attention_mask: Padding | None = None,
        position_ids: PositionIds | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch time width"]:
        """Rows of the tokens, fp32."""
        return self.rows(backbone)[input_ids].float()

    def noised(self, process: Process, clean: State, t: Time, key: NoiseKey) -> State:
        """z_t = alpha e + sigma eps."""
        return process.noise(clean, t, gaussian_noise(key, self.input_dim))

    def network_input(self, noised: State, t: Time) -> State:
        """The noised state: rows of length sqrt(width) and a variance-preserving process have unit variance."""
        return noised

    def known_input(self, clean: State) -> State:
        """The row."""
        return clean

    def interpret(self, process: Process, out: State, noised: State, t: Time, position_ids: PositionIds) -> Estimate:
        """Features f with logits f . e_w."""
        features = out.float() / self.input_dim**0.5
        if self.config.output_prior:
            time = expand_time(t, noised)
            schedule = process.schedule
            prior = schedule.alpha(time) / schedule.sigma(time).square().clamp_min(_LEAST_VARIANCE)
            features = features + prior * noised
        return Estimate(features=features, x0=None)

    def logits(self, backbone: Backbone, features: Float[Tensor, "*shape k"]) -> Float[Tensor, "*shape vocab"]:
        """features . e_w, in the backbone's dtype."""
        table = self.rows(backbone)
        with torch.autocast(table.device.type, enabled=False):
            return features.to(table.dtype) @ table.T

    def clean_features(self, clean: State, position_ids: PositionIds) -> None:
        """None: the rows are their own head."""
        return None

    def expected(self, backbone: Backbone, features: Float[Tensor, "batch time k"]) -> State:
        """Mean of the rows under the softmax (score interpolation), fp32, differentiable."""
        return expected_rows(lambda part: self.logits(backbone, part), features, self.rows(backbone), self.chunk)

    @torch.no_grad()
    def feedback(self, backbone: Backbone, estimate: Estimate) -> State:
        """The mean of the rows, detached."""
        # A sampling step wants it twice, for the solver and for self-conditioning; it costs as much as the network.
        if self._memory is not None and self._memory[0]() is estimate.features:
            return self._memory[1]
        x0 = self.expected(backbone, estimate.features)
        self._memory = (weakref.ref(estimate.features), x0)
        return x0

    def hidden(self, backbone: Backbone, estimate: Estimate, position_ids: PositionIds) -> State:
        """Mean of the raw embeddings under the softmax, as it would enter block 0."""
        raw = backbone.input_embedding.weight.detach()
        mean = expected_rows(lambda part: self.logits(backbone, part), estimate.features, raw, self.chunk)
        # What the model does between table and block 0 is affine: one factor, and for learned positions an offset.
        first = torch.zeros_like(position_ids)
        with torch.no_grad(), torch.autocast(raw.device.type, enabled=False):
            scale = self._scale(backbone)
            offset = backbone.embed(first, position_ids=position_ids).float() - scale * raw[0].float()
        return (scale * mean + offset).to(backbone.dtype)

    def _scale(self, backbone: Backbone) -> Tensor:
        def make(weight: Tensor) -> Tensor:
            ids = torch.arange(min(256, len(weight)), device=weight.device)[:, None]
            entering = backbone.embed(ids, position_ids=torch.zeros_like(ids))[:, 0].float()
            table, entering = weight[ids[:, 0]] - weight[0], entering - entering[0]
            return (table * entering).sum() / table.square().sum()

        return self._cached(backbone, "scale", (), make).float()

    def clean_estimate(self, backbone: Backbone, estimate: Estimate) -> State:
        """The mean of the rows."""
        return self.feedback(backbone, estimate)

    def bound_terms(
        self,
        backbone: Backbone,
        process: Process,
        estimate: Callable[[Tensor, Time], Estimate],
        input_ids: TokenIds,
        t: Float[Tensor, " batch"],
        key: NoiseKey,
        counted: Mask,
    ) -> BoundTerms:
        """Variational bound on the tokens' negative log-likelihood, by one sample of noise and time (Plaid; VDM).

            -log p(x) <=  E[-log p(x | z_0)]  +  1/2 E_t[-SNR'(t) |e - x0(z_t, t)|^2]  +  KL(q(z_1 | x) || N(0, 1))

        per position, where t is uniform in [0, 1], -SNR' = 2 SNR (sigma'/sigma - alpha'/alpha), z_0 is the state at
        t = 0, which is noised, and p(x | z_0) the softmax read from the network there. Its mean over noise and times
        bounds the likelihood under the process that the denoiser defines in continuous time.

        Plaid gives some sequences to the first term and the others to the second; here every sequence has both, so
        ``estimate`` is called twice.

        Args:
            backbone: for its embedding.
            process: its schedule must be finite at both ends (`gumbel`, `log_linear`).
            estimate: (noised, t (batch,)) -> estimate; runs the denoiser.
            input_ids: the tokens.
            t: uniform in [0, 1]: no share of terminal times, no other law.
            key: of the noise.
            counted: positions whose tokens are to be explained; the bound is on them given the others.

        Raises:
            UsageError: a schedule without noise at t = 0 or with signal-to-noise 0 at t = 1.
        """
        schedule = process.schedule
        check_bound_schedule(schedule)
        clean = self.encode(backbone, input_ids)
        x0 = self.expected(backbone, estimate(self.noised(process, clean, t, key), t).features)
        time = t.double()
        alpha, sigma = schedule.alpha(time), schedule.sigma(time)
        rate = (alpha / sigma) ** 2 * (schedule.sigma_dot(time) / sigma - schedule.alpha_dot(time) / alpha)
        diffusion = rate.float()[:, None] * (clean - x0).square().sum(-1)

        zero = torch.zeros_like(t)
        first = self.noised(process, clean, zero, replace(key, purpose=f"{key.purpose} end"))
        features = estimate(first, zero).features
        weight = counted.float() / counted.sum().clamp_min(1)
        read = suffix_loss(
            features.flatten(0, 1),
            input_ids.flatten(),
            lambda part: self.logits(backbone, part),
            weight_ce=weight.flatten(),
            weight_kl=torch.zeros_like(weight).flatten(),
            chunk=self.chunk,
        )

        one = torch.ones((), dtype=torch.float64, device=t.device)
        signal, noise = schedule.alpha(one) ** 2, schedule.sigma(one) ** 2
        prior = 0.5 * (noise - 1 - noise.log() + signal * clean.double().square()).sum(-1)
        return BoundTerms(
            total=read.total + ((diffusion + prior.float()) * weight).sum(),
            reconstruction=read.cross_entropy.view(input_ids.shape),
            diffusion=diffusion.detach(),
            prior=prior.float(),
        )


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)
