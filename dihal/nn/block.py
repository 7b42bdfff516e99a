"""One transformer block of the denoiser."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dihal.config.method import DenoiserConfig
from dihal.nn.cache import StaticSlot
from dihal.nn.layers import GatedMlp, RmsNorm, linear, mlp_width, rms_norm, rotate

__all__ = ["Attention", "Block"]

Past = tuple[Tensor, Tensor] | StaticSlot


class Attention(nn.Module):
    """Multi-head attention with rotary positions and, optionally, RMS-normalised queries and keys (Henry et al. 2020)."""

    def __init__(self, width: int, heads: int, *, qk_norm: bool, zero: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = linear(width, 3 * width, bias=False)
        self.out = linear(width, width, bias=False, zero=zero)
        self.query_norm = RmsNorm(width // heads) if qk_norm else nn.Identity()
        self.key_norm = RmsNorm(width // heads) if qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | BlockMask | None,
        is_causal: bool,
        past: Past | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the branch's output and all keys and values, past ones first."""
        batch, time, width = x.shape
        query, key, value = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query = rotate(self.query_norm(query), angles).to(value.dtype)
        key = rotate(self.key_norm(key), angles).to(value.dtype)
        if isinstance(past, StaticSlot):
            key, value = past.write(key, value)
        elif past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        if isinstance(mask, BlockMask):
            mixed = flex_attention(query, key, value, block_mask=mask)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal)
        return self.out(mixed.transpose(1, 2).reshape(batch, time, width)), (key, value)


class Block(nn.Module):
    """Pre-norm attention and gated MLP. At initialisation the block is the identity.

    `adaptive`: adaLN-zero (Peebles and Xie 2023, Sec. 3.2): a linear map of the time embedding,
    initialised to zero, gives scale, shift and gate of both branches. `rms`: learned scales, and
    the last layer of each branch is initialised to zero.
    """

    def __init__(self, config: DenoiserConfig, time_dim: int) -> None:
        super().__init__()
        width = config.width
        self.adaptive = config.norm == "adaptive"
        zero = not self.adaptive
        self.attention = Attention(width, config.heads, qk_norm=config.qk_norm, zero=zero)
        self.mlp = GatedMlp(width, mlp_width(width, config.mlp_ratio), zero=zero)
        self.dropout = nn.Dropout(config.dropout)
        if self.adaptive:
            self.modulation = linear(time_dim, 6 * width, zero=True)
        else:
            self.attention_norm = RmsNorm(width)
            self.mlp_norm = RmsNorm(width)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | BlockMask | None,
        is_causal: bool,
        past: Past | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the new residual stream (batch, time, width) and the block's keys and values.

        ``time`` is the activated time embedding, (batch, 1 or time, time_dim).
        """
        if self.adaptive:
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(time).chunk(6, dim=-1)
            mixed, kept = self.attention(rms_norm(x) * (1 + scale_a) + shift_a, angles, mask, is_causal, past)
            x = x + gate_a * self.dropout(mixed)
            return x + gate_m * self.dropout(self.mlp(rms_norm(x) * (1 + scale_m) + shift_m)), kept
        mixed, kept = self.attention(self.attention_norm(x), angles, mask, is_causal, past)
        x = x + self.dropout(mixed)
        return x + self.dropout(self.mlp(self.mlp_norm(x))), kept
