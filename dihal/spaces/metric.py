"""In what the state error is measured.

Squared error per channel treats every direction of h^l alike; the suffix does not. For a small error e of the
state at one position, the KL between the suffix's next-token distributions (at that and all later positions)
with and without it is e^T F e / 2, F the Fisher information of those distributions in the state: second moment
of the gradient of log p(y) with y drawn from the suffix itself. The gradient of the summed log-probabilities of
tokens drawn independently at every position estimates it without bias, because scores have mean zero: products
of different positions' scores cancel. One matrix per layer, averaged over tokens, measured once: in training it
costs a d x d product per position, where reading the suffix costs the suffix.

Derived here; the relation between KL and Fisher information is Kullback (1959), Sec. 2.6.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dihal.config.method import ObjectiveConfig
from dihal.errors import UsageError
from dihal.random import uniform
from dihal.types import State

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.data.batch import Batch
    from dihal.spaces.hidden import HiddenSpace

__all__ = ["ChannelMetric", "FisherMetric", "build_metric"]


class ChannelMetric(nn.Module):
    """Every normalised channel alike."""

    def forward(self, error: State) -> State:
        """Return the error as it is."""
        return error


class FisherMetric(nn.Module):
    """Errors mapped by the square root of F, so that their squared length is e^T F e.

    F is scaled to trace d and mixed with the identity: errors are on the scale of :class:`ChannelMetric`'s.

    Args:
        dim: channels of a state.
        floor: share of the identity, in [0, 1].
        tokens: tokens measured.
    """

    root: Tensor

    def __init__(self, dim: int, floor: float, tokens: int) -> None:
        super().__init__()
        self.floor = floor
        self.tokens = tokens
        # Training only, and measured again in seconds: kept out of checkpoints.
        self.register_buffer("root", torch.eye(dim), persistent=False)

    def forward(self, error: State) -> State:
        """Return error @ F^(1/2)."""
        return error @ self.root.to(error.dtype)

    def fit(
        self, backbone: Backbone, space: HiddenSpace, batches: Iterable[Batch], *, seed: int, chunk: int
    ) -> Float[Tensor, "dim dim"]:
        """Measure F in normalised coordinates on training windows; return it before mixing, scaled to trace d.

        Sinks (position 0 and norm outliers) are left out: they are few and their states are constants.

        Raises:
            UsageError: gradients that are not finite, or all zero.
        """
        dim = self.root.shape[0]
        moment = torch.zeros(dim, dim, dtype=torch.float64, device=self.root.device)
        seen = 0
        for item in batches:
            batch = item.to(backbone.device)
            scores, weight = self._scores(backbone, space, batch, seed, chunk)
            flat = scores.flatten(0, 1) * weight.flatten()[:, None]
            moment += (flat.T @ flat).double()
            seen += batch.input_ids.numel()
            if seen >= self.tokens:
                break
        trace = float(moment.trace())
        if not 0 < trace < float("inf"):
            raise UsageError(
                "the suffix's gradients at the split are not finite or all zero: no Fisher metric can be measured. "
                "Set method.objective.metric to channel, or hold the backbone in float32 or bfloat16."
            )
        fisher = moment * (dim / trace)
        mixed = (1 - self.floor) * fisher + self.floor * torch.eye(dim, dtype=fisher.dtype, device=fisher.device)
        values, vectors = torch.linalg.eigh(mixed)
        self.root.copy_((vectors * values.clamp_min(0).sqrt()) @ vectors.T)
        return fisher.float()

    def _scores(
        self, backbone: Backbone, space: HiddenSpace, batch: Batch, seed: int, chunk: int
    ) -> tuple[State, Float[Tensor, "batch time"]]:
        """Gradients of sampled log-probabilities with respect to z, and 1 where a position counts."""
        mask = None if batch.full else batch.attention_mask
        positions = (batch.attention_mask.long().cumsum(-1) - 1).clamp_min(0)
        with torch.no_grad():
            clean = backbone.prefix(batch.input_ids, space.split, attention_mask=mask, position_ids=positions)
            z = space.normalise(clean, positions)
        with torch.enable_grad():
            leaf = z.detach().requires_grad_(True)
            state = space.denormalise(leaf, positions).to(clean.dtype)
            features = backbone.suffix_features(state, space.split, attention_mask=mask, position_ids=positions)
        flat = features.flatten(0, 1)
        u = uniform(seed, batch.sample_ids, "fisher", (features.shape[1],), device=z.device).flatten()
        real = batch.attention_mask.flatten()
        slope = torch.empty_like(flat)
        for start in range(0, len(flat), chunk):
            part = slice(start, start + chunk)
            with torch.enable_grad():
                inner = flat[part].detach().requires_grad_(True)
                log_p = backbone.head(inner.unsqueeze(0)).squeeze(0).float().log_softmax(-1)
                cumulative = log_p.detach().exp().cumsum(-1)
                drawn = torch.searchsorted(cumulative, u[part, None] * cumulative[:, -1:]).clamp_max(
                    log_p.shape[-1] - 1
                )
                chosen = (log_p.gather(-1, drawn).squeeze(-1) * real[part]).sum()
            (slope[part],) = torch.autograd.grad(chosen, inner)
        (gradient,) = torch.autograd.grad(flat, leaf, slope)
        weight = real.view(positions.shape) & (positions > 0) & (space.outlier_weight(z, 4.0) == 1)
        return gradient.float(), weight.float()


def build_metric(config: ObjectiveConfig, dim: int) -> ChannelMetric | FisherMetric:
    """Return the metric that the configuration names."""
    return (
        ChannelMetric() if config.metric == "channel" else FisherMetric(dim, config.metric_floor, config.metric_tokens)
    )
