"""The space `hidden(l)`: the residual stream entering block l, normalised per channel.

Two sets of statistics are kept. A pretrained LM parks attention on the first position of a sequence
(the *sink*), whose state from some layer on has a norm hundreds of times that of every other token
and hardly any variance. Sharing one mean and standard deviation with it would either flatten every
other token or leave the sink's state thousands of standard deviations from zero, where no network
reaches it; yet the suffix needs it exactly. So position 0 has a mean of its own, measured on first
positions, and all other positions share the statistics of tokens that are not sinks.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Int
from torch import Tensor, nn

from dihal.errors import UsageError
from dihal.types import Mask, PerPosition, State

__all__ = ["HiddenSpace"]

_SINK_FACTOR = 10.0
"""A token whose norm exceeds this multiple of the median does not enter the statistics."""


class HiddenSpace(nn.Module):
    """Normalisation of h^l and its inverse.

    Args:
        split: the layer index l.
        dim: hidden size d.
    """

    mean: Tensor
    std: Tensor
    mean_first: Tensor
    std_first: Tensor
    fitted: Tensor

    def __init__(self, split: int, dim: int) -> None:
        super().__init__()
        self.split = split
        self.dim = dim
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        self.register_buffer("mean_first", torch.zeros(dim))
        self.register_buffer("std_first", torch.ones(dim))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.int64))

    def _statistics(self, position_ids: Int[Tensor, "batch time"]) -> tuple[Tensor, Tensor]:
        first = (position_ids == 0).unsqueeze(-1)
        return torch.where(first, self.mean_first, self.mean), torch.where(first, self.std_first, self.std)

    def normalise(self, state: State, position_ids: Int[Tensor, "batch time"]) -> State:
        """h^l -> z, in fp32. ``position_ids`` is 0 at the first real token of each row."""
        mean, std = self._statistics(position_ids)
        return (state.float() - mean) / std

    def denormalise(self, z: State, position_ids: Int[Tensor, "batch time"]) -> State:
        """z -> h^l, in fp32."""
        mean, std = self._statistics(position_ids)
        return z.float() * std + mean

    def outlier_weight(self, z: State, clip: float) -> PerPosition:
        """Weight min(1, (clip / rms(z))^2): squared error of far outliers counts relative to their size.

        Sinks other than position 0 (some delimiters) are rare and far; unweighted, a handful of them
        would make up most of the squared error.
        """
        return (clip**2 / z.square().mean(-1).clamp_min(1e-12)).clamp_max(1.0)

    def squash(self, z: State, clip: float) -> State:
        """Shorten states whose rms exceeds ``clip`` to that rms: the network's input stays in range."""
        return z * (clip / z.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)).clamp_max(1.0)

    @torch.no_grad()
    def fit(self, states: Iterable[tuple[State, Int[Tensor, "batch time"], Mask]]) -> int:
        """Measure the statistics from (h^l, position ids, real-token mask) batches; return the tokens used.

        The median norm that defines sinks comes from the first batch. Sums are accumulated in fp64.

        Raises:
            UsageError: no tokens, or states that are not finite.
        """
        dim = self.dim
        device = self.mean.device
        total = torch.zeros(2, dim, dtype=torch.float64, device=device)
        square = torch.zeros(2, dim, dtype=torch.float64, device=device)
        count = torch.zeros(2, dtype=torch.float64, device=device)
        threshold: Tensor | None = None
        shift = torch.zeros(
            2, dim, dtype=torch.float64, device=device
        )  # sums are taken around it, against cancellation
        for state, position_ids, mask in states:
            flat = state.to(device=device, dtype=torch.float64).flatten(0, 1)
            positions = position_ids.to(device).flatten()
            real = mask.to(device).flatten()
            if not torch.isfinite(flat[real]).all():
                bad = int((~torch.isfinite(flat[real]).all(-1)).sum())
                raise UsageError(
                    f"{bad} states entering block {self.split} are NaN or infinite. "
                    "Load the backbone in float32 or bfloat16, or choose another split."
                )
            norm = flat.norm(dim=-1)
            rest = real & (positions > 0)
            if threshold is None and bool(rest.any()):
                threshold = _SINK_FACTOR * norm[rest].median()
            ordinary = rest if threshold is None else rest & (norm <= threshold)
            for row, chosen in enumerate((ordinary, real & (positions == 0))):
                if not bool(chosen.any()):
                    continue
                if count[row] == 0:
                    shift[row] = flat[chosen].mean(0)
                delta = flat[chosen] - shift[row]
                total[row] += delta.sum(0)
                square[row] += delta.square().sum(0)
                count[row] += chosen.sum()
        if count[0] < 2:
            raise UsageError("too few tokens to measure the mean and deviation of the states; give more text.")
        drift = total / count.clamp_min(1).unsqueeze(-1)
        deviation = (square / count.clamp_min(1).unsqueeze(-1) - drift.square()).clamp_min(0).sqrt()
        # A channel that never moves would divide by zero; it keeps a small share of the typical scale.
        std = deviation[0].clamp_min(1e-3 * deviation[0].mean().clamp_min(1e-12))
        self.mean.copy_(shift[0] + drift[0])
        self.std.copy_(std)
        if count[1] > 0:
            self.mean_first.copy_(shift[1] + drift[1])
            # Windows begin with one start token, so position 0 may not vary at all: the ordinary
            # deviation is its floor, which keeps other first tokens in range.
            self.std_first.copy_(torch.maximum(deviation[1], std))
        else:
            self.mean_first.copy_(self.mean)
            self.std_first.copy_(self.std)
        self.fitted.fill_(int(count.sum()))
        return int(count.sum())
