"""Schedules that learn where noise levels matter, from the loss seen at each.

Both follow one principle (Dieleman et al. 2022, "Continuous diffusion for categorical data"; CDCD): spend
equal time on equal loss, i.e. choose the noise levels so that the loss, as a function of a uniform t, is a
straight line. What is learned is a curve fitted to the loss; the denoiser's own loss never trains a schedule, and
a schedule's fit never trains the denoiser.

The loss given to ``fit_loss`` must rise with noise: the cross-entropy of the tokens, or the squared error of the
normalised *clean state*, but not that of a v or flow target.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dihal.errors import UsageError

if TYPE_CHECKING:
    from dihal.diffusion.schedule import Schedule

__all__ = ["LearnedGumbel", "Warp"]

Values = Float[Tensor, "*shape"]

_GAIN = 10.0
"""Raw parameters count this many times: they are to move at ten times the network's learning rate (CDCD: 1e-2)."""
_SHARE = 1e-3
"""Weight of the fits: keeps them out of the gradient norm that is clipped. Adam's step does not depend on it."""
_MEMORY = 0.99
"""Of running statistics, per step."""
_CUT = 1e-5
"""Tail probability left out at either end of the Gumbel distribution (LangFlow)."""
_REACH = (8.0, math.log(4.0))
"""How far loc moves, and the log of scale, at most. Where no loss is left at any noise, as in text learned by heart,
nothing holds the fit, and the schedule would run off to noise levels that round to zero."""
_LEAST = 1e-3
"""Least width, and share of the mean height, of a bin (CDCD)."""


class LearnedGumbel(nn.Module):
    """Variance preserving; -log-SNR at a uniform t is Gumbel-distributed, with learned location and scale.

    gamma(t) = loc - scale log(-log u), u = cut + (1 - 2 cut) t; alpha^2 = sigmoid(-gamma), sigma^2 = sigmoid(gamma)
    (LangFlow). At t = 0 noise is left: what is clean to the eye of a token
    among many channels.

    Args:
        loc: first location of gamma = -log-SNR.
        scale: first scale.

    Raises:
        UsageError: values that are not finite, or a scale that is not positive.
    """

    def __init__(self, loc: float, scale: float) -> None:
        super().__init__()
        if not (math.isfinite(loc) and math.isfinite(scale) and scale > 0):
            raise UsageError(f"gumbel_loc {loc} and gumbel_scale {scale} must be finite, the scale positive.")
        self.first = (loc, scale)
        self.raw = nn.Parameter(torch.zeros(2))
        # Running means of 1, u, loss, u^2, u loss, loss^2, from which the line under the loss is drawn.
        self.register_buffer("moments", torch.zeros(6, dtype=torch.float64))

    def _parameters_live(self) -> tuple[Tensor, Tensor]:
        loc, scale = self.first
        moved, widened = (
            reach * torch.tanh(_GAIN / reach * raw) for reach, raw in zip(_REACH, self.raw.unbind(), strict=True)
        )
        return loc + moved, scale * torch.exp(widened)

    def _parameters_at(self, like: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale = (value.detach().to(like) for value in self._parameters_live())
        return loc, scale

    @property
    def loc(self) -> float:
        """Location of gamma."""
        return self._parameters_live()[0].item()

    @property
    def scale(self) -> float:
        """Scale of gamma."""
        return self._parameters_live()[1].item()

    @staticmethod
    def _minus_log(t: Tensor) -> Tensor:
        # -log u, each half of the interval in the form that keeps its digits.
        low = -torch.log(_CUT + (1 - 2 * _CUT) * t)
        high = -torch.log1p(-(_CUT + (1 - 2 * _CUT) * (1 - t)))
        return torch.where(t < 0.5, low, high)

    def _gamma(self, t: Tensor) -> Tensor:
        loc, scale = self._parameters_at(t)
        return loc - scale * torch.log(self._minus_log(t))

    def _gamma_dot(self, t: Tensor) -> Tensor:
        _, scale = self._parameters_at(t)
        return scale * (1 - 2 * _CUT) / ((_CUT + (1 - 2 * _CUT) * t) * self._minus_log(t))

    def alpha(self, t: Values) -> Values:
        """sqrt(sigmoid(-gamma))."""
        return torch.sqrt(torch.sigmoid(-self._gamma(t)))

    def sigma(self, t: Values) -> Values:
        """sqrt(sigmoid(gamma))."""
        return torch.sqrt(torch.sigmoid(self._gamma(t)))

    def log_snr(self, t: Values) -> Values:
        """-gamma."""
        return -self._gamma(t)

    @staticmethod
    def _time(standard: Tensor) -> Tensor:
        # Cumulative distribution of the standardised gamma, less its tails. Near 1 from its complement.
        tail = torch.exp(-standard)
        low = (torch.exp(-tail) - _CUT) / (1 - 2 * _CUT)
        high = 1 - (-torch.expm1(-tail) - _CUT) / (1 - 2 * _CUT)
        return torch.where(low < 0.5, low, high)

    def time(self, log_snr: Values) -> Values:
        """Share of the Gumbel distribution below -log_snr."""
        loc, scale = self._parameters_at(log_snr)
        return self._time((-log_snr - loc) / scale).clamp(0, 1)

    def alpha_dot(self, t: Values) -> Values:
        """-alpha sigma^2 gamma' / 2."""
        gamma = self._gamma(t)
        return -0.5 * torch.sqrt(torch.sigmoid(-gamma)) * torch.sigmoid(gamma) * self._gamma_dot(t)

    def sigma_dot(self, t: Values) -> Values:
        """sigma alpha^2 gamma' / 2."""
        gamma = self._gamma(t)
        return 0.5 * torch.sqrt(torch.sigmoid(gamma)) * torch.sigmoid(-gamma) * self._gamma_dot(t)

    def fit_loss(self, t: Values, loss: Values) -> Float[Tensor, ""]:
        """Squared distance of the loss from a straight line in the distribution function; trains loc and scale only.

        With the noise levels at which the loss was seen held fixed, moving loc and scale moves where the
        distribution function puts them; it is best where the loss is a line in it. The line itself is the
        least-squares one over recent steps, so that a small batch suffices.

        Args:
            t: times of the samples, any shape.
            loss: their losses, same shape; detached here.
        """
        t, loss = t.detach().double().flatten(), loss.detach().double().flatten()
        with torch.no_grad():
            gamma = self._gamma(t)
            moments = torch.stack([torch.ones_like(t), t, loss, t**2, t * loss, loss**2]).mean(-1)
            self.moments.lerp_(moments, 1 - _MEMORY)
            one, mean_t, mean_loss, square_t, product, square_loss = self.moments
            mean_t, mean_loss, square_t = mean_t / one, mean_loss / one, square_t / one
            variance = (square_t - mean_t**2).clamp_min(1e-9)
            # A loss that falls with noise has no such distribution: then the line is flat and nothing moves.
            slope = ((product / one - mean_t * mean_loss) / variance).clamp_min(0)
            unit = (square_loss / one).sqrt().clamp_min(1e-12)
        loc, scale = (value.double() for value in self._parameters_live())
        error = mean_loss + slope * (self._time((gamma - loc) / scale) - mean_t) - loss
        return (_SHARE * (error / unit).square().mean()).float()


class Warp(nn.Module):
    """Any schedule under a learned monotone map of time: piecewise linear, with learned bins.

    F grows with the base's time like the loss; this schedule's t is F / F(1). Uniform training times and even
    sampling grids in t then spend equal effort on equal loss.

    Args:
        base: the schedule whose times are mapped; fixed.
        bins: pieces of F.
    """

    def __init__(self, base: Schedule, bins: int = 100) -> None:
        super().__init__()
        self.base = base
        self.widths = nn.Parameter(torch.zeros(bins))
        self.heights = nn.Parameter(torch.zeros(bins))
        self.offset = nn.Parameter(torch.zeros(()))
        self.register_buffer("square", torch.zeros(2, dtype=torch.float64))  # running means of 1 and loss^2

    def _bins(self) -> tuple[Tensor, Tensor]:
        # Width of each bin in base time (sum 1) and rise of F over it, in fp64.
        bins = len(self.widths)
        width = torch.softmax(_GAIN * self.widths.double(), -1) + _LEAST
        return width / width.sum(), (torch.exp(_GAIN * self.heights.double()) + _LEAST) / bins

    @staticmethod
    def _edges(steps: Tensor) -> Tensor:
        # 0, ..., 1, both exact.
        inner = steps.cumsum(-1)[:-1] / steps.sum()
        return torch.cat([inner.new_zeros(1), inner, inner.new_ones(1)])

    def _knots(self, like: Tensor) -> tuple[Tensor, Tensor]:
        # Edges of the bins in base time and in own time.
        with torch.no_grad():
            width, height = self._bins()
            return self._edges(width).to(like), self._edges(height).to(like)

    @staticmethod
    def _place(edges: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        # Bin of each value and its place in it, in [0, 1].
        index = (torch.searchsorted(edges, value.detach().contiguous(), right=True) - 1).clamp(0, len(edges) - 2)
        return index, (value - edges[index]) / (edges[index + 1] - edges[index])

    def _map(self, origin: Tensor, goal: Tensor, value: Tensor) -> Tensor:
        index, place = self._place(origin, value)
        return torch.lerp(goal[index], goal[index + 1], place)

    def _inner(self, t: Tensor) -> Tensor:
        base, own = self._knots(t)
        return self._map(own, base, t)

    def _rate(self, t: Tensor) -> Tensor:
        # d base time / d t.
        base, own = self._knots(t)
        index, _ = self._place(own, t)
        return (base[index + 1] - base[index]) / (own[index + 1] - own[index])

    def alpha(self, t: Values) -> Values:
        """The base's at the mapped time."""
        return self.base.alpha(self._inner(t))

    def sigma(self, t: Values) -> Values:
        """The base's at the mapped time."""
        return self.base.sigma(self._inner(t))

    def log_snr(self, t: Values) -> Values:
        """The base's at the mapped time."""
        return self.base.log_snr(self._inner(t))

    def time(self, log_snr: Values) -> Values:
        """Mapped from the base's time."""
        inner = self.base.time(log_snr)
        base, own = self._knots(inner)
        return self._map(base, own, inner)

    def alpha_dot(self, t: Values) -> Values:
        """Chain rule; at the edge of two bins, the later one's."""
        return self.base.alpha_dot(self._inner(t)) * self._rate(t)

    def sigma_dot(self, t: Values) -> Values:
        """Chain rule; at the edge of two bins, the later one's."""
        return self.base.sigma_dot(self._inner(t)) * self._rate(t)

    def fit_loss(self, t: Values, loss: Values) -> Float[Tensor, ""]:
        """Squared error of the unnormalised F against the loss; trains F only.

        Each sample weighs 1 / F', which undoes the density of the samples; at most 100, so that a sample from a
        bin that was nearly given up does not decide the step. F has an offset: the loss at t = 0 need not vanish.

        Args:
            t: times of the samples (this schedule's), any shape.
            loss: their losses, same shape; detached here.
        """
        t, loss = t.detach().double().flatten(), loss.detach().double().flatten()
        with torch.no_grad():
            self.square.lerp_(torch.stack([torch.ones_like(loss), loss**2]).mean(-1), 1 - _MEMORY)
            unit = (self.square[1] / self.square[0]).sqrt().clamp_min(1e-12)
            inner, weight = self._inner(t), self._rate(t).clamp_max(100.0)
        width, height = self._bins()
        edges = F.pad(width.cumsum(-1), (1, 0))
        rises = F.pad(height.cumsum(-1), (1, 0))
        index, _ = self._place(edges.detach(), inner)
        place = (inner - edges[index]) / width[index]
        fitted = _GAIN * self.offset.double() + rises[index] + place * height[index]
        return (_SHARE * (weight * (fitted - loss / unit).square()).mean()).float()
