"""Small parts of the denoiser: norms, rotary positions, time embedding, gated MLP."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from dihal.types import Time

__all__ = ["FEATURES", "GatedMlp", "RmsNorm", "TimeEmbedding", "linear", "mlp_width", "rms_norm", "rotary", "rotate"]

_EPS = 1e-6
FEATURES = 256
_TIME_SCALE = 1_000.0
_LONGEST_PERIOD = 10_000.0


def linear(inputs: int, outputs: int, *, bias: bool = True, zero: bool = False) -> nn.Linear:
    """Return a linear layer with normal weights of variance 1 / inputs (or all zeros) and zero bias."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    if zero:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.normal_(layer.weight, std=inputs**-0.5)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def rms_norm(x: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
    """Return x / sqrt(mean(x^2) + eps) over the last axis, computed in float32, in x's dtype."""
    return F.rms_norm(x.float(), (x.shape[-1],), eps=_EPS).to(x.dtype)


class RmsNorm(nn.Module):
    """RMS norm with a learned scale per channel (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        """Return the normalised x in its own dtype."""
        return (rms_norm(x) * self.weight).to(x.dtype)


def rotary(
    position_ids: Int[Tensor, "rows time"], head_dim: int, theta: float
) -> tuple[Float[Tensor, "rows 1 time half"], Float[Tensor, "rows 1 time half"]]:
    """Return cosines and sines of the rotation angles (Su et al. 2021), float32, with an axis for heads."""
    # Made anew in each pass: a buffer would be rounded when the module is cast to bf16.
    exponent = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    angle = position_ids[:, None, :, None].float() * theta**-exponent
    return angle.cos(), angle.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (i, i + dim / 2) of the last axis by the angles, in float32."""
    cos, sin = angles
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class TimeEmbedding(nn.Module):
    """Sinusoids of 1000 t, then a two-layer MLP: (batch,) -> (batch, 1, dim); (batch, time) -> (batch, time, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.expand = linear(FEATURES, dim)
        self.mix = linear(dim, dim)

    def forward(self, t: Time) -> Float[Tensor, "batch rows dim"]:
        """Return the embedding, in the layer's dtype."""
        t = t[:, None] if t.ndim == 1 else t
        half = FEATURES // 2
        frequency = torch.exp(torch.arange(half, device=t.device) * (-math.log(_LONGEST_PERIOD) / half))
        angle = _TIME_SCALE * t.float()[..., None] * frequency
        features = torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.expand.weight.dtype)
        return self.mix(F.silu(self.expand(features)))


def mlp_width(width: int, ratio: float) -> int:
    """Return the gated MLP's hidden width: two thirds of ratio * width, rounded up to a multiple of 8 (64 from 512 on)."""
    wanted = 2 * ratio * width / 3
    multiple = 64 if wanted >= 512 else 8
    return multiple * math.ceil(wanted / multiple - 1e-9)


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, SwiGLU)."""

    def __init__(self, width: int, hidden: int, *, zero: bool) -> None:
        super().__init__()
        self.gate_up = linear(width, 2 * hidden, bias=False)
        self.down = linear(hidden, width, bias=False, zero=zero)

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """Return the branch's output."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)
