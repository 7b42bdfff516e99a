"""The denoiser: a transformer that reads noised states, their condition and the time."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from dihal.config.method import DenoiserConfig
from dihal.errors import UsageError, unknown_name
from dihal.nn.block import Block
from dihal.nn.cache import DenoiserCache, StaticDenoiserCache, StaticPlace, StaticSlot
from dihal.nn.compiled import for_its_shapes
from dihal.nn.layers import RmsNorm, TimeEmbedding, linear, rms_norm, rotary
from dihal.nn.masks import MASKS, block_visibility, visibility
from dihal.types import State, Time

__all__ = ["NORMS", "DenoiserTransformer", "check_denoiser", "time_channels"]

NORMS = ("adaptive", "rms")
_FLEX_FROM = 512
"""Positions from which FlexAttention is chosen: it skips blocks of 128. With one such block a writer's step on an H200 took 107 ms
with it and 80 without; with four, a fair share of them is skipped."""
# A function of one number needs few channels; six times `width` of them per block would be a third of all parameters.
_MOST_TIME_CHANNELS = 128


def time_channels(width: int) -> int:
    """Return the width of the time embedding."""
    return min(width, _MOST_TIME_CHANNELS)


def check_denoiser(config: DenoiserConfig) -> None:
    """Refuse a shape that cannot be built.

    Raises:
        UsageError: with what to change.
    """
    if config.mask not in MASKS:
        raise unknown_name("mask", config.mask, MASKS)
    if config.norm not in NORMS:
        raise unknown_name("norm", config.norm, NORMS)
    if min(config.width, config.depth, config.heads) < 1 or config.mlp_ratio <= 0:
        raise UsageError("width, depth, heads and mlp_ratio of the denoiser must be positive.")
    if config.width % config.heads:
        near = [h for h in range(1, config.width + 1) if config.width % h == 0 and (config.width // h) % 2 == 0]
        best = min(near, key=lambda h: abs(h - config.heads), default=1)
        raise UsageError(f"{config.heads} heads do not divide the width {config.width}; try heads: {best}.")
    if (config.width // config.heads) % 2:
        raise UsageError(
            f"width {config.width} / {config.heads} heads = {config.width // config.heads} channels per head; "
            "rotary positions need an even number: change width or heads."
        )
    if not 0.0 <= config.dropout < 1.0:
        raise UsageError(f"dropout is {config.dropout}; it is a probability, in [0, 1).")
    if not 0.0 <= config.self_conditioning <= 1.0:
        raise UsageError(f"self_conditioning is {config.self_conditioning}; it is a probability, in [0, 1].")


class DenoiserTransformer(nn.Module):
    """Network output for noised states; what it means (x0, eps, v, flow) is the process's business.

    output = head(norm(trunk(z_t, condition, t))) + skip(condition), head and skip initialised to
    zero: the output starts at exactly 0, and a linear map from the condition is learned at once.

    States are expected normalised and conditions at about unit variance per channel; the caller
    sees to both.

    Args:
        config: shape and mask.
        state_dim: channels of a state, and of an earlier estimate (self-conditioning).
        condition_dim: channels of the condition; None: unconditional.
        output_dim: channels of the output; None: those of a state.

    Raises:
        UsageError: a shape that cannot be built.
    """

    def __init__(
        self,
        config: DenoiserConfig,
        state_dim: int,
        condition_dim: int | None = None,
        *,
        output_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_denoiser(config)
        self.config = config
        self.state_dim = state_dim
        self.output_dim = state_dim if output_dim is None else output_dim
        self.condition_dim = condition_dim
        self.self_conditioned = config.self_conditioning > 0
        self.compiled = False
        """Whether :meth:`compile_blocks` was called."""
        width, time_dim = config.width, time_channels(config.width)
        self.input = linear(state_dim * (1 + self.self_conditioned) + (condition_dim or 0), width)
        self.time = TimeEmbedding(time_dim)
        self.blocks = nn.ModuleList(Block(config, time_dim) for _ in range(config.depth))
        self.head = linear(width, self.output_dim, zero=True)
        if condition_dim is not None:
            self.null_condition = nn.Parameter(torch.zeros(condition_dim))
            self.skip = linear(condition_dim, self.output_dim, bias=False, zero=True)
        if config.norm == "adaptive":
            self.final_modulation = linear(time_dim, 2 * width, zero=True)
        else:
            self.time_input = linear(time_dim, width)
            self.final_norm = RmsNorm(width)

    def _condition(
        self, condition: Tensor | None, drop: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        # (what the trunk reads, what the skip reads)
        if (condition is None) != (self.condition_dim is None):
            raise UsageError(
                "this denoiser is conditional: pass condition= (batch, time, condition_dim), and drop_condition= to go without."
                if condition is None
                else "this denoiser has no condition (condition_dim is None): leave condition= out."
            )
        if condition is None:
            return None, None
        condition = condition.to(dtype)
        if drop is None:
            return condition, condition
        drop = drop[:, None, None] if drop.ndim == 1 else drop[..., None]
        return torch.where(drop, self.null_condition, condition), condition.masked_fill(drop, 0)

    def _positions(
        self, past: int, batch: int, length: int, padding: Tensor | None, device: torch.device
    ) -> Int[Tensor, "rows length"]:
        if padding is None:
            return torch.arange(past, past + length, device=device)[None]
        if padding.shape != (batch, past + length):
            raise UsageError(
                f"attention_mask has shape {tuple(padding.shape)}; it covers cached and new positions: {(batch, past + length)}."
            )
        return (padding.long().cumsum(1) - 1).clamp_min(0)[:, past:]

    def _check_cache(self, known: Tensor | None, keep: int) -> None:
        if self.config.mask == "bidirectional":
            raise UsageError("a cache needs the mask 'causal' or 'mixed'; this denoiser has 'bidirectional'.")
        if self.config.mask == "mixed" and known is not None and keep > 0 and not bool(known[:, :keep].all()):
            raise UsageError(
                f"under the mask 'mixed' a cache keeps known positions only; of the first {keep} some are not. "
                "Give keep= the number of leading positions that are known in every sequence, 0 for none."
            )

    def compile_blocks(self) -> None:
        """Compile every block in place; they share their graphs."""
        for block in self.blocks:
            block.compile()
        self.compiled = True

    def _flexible(self, device: torch.device, length: int) -> bool:
        chosen = self.config.attention
        # Not compiled, FlexAttention makes the whole matrix of scores in fp32.
        automatic = chosen == "auto" and self.compiled and device.type == "cuda" and length >= _FLEX_FROM
        return self.config.mask == "mixed" and (chosen == "flex" or automatic)

    def _check_static(self, position_ids: Tensor | None, padding: Tensor | None, known: Tensor | None) -> None:
        wrong = self.config.mask == "bidirectional" or (self.config.mask == "mixed") != (known is not None)
        if wrong or position_ids is None or padding is not None:
            raise UsageError(
                "a cache of fixed size needs the mask 'causal', or 'mixed' with known=, position_ids= and rows without "
                "padding; use DenoiserCache otherwise."
            )

    def forward(
        self,
        z_t: State,
        t: Time,
        condition: Float[Tensor, "batch time condition_dim"] | None = None,
        *,
        position_ids: Int[Tensor, "batch time"] | None = None,
        attention_mask: Bool[Tensor, "batch total"] | Int[Tensor, "batch total"] | None = None,
        known: Bool[Tensor, "batch time"] | None = None,
        self_condition: State | None = None,
        cache: DenoiserCache | StaticDenoiserCache | None = None,
        keep: int | None = None,
        drop_condition: Bool[Tensor, "batch"] | Bool[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch time output_dim"]:
        """Return the raw network output, in the dtype of ``z_t``.

        Args:
            z_t: noised normalised states.
            t: time per sequence or per position.
            condition: one vector per position.
            position_ids: rotary positions; default: count of real tokens before, cached ones included.
            attention_mask: True (or 1) for real tokens, cached and new ones; None: all real.
            known: for the mask `mixed`: True where the state is given rather than denoised.
            self_condition: an earlier estimate; None counts as zeros. Only with self_conditioning > 0.
            cache: keys and values of earlier positions, extended by this call. Not with the mask `bidirectional`,
                under which an earlier position changes when a later one is added. Under `mixed` it holds known
                positions only: they depend on nothing that is denoised, as long as their own inputs (state,
                condition, time, self-condition) stay the same. Equals the uncached pass up to rounding (another
                kernel sums in another order).
            keep: how many of the new positions, counted from the first, the cache keeps; None: all of them.
                Under `mixed` those must be known in every sequence.
            drop_condition: sequences or positions whose condition is replaced by the learned null vector.

        Raises:
            UsageError: an input that the configuration lacks or does not have.
        """
        static = isinstance(cache, StaticDenoiserCache)
        if cache is not None and not static:
            self._check_cache(known, z_t.shape[1] if keep is None else keep)
        if self_condition is not None and not self.self_conditioned:
            raise UsageError("self_condition= was given, but the denoiser was built with self_conditioning: 0.")
        batch, length = z_t.shape[:2]
        past = 0 if cache is None or static else cache.length
        padding = None if attention_mask is None else attention_mask.bool()
        given = (z_t, t, condition, drop_condition, self_condition)
        if static:
            self._check_static(position_ids, padding, known)
            return self._static(given, position_ids, known, cache)
        positions = self._positions(past, batch, length, padding, z_t.device)
        angles = self._angles(positions if position_ids is None else position_ids)
        if cache is None and known is not None and self._flexible(z_t.device, length):
            mask, is_causal = block_visibility(known, padding), False
        else:
            mask, is_causal = visibility(
                self.config.mask, length, past + length, z_t.device, padding=padding, known=known
            )
        x, time, skipped = self._enter(*given)
        for index, block in enumerate(self.blocks):
            x, kept = block(x, time, angles, mask, is_causal, None if cache is None else cache.past(index))
            if cache is not None and keep != 0:
                stored = past + length if keep is None else past + keep
                cache.store(index, *(part[:, :, :stored] for part in kept))
        return self._leave(x, time, skipped).to(z_t.dtype)

    def _static(
        self, given: tuple[Tensor | None, ...], position_ids: Tensor, known: Tensor | None, cache: StaticDenoiserCache
    ) -> Tensor:
        # Compiled, a pass has a third as many kernels; what makes room is left out, and comes once.
        compiled = cache.compiled and cache.made(len(self.blocks))
        run = for_its_shapes if compiled else _as_it_is
        kind = given[0].device.type
        scores = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self._dtype
        x, time, skipped, angles, mask = run(_static_enter)(self, given, position_ids, known, cache.place, scores)
        for index, block in enumerate(self.blocks):
            slot = cache.slot(index)
            if compiled:
                x = run(_static_block)(block, slot, x, time, angles, mask)
            else:
                x, _ = block(x, time, angles, mask, False, slot)
        return run(_static_leave)(self, x, time, skipped, given[0].dtype)

    def _angles(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return rotary(position_ids, self.config.width // self.config.heads, self.config.rope_theta)

    def _enter(
        self,
        z_t: Tensor,
        t: Tensor,
        condition: Tensor | None,
        drop_condition: Tensor | None,
        self_condition: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        # (residual stream, activated time embedding, what the skip reads)
        dtype = self._dtype
        read, skipped = self._condition(condition, drop_condition, dtype)
        parts = [z_t.to(dtype)]
        if read is not None:
            parts.append(read)
        if self.self_conditioned:
            parts.append(torch.zeros_like(parts[0]) if self_condition is None else self_condition.to(dtype))
        # Back to the weights' dtype: under autocast the residual stream stays float32.
        x = self.input(torch.cat(parts, dim=-1)).to(dtype)
        time = self.time(t)
        if self.config.norm == "rms":
            x = x + self.time_input(F.silu(time))
        return x, F.silu(time), skipped

    def _leave(self, x: Tensor, time: Tensor, skipped: Tensor | None) -> Tensor:
        if self.config.norm == "rms":
            x = self.final_norm(x)
        else:
            shift, scale = self.final_modulation(time).chunk(2, dim=-1)
            x = rms_norm(x) * (1 + scale) + shift
        out = self.head(x)
        return out if skipped is None else out + self.skip(skipped)

    @property
    def _dtype(self) -> torch.dtype:
        # Of the residual stream. Not the matrix's: writing replaces matrices by what autocast would make of them.
        return self.head.bias.dtype


def _as_it_is(function: Any) -> Any:
    return function


def _static_enter(
    network: DenoiserTransformer,
    given: tuple[Tensor | None, ...],
    position_ids: Tensor,
    known: Tensor | None,
    place: StaticPlace,
    scores: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, Tensor], Tensor]:
    seen = place.mask(known)
    # Added to the scores as it is: of truth values every block would make this again.
    mask = torch.zeros_like(seen, dtype=scores).masked_fill(~seen, -torch.inf)
    return *network._enter(*given), network._angles(position_ids), mask


def _static_block(
    block: Block, slot: StaticSlot, x: Tensor, time: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor
) -> Tensor:
    return block.forward(x, time, angles, mask, False, slot)[0]


def _static_leave(
    network: DenoiserTransformer, x: Tensor, time: Tensor, skipped: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return network._leave(x, time, skipped).to(dtype)
