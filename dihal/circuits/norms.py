"""Norms as numbers: what they make of the residual stream, and gradients through them.

Let x be what a norm reads, xhat = C x r its normalised form (C centres for a LayerNorm, is the identity for an
RMSNorm), r = 1 / sqrt(mean((C x)^2) + eps), gamma its weight. A gradient g at its output is, at its input,

    r (p - xhat mean(p xhat)),   p = C gamma g.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dihal.backbone.layout import Layout
from dihal.errors import UsageError

__all__ = ["Norm"]


@dataclass(frozen=True)
class Norm:
    """Norms of several sites as numbers; ``gain`` None: no norm."""

    gain: Tensor | None
    """(sites, 1, 1, dim), or (dim,) of one site."""
    bias: Tensor | None
    """Shaped like the gain."""
    centred: bool
    eps: float

    @classmethod
    def of(cls, modules: Sequence[nn.Module], layout: Layout, dtype: torch.dtype) -> Norm:
        """Read norm modules, one per site.

        Raises:
            UsageError: norms that do not share their eps.
        """
        if layout.norm_kind == "none":
            return cls(None, None, False, 0.0)

        def stacked(name: str) -> Tensor | None:
            held: list[Any] = [getattr(module, name, None) for module in modules]
            if any(value is None for value in held):
                return None
            return torch.stack([value.detach() for value in held]).to(dtype)[:, None, None]

        eps = {float(getattr(module, layout.norm_eps)) for module in modules}
        if len(eps) > 1:
            raise UsageError(
                f"the norms of this model have different eps ({sorted(eps)}); attribution takes one for all."
            )
        return cls(stacked("weight"), stacked("bias"), layout.norm_kind == "layer", eps.pop())

    def at(self, site: int) -> Norm:
        """That of one site."""
        one = [None if value is None else value[site, 0, 0] for value in (self.gain, self.bias)]
        return replace(self, gain=one[0], bias=one[1])

    def normalise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """xhat and r (with a last axis of 1)."""
        if self.gain is None:
            return torch.zeros_like(x), torch.ones_like(x[..., :1])
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x * scale, scale

    def scales(self, xs: Sequence[Tensor]) -> Tensor:
        """r of an RMSNorm at every site, (sites, batch, time, 1)."""
        assert self.gain is not None
        assert not self.centred
        return torch.rsqrt(torch.stack(list(xs)).to(self.gain.dtype).square_().mean(-1, keepdim=True) + self.eps)

    def pull(self, gradient: Tensor) -> Tensor:
        """C (gamma gradient): the linear part of the pullback, along the last axis, without r."""
        if self.gain is None:
            return gradient
        out = gradient * self.gain
        return out - out.mean(-1, keepdim=True) if self.centred else out

    def pull_back(self, gradient: Tensor, hat: Tensor, scale: Tensor) -> Tensor:
        """Gradient at the input from the one at the output."""
        inner = self.pull(gradient)
        return torch.addcmul(inner, hat, (inner * hat).mean(-1, keepdim=True), value=-1).mul_(scale)
