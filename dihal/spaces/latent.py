"""The space `latent`: h^l compressed per token by an autoencoder (after LD4LG, arXiv 2212.09462, and TEncDM, 2402.19097).

Encoder and decoder are maps of one token: a linear map, first on the leading principal directions (whitened), plus a
perceptron whose last layer starts at zero. So the autoencoder begins as principal component analysis and learns from
there, in a first stage of the same budget: squared error of the decoded normalised state, and cross-entropy of the token
through the own head, decoded from *noised* latents, because what a denoiser hands to the decoder is never exact. Then
it is fixed, latents are normalised once more, and diffusion is trained in them as it is in `hidden`.

Differences from the publications: one latent per token and no fixed number per text (the frozen stack needs a state
per token); a soft bound on a latent's length instead of LD4LG's fixed length, which would cost the principal
components their exactness; the decoder ends in a state of the frozen stack, not in a decoder of its own. LDLM's gradient
from diffusion to the encoder is left out: its constants are not public.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dihal.config.spaces import LatentConfig
from dihal.diffusion.process import Process
from dihal.diffusion.schedule import Schedule
from dihal.errors import UsageError
from dihal.random import normal, uniform
from dihal.spaces.base import Estimate, NoiseKey
from dihal.spaces.hidden import HiddenSpace
from dihal.spaces.hidden_state import VectorSpace, clean_state, gaussian_noise, split_states
from dihal.spaces.readout import OwnReadout, head_logits
from dihal.spaces.recovery import suffix_loss
from dihal.types import Mask, Padding, State, Time, TokenIds

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.data.batch import Batch

__all__ = ["LatentSpace", "TokenMap"]

PositionIds = Int[Tensor, "batch time"]
Latent = Float[Tensor, "batch time width"]


class TokenMap(nn.Module):
    """A x + b + B gelu(C x + c), B = 0 at first; with a copy of these weights that only :meth:`fix` changes.

    Once diffusion is trained, everything goes through the copy. It is what latents were normalised with, it is no
    average of anything, and an optimiser's momentum or weight decay cannot move it, while the live weights may go on
    receiving gradients of zero, as a distributed run wants.

    Args:
        source, target: channels read and written.
        hidden: width of the perceptron.
    """

    def __init__(self, source: int, target: int, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(source, target)
        self.first = nn.Linear(source, hidden)
        self.second = nn.Linear(hidden, target, bias=False)
        nn.init.zeros_(self.second.weight)
        for index, weight in enumerate(self._live()):
            self.register_buffer(f"fixed_{index}", weight.detach().clone())

    def _live(self) -> tuple[Tensor, ...]:
        return (self.linear.weight, self.linear.bias, self.first.weight, self.first.bias, self.second.weight)

    @torch.no_grad()
    def fix(self) -> None:
        """Copy the live weights."""
        for index, weight in enumerate(self._live()):
            getattr(self, f"fixed_{index}").copy_(weight)

    def forward(self, x: Float[Tensor, "*shape source"], *, frozen: bool) -> Float[Tensor, "*shape target"]:
        """Map with the copy (``frozen``: gradients reach ``x`` only) or with the live weights."""
        weights = tuple(getattr(self, f"fixed_{index}") for index in range(5)) if frozen else self._live()
        a, b, c, d, e = weights
        return F.linear(x, a, b) + F.linear(F.gelu(F.linear(x, c, d)), e)


class LatentSpace(VectorSpace):
    """Compressed h^l; the network writes in the process's parametrisation.

    Args:
        config: channels, autoencoder, its loss and its share of the budget.
        schedule: of the noise that the decoder is trained on.
        split: the layer index l.
        dim: hidden size d.
        clip: rms beyond which a state or latent (a sink) counts less and is shortened for the network.
        chunk: positions whose logits exist at once.

    Raises:
        UsageError: a value out of range, or a schedule that is not nearly clean where the decoder is trained.
    """

    predicts_state = True
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(
        self, config: LatentConfig, schedule: Schedule, split: int, dim: int, *, clip: float, chunk: int
    ) -> None:
        super().__init__()
        _check(config, schedule, dim)
        self.split = split
        self.input_dim = self.output_dim = config.dim
        self.dim = dim
        self.config = config
        self.clip = clip
        self.chunk = chunk
        self._process = Process(schedule)
        self.normaliser = HiddenSpace(split, dim)
        self.encoder = TokenMap(dim, config.dim, config.hidden)
        self.decoder = TokenMap(config.dim, dim, config.hidden)
        self.readout = OwnReadout(dim)
        self.register_buffer("latent_mean", torch.zeros(config.dim))
        self.register_buffer("latent_std", torch.ones(config.dim))

    @torch.no_grad()
    def fit(self, backbone: Backbone, batches: Iterable[Batch]) -> int:
        """Measure the normalisation of h^l, then its principal directions, from which both maps start."""
        held = list(batches)
        seen = self.normaliser.fit(split_states(backbone, held, self.split))
        dim, width = self.dim, self.config.dim
        total = torch.zeros(dim, dtype=torch.float64, device=self.latent_mean.device)
        moment = torch.zeros(dim, dim, dtype=torch.float64, device=total.device)
        count = 0
        for z, ordinary in self._ordinary(backbone, held):
            flat = z[ordinary].double()
            total += flat.sum(0)
            moment += flat.T @ flat
            count += len(flat)
        if count <= width:
            raise UsageError(f"{count} tokens are too few for {width} principal directions; give more text.")
        mean = total / count
        values, vectors = torch.linalg.eigh(moment / count - mean[:, None] * mean)
        scale = values.flip(-1)[:width].clamp_min(1e-8).sqrt()
        basis = vectors.flip(-1)[:, :width]
        self.encoder.linear.weight.copy_((basis / scale).T)
        self.encoder.linear.bias.copy_(-(basis / scale).T @ mean)
        self.decoder.linear.weight.copy_(basis * scale)
        self.decoder.linear.bias.copy_(mean)
        self.encoder.fix()
        self.decoder.fix()
        self.latent_mean.zero_()
        self.latent_std.fill_(1.0)
        return seen

    def _ordinary(self, backbone: Backbone, batches: Iterable[Batch]) -> Iterable[tuple[State, Mask]]:
        # Normalised states, and which of them are neither padding nor sinks.
        for state, positions, mask in split_states(backbone, batches, self.split):
            z = self.normaliser.normalise(state, positions)
            yield z, mask & (positions > 0) & (self.normaliser.outlier_weight(z, self.clip) == 1)

    @torch.no_grad()
    def refit(self, backbone: Backbone, batches: Iterable[Batch]) -> None:
        """Fix encoder and decoder as they are, and measure mean and deviation of the latents."""
        self.encoder.fix()
        self.decoder.fix()
        total = torch.zeros(2, self.config.dim, dtype=torch.float64, device=self.latent_mean.device)
        count = 0
        for z, ordinary in self._ordinary(backbone, batches):
            flat = self.encoder(z[ordinary], frozen=True).double()
            total += torch.stack([flat.sum(0), flat.square().sum(0)])
            count += len(flat)
        if count < 2:
            raise UsageError("too few tokens to measure the latents; give more text.")
        mean, square = total / count
        std = (square - mean**2).clamp_min(0).sqrt()
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std.clamp_min(1e-3 * std.mean().clamp_min(1e-12)))

    def stage_share(self) -> float:
        """Share of the budget for the autoencoder."""
        return self.config.stage

    def _encode(self, z: State, *, frozen: bool) -> Latent:
        return (self.encoder(z, frozen=frozen).float() - self.latent_mean) / self.latent_std

    def decode(self, latent: Latent, *, frozen: bool = True) -> State:
        """Normalised h^l of a normalised latent, fp32; gradients pass through."""
        return self.decoder(latent.float() * self.latent_std + self.latent_mean, frozen=frozen).float()

    def auxiliary_loss(
        self, backbone: Backbone, batch: Batch, clean: Tensor, state: State | None, *, seed: int, progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of autoencoder and own head; ``clean`` is not used, it has no gradient."""
        mask = batch.attention_mask
        state, positions = clean_state(backbone, batch.input_ids, self.split, None if batch.full else mask, None, state)
        z = self.normaliser.normalise(state, positions)
        latent = self._encode(z, frozen=False)
        time = batch.input_ids.shape[1]
        t = self.config.noise * uniform(seed, batch.sample_ids, "autoencoder/time", (time,))
        eps = normal(seed, batch.sample_ids, "autoencoder/noise", (time, self.config.dim))
        decoded = self.decode(self._process.noise(latent, t, eps), frozen=False)
        share = mask.float() / mask.sum().clamp_min(1)
        weight = self.normaliser.outlier_weight(z, self.clip) * share
        error = ((decoded - z).square().mean(-1) * weight).sum()
        read = suffix_loss(
            self.readout(decoded).flatten(0, 1),
            batch.input_ids.flatten(),
            lambda part: head_logits(backbone, part),
            weight_ce=share.flatten(),
            weight_kl=torch.zeros_like(share).flatten(),
            chunk=self.chunk,
        )
        length = (latent.square().mean(-1).clamp_min(1.0).log().square() * weight).sum()
        total = self.config.state * error + self.config.cross_entropy * read.total + self.config.scale * length
        with torch.no_grad():
            explained = 1 - error / (z.square().mean(-1) * weight).sum().clamp_min(1e-12)
        terms = {"state": error, "cross_entropy": read.total, "scale": length, "explained": explained}
        return total, {f"autoencoder/{name}": value.detach() for name, value in terms.items()}

    @torch.no_grad()
    def encode(
        self,
        backbone: Backbone,
        input_ids: TokenIds,
        *,
        attention_mask: Padding | None = None,
        position_ids: PositionIds | None = None,
        state: State | None = None,
    ) -> Latent:
        """Normalised latents, fp32."""
        state, position_ids = clean_state(backbone, input_ids, self.split, attention_mask, position_ids, state)
        return self._encode(self.normaliser.normalise(state, position_ids), frozen=True)

    def noised(self, process: Process, clean: Latent, t: Time, key: NoiseKey) -> Latent:
        """z_t = alpha z + sigma eps."""
        return process.noise(clean, t, gaussian_noise(key, self.input_dim))

    def network_input(self, noised: Latent, t: Time) -> Latent:
        """The noised latent, outliers shortened."""
        return self.normaliser.squash(noised, self.clip)

    def known_input(self, clean: Latent) -> Latent:
        """The latent, outliers shortened."""
        return self.normaliser.squash(clean, self.clip)

    def interpret(self, process: Process, out: Latent, noised: Latent, t: Time, position_ids: PositionIds) -> Estimate:
        """Clean-latent estimate, and the readout of what it decodes to."""
        x0 = process.to_x0(out, noised, t)
        features = self.readout(self.decode(x0))
        if torch.is_grad_enabled():
            # A gradient of zero for the live weights: a distributed run waits for one from every parameter.
            live = [w for part in (self.encoder, self.decoder) for w in part.parameters() if w.requires_grad]
            features = features + 0.0 * sum(w.sum() for w in live)
        return Estimate(features=features, x0=x0)

    def logits(self, backbone: Backbone, features: Float[Tensor, "*shape k"]) -> Float[Tensor, "*shape vocab"]:
        """The backbone's head on the readout's features."""
        return head_logits(backbone, features)

    def clean_features(self, clean: Latent, position_ids: PositionIds) -> State:
        """The readout of what clean latents decode to."""
        return self.readout(self.decode(clean))

    def feedback(self, backbone: Backbone, estimate: Estimate) -> Latent:
        """The clean-latent estimate, detached, outliers shortened."""
        return self.normaliser.squash(estimate.x0.detach(), self.clip)

    def hidden(self, backbone: Backbone, estimate: Estimate, position_ids: PositionIds) -> State:
        """The decoded estimate in the residual stream's own units."""
        return self.normaliser.denormalise(self.decode(estimate.x0), position_ids).to(backbone.dtype)


def _check(config: LatentConfig, schedule: Schedule, dim: int) -> None:
    if not 1 <= config.dim <= dim:
        raise UsageError(f"method.latent.dim is {config.dim}; it must be in [1, {dim}], the hidden size.")
    if config.hidden < 1:
        raise UsageError(f"method.latent.hidden is {config.hidden}; it must be at least 1.")
    if not 0 < config.stage < 1:
        raise UsageError(f"method.latent.stage is {config.stage}; it is a share of the budget, in (0, 1), e.g. 0.15.")
    if not 0 <= config.noise < 1:
        raise UsageError(f"method.latent.noise is {config.noise}; it is a time, in [0, 1), e.g. 0.15.")
    weights = (config.state, config.cross_entropy, config.scale)
    if min(weights) < 0 or max(weights[:2]) == 0:
        raise UsageError(
            "the weights method.latent.state, .cross_entropy and .scale must not be negative, and one of the first "
            f"two must be positive; got {weights}."
        )
    signal = schedule.alpha(torch.tensor(config.noise, dtype=torch.float64)).item()
    if signal**2 < 0.5:
        raise UsageError(
            f"at time {config.noise} this schedule has more noise than signal (alpha = {signal:.2f}): nothing could be "
            "decoded. Set method.latent.noise lower, or method.process.schedule to cosine or tan."
        )
