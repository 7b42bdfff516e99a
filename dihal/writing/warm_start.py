"""A denoiser that begins as a copy of frozen blocks, so that what they know need not be learned again.

The denoiser's blocks of norm `rms` are built as those of Llama. Copied from block f on, and read through a linear map
from the denoiser's input to h^f, they do with known positions what the backbone does, to start with; for unknown ones
they are the start that post-training a causal model into a diffusion model takes (Gong et al. 2025, DiffuLLaMA; Tae et
al. 2025, TESS 2). The map is fitted by least squares on training text, not assumed: spaces differ in what they show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dihal.errors import UsageError
from dihal.nn.layers import mlp_width
from dihal.nn.transformer import DenoiserTransformer
from dihal.types import Mask

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.data import Batch

__all__ = ["Inputs", "first_block", "require_alike", "warm_start"]

Inputs = Callable[["Batch"], tuple[Tensor, Tensor]]
"""A batch on the backbone's device -> what the denoiser reads of known positions: state and condition, each per position."""

_RIDGE = 1e-6
"""Of the mean square of an input channel."""
_LONGEST = 4.0
"""Norms beyond this multiple of the median are shortened to it: blocks read normalised states, so that a sink's
direction matters and its length, hundreds of times that of others, does not."""


def first_block(backbone: Backbone, split: int, depth: int) -> int:
    """The first block that is copied: that of the split, or the last one after which there are enough."""
    return min(split, backbone.num_blocks - depth)


def require_alike(denoiser: DenoiserTransformer, backbone: Backbone) -> None:
    """Refuse a denoiser whose blocks are not shaped as the backbone's.

    Raises:
        UsageError: naming every option that differs, and its value there.
    """
    layout, config, own = backbone.layout, backbone.config, denoiser.config
    name = "method.denoiser.init=backbone"
    gated = all(last in layout.linears for last in ("gate_proj", "up_proj", "down_proj"))
    if layout.norm_kind != "rms" or layout.post_norm or layout.parallel or not gated or len(layout.projections) != 3:
        raise UsageError(f"{name} knows blocks as Llama's; {backbone.reference.id!r} is built otherwise. Use random.")
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    plain = [block.get_submodule(part) for block in backbone.blocks for part in layout.projections]
    if kind != "default" or getattr(config, "hidden_act", "silu") != "silu" or any(p.bias is not None for p in plain):
        raise UsageError(
            f"{name} copies blocks without biases, with SiLU and plain rotary positions (found rope_type {kind!r}). Use random."
        )
    attention = backbone.blocks[0].get_submodule(layout.projections[0].rpartition(".")[0])
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head * config.num_attention_heads != config.hidden_size:
        raise UsageError(f"{name} needs heads as wide together as the residual stream. Use random.")
    wanted: dict[str, Any] = {
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "norm": "rms",
        "qk_norm": hasattr(attention, "q_norm"),
        "rope_theta": float(rope.get("rope_theta") or config.rope_theta),
    }
    wrong = {key: value for key, value in wanted.items() if getattr(own, key) != value}
    hidden = config.intermediate_size
    if mlp_width(own.width, own.mlp_ratio) != hidden:
        wrong["mlp_ratio"] = 1.5 * hidden / config.hidden_size
    if wrong:
        values = ", ".join(f"method.denoiser.{key}={value}" for key, value in wrong.items())
        raise UsageError(f"{name} copies the backbone's blocks: set {values}.")
    if own.depth > backbone.num_blocks:
        raise UsageError(f"{name}: method.denoiser.depth is {own.depth}; there are {backbone.num_blocks} blocks.")


@torch.no_grad()
def warm_start(
    denoiser: DenoiserTransformer,
    backbone: Backbone,
    split: int,
    batches: Iterable[Batch],
    inputs: Inputs,
) -> None:
    """Copy blocks and fit the input layer.

    The layer reads h^f off the state first (so that it does of an unknown position, too, which has no condition), then
    what is missing off the condition. An earlier estimate and the time count nothing to begin with.

    Args:
        denoiser: changed in place.
        backbone: whole.
        split: see :func:`first_block`.
        batches: text to fit on.
        inputs: what the denoiser reads.

    Raises:
        UsageError: as :func:`require_alike`.
    """
    require_alike(denoiser, backbone)
    first = first_block(backbone, split, denoiser.config.depth)
    with torch.autocast(backbone.device.type, enabled=False):
        _fit(denoiser, backbone, first, list(batches), inputs)
    for own, block in zip(denoiser.blocks, backbone.blocks[first:], strict=False):
        _copy(own, block, backbone)
    nn.init.zeros_(denoiser.time_input.weight)


def _copy(own: nn.Module, block: nn.Module, backbone: Backbone) -> None:
    layout, heads = backbone.layout, own.attention.heads
    query, key, value = (block.get_submodule(name).weight for name in layout.projections)

    def spread(weight: Tensor) -> Tensor:
        # Grouped queries share a key and a value; here every head has its own.
        size = query.shape[0] // heads
        groups = weight.view(-1, size, weight.shape[1])
        return groups.repeat_interleave(heads // len(groups), 0).flatten(0, 1)

    own.attention.qkv.weight.copy_(torch.cat([query, spread(key), spread(value)]))
    own.attention.out.weight.copy_(block.get_submodule(layout.attention_output).weight)
    mlp = block.get_submodule(layout.mlp)
    own.mlp.gate_up.weight.copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
    own.mlp.down.weight.copy_(mlp.down_proj.weight)
    own.attention_norm.weight.copy_(block.get_submodule(layout.attention_norm).weight)
    own.mlp_norm.weight.copy_(block.get_submodule(layout.mlp_norm).weight)
    if own.attention.query_norm.__class__ is not nn.Identity:
        attention = block.get_submodule(layout.projections[0].rpartition(".")[0])
        own.attention.query_norm.weight.copy_(attention.q_norm.weight)
        own.attention.key_norm.weight.copy_(attention.k_norm.weight)


class _LeastSquares:
    """Ridge regression with relative errors, in fp64."""

    def __init__(self) -> None:
        self._left: Tensor | None = None
        self._right: Tensor | None = None

    def add(self, x: Float[Tensor, "rows inputs"], y: Float[Tensor, "rows outputs"], length: Tensor) -> None:
        """Rows, and the lengths of what should be met: an error counts as a share of it."""
        x, y = x.double() / length[:, None], y.double() / length[:, None]
        left, right = x.T @ x, x.T @ y
        self._left = left if self._left is None else self._left + left
        self._right = right if self._right is None else self._right + right

    def solve(self) -> Float[Tensor, "outputs inputs"]:
        """The weights."""
        assert self._left is not None, "there is text to fit on"
        ridge = _RIDGE * self._left.diagonal().mean().clamp_min(1e-30)
        eye = torch.eye(len(self._left), dtype=torch.float64, device=self._left.device)
        return torch.linalg.solve(self._left + ridge * eye, self._right).T


def _fit(denoiser: DenoiserTransformer, backbone: Backbone, first: int, batches: list[Batch], inputs: Inputs) -> None:
    median: Tensor | None = None

    def rows() -> Iterable[tuple[Tensor, Tensor, Tensor, Tensor, Mask]]:
        nonlocal median
        for item in batches:
            batch = item.to(backbone.device)
            real = batch.attention_mask.bool()
            padding = None if batch.full else batch.attention_mask
            target = backbone.prefix(batch.input_ids, first, attention_mask=padding)[real].float()
            length = target.norm(dim=-1)
            median = length.median() if median is None else median
            shorter = length.clamp(max=_LONGEST * median)
            state, condition = (part[real].float() for part in inputs(batch))
            ahead = (real.long().cumsum(-1) > 1)[real]  # not a first token, which may be a sink
            yield (
                torch.cat([state, torch.ones_like(state[:, :1])], -1),
                condition,
                target * (shorter / length)[:, None],
                shorter,
                ahead,
            )

    by_state = _LeastSquares()
    for state, _, target, length, ahead in rows():
        by_state.add(state[ahead], target[ahead], length[ahead])
    read = by_state.solve()
    by_condition = _LeastSquares()
    for state, condition, target, length, _ in rows():
        by_condition.add(condition, target - state.double() @ read.T, length)
    weight = denoiser.input.weight
    nn.init.zeros_(weight)
    states = denoiser.state_dim
    weight[:, :states].copy_(read[:, :-1])
    denoiser.input.bias.copy_(read[:, -1])
    weight[:, states : states + denoiser.condition_dim].copy_(by_condition.solve())
