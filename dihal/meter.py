"""Floating-point operations as executed: what every method reports of each micro-batch and of each text it writes.

Convention (one for all methods, the one of ``torch.utils.flop_counter``): matrix products only, a multiply-add
counts as two. Attention is counted *dense*: every query of a call against every key, whether a mask hides it or
not; its backward pass costs twice its forward pass (no recomputation). A backward pass counts the products that
are made: the gradient of the input, and the gradient of the weights where they are trained. So a frozen layer's
backward pass costs as much as its forward pass, a trained layer's twice as much, and a trained layer whose input
needs no gradient as much.

A method makes one :class:`Meter` per micro-batch and tells it what it runs, beside running it; nothing here looks
at a tensor's values, so that no device is asked for anything. What an operation of a state space costs stands in
one table (``dihal/spaces/cost.py``).

One step of a writer, as an example (``training = torch.is_grad_enabled()``)::

    meter, size = Meter(backbone), {"batch": batch, "new": time}
    meter.prefix(space.split, **size)                                                  # where the state is needed
    meter.space(space, "encode", **size)
    meter.space(space, "noised", **size)
    meter.denoiser(network, **size, times=t.numel(), part="self_conditioning")         # if it runs
    meter.space(space, "interpret", **size)
    meter.space(space, "feedback", **size)
    meter.denoiser(network, **size, times=t.numel(), backward=training, null=drop is not None)
    meter.space(space, "interpret", **size, backward=training and objective.own > 0)
    meter.space(space, "logits", batch=1, new=positions_read, backward=training)
    return LossOutput(..., flops=meter.flops)

While writing, tokens encoded again are ``meter.prefix(split, batch=, new=, keys=new + cached)``, a denoiser pass
with a cache has ``keys=``, and readouts of the frozen stack are ``meter.suffix(...)`` and ``meter.head(...)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from dihal.backbone.weights import linear_layers
from dihal.config.method import DenoiserConfig
from dihal.nn.layers import FEATURES, mlp_width
from dihal.nn.transformer import time_channels
from dihal.spaces.base import Space
from dihal.spaces.cost import OPERATIONS, SPACE_COSTS, layers_flops
from dihal.spaces.embedding import EmbeddingSpace

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.nn.transformer import DenoiserTransformer

__all__ = ["PARTS", "Meter", "Pass", "StackShape", "denoiser_flops", "stack_shape"]

PARTS = {
    "teacher_prefix": "blocks below the split on true tokens: the target, and tokens that are encoded again",
    "teacher_suffix": "blocks from the split on, on true states: the teacher of the KL",
    "denoiser_forward": "the denoiser; under `mask`, the blocks of the converted backbone",
    "denoiser_backward": "gradients of the denoiser",
    "self_conditioning": "the denoiser's earlier pass, whose estimate it reads",
    "suffix_forward": "blocks from the split on, on estimated states, with adapters where there are any",
    "suffix_backward": "gradients through them",
    "head": "LM head of student and teacher (under `mask`, of the converted backbone), and gradients through it",
    "own_head": "the space's own readout and its logits, and their gradients",
    "space": "products by which a space makes states, inputs and estimates",
    "autoencoder": "first stage of the space `latent`",
    "metric": "Fisher metric of the state error",
    "preparation": "measuring normalisation and metric before training",
}
"""Parts of the ledger, in the order in which they are shown. A method reports some of them and no other."""

Gradient = Literal["none", "input", "weights", "both"]
_PRODUCTS = {"none": 0, "input": 1, "weights": 1, "both": 2}


@dataclass(frozen=True, kw_only=True)
class Pass:
    """FLOPs of a forward pass and of the backward pass that belongs to it."""

    forward: float
    backward: float


@dataclass(frozen=True, kw_only=True)
class StackShape:
    """What a backbone's blocks and head cost.

    Attributes:
        weights: weights of all linear layers of each block.
        widths: channels of each block's attention (heads x head size).
        head: weights of the LM head.
    """

    weights: tuple[int, ...]
    widths: tuple[int, ...]
    head: int

    def forward(self, first: int, last: int, *, batch: int, new: int, keys: int) -> float:
        """FLOPs of ``new`` positions through blocks first .. last - 1, each attending to ``keys`` positions."""
        linear = 2.0 * sum(self.weights[first:last])
        attention = 4.0 * keys * sum(self.widths[first:last])
        return batch * new * (linear + attention)

    def backward(self, first: int, last: int, *, batch: int, new: int, keys: int, weights: bool = False) -> float:
        """FLOPs of the gradients with respect to the states, and to the weights where they are trained."""
        linear = (1 + weights) * 2.0 * sum(self.weights[first:last])
        attention = 8.0 * keys * sum(self.widths[first:last])
        return batch * new * (linear + attention)


_SHAPES: WeakKeyDictionary[Backbone, StackShape] = WeakKeyDictionary()


def stack_shape(backbone: Backbone) -> StackShape:
    """Return the costs of a backbone's own layers; adapters in them are not counted, and change nothing."""
    if backbone not in _SHAPES:
        weights, widths = [], []
        for block in backbone.blocks:
            layers = {n.replace(".base_layer", ""): m for n, m in linear_layers(block) if "lora_" not in n}
            output = layers[backbone.layout.attention_output]
            weights.append(sum(layer.weight.numel() for layer in layers.values()))
            # nn.Linear holds (out, in), GPT-2's Conv1D holds (in, out).
            widths.append(output.weight.shape[1] if isinstance(output, nn.Linear) else output.weight.shape[0])
        _SHAPES[backbone] = StackShape(
            weights=tuple(weights), widths=tuple(widths), head=backbone.output_embedding.weight.numel()
        )
    return _SHAPES[backbone]


def denoiser_flops(
    config: DenoiserConfig,
    *,
    state_dim: int,
    condition_dim: int | None,
    output_dim: int,
    batch: int,
    new: int,
    keys: int,
    times: int,
    input_gradient: bool = False,
) -> Pass:
    """Return FLOPs of one call of the denoiser.

    Args:
        config: its shape; with self-conditioning its input is a state wider.
        state_dim: channels of the state it reads.
        condition_dim: channels of the condition; None: unconditional.
        output_dim: channels it writes.
        batch: sequences.
        new: positions of the call.
        keys: positions attended to: new and cached ones.
        times: diffusion times embedded: ``batch`` for one per sequence, ``batch * new`` for one per position.
        input_gradient: the backward pass reaches what the input layer reads (a trained null condition).
    """
    width, time_dim = config.width, time_channels(config.width)
    inputs = state_dim * (1 + (config.self_conditioning > 0)) + (condition_dim or 0)
    adaptive = config.norm == "adaptive"
    positions = batch * new
    blocks = 2.0 * config.depth * (4 * width * width + 3 * width * mlp_width(width, config.mlp_ratio)) * positions
    attention = 4.0 * config.depth * keys * width * positions
    head = 2.0 * width * output_dim * positions
    # What reads something that needs no gradient: input layer, skip and the first layer of the time embedding.
    first = 2.0 * inputs * width * positions
    skip = 2.0 * (condition_dim or 0) * output_dim * positions
    expand = 2.0 * FEATURES * time_dim * times
    modulation = time_dim * width * (6 * config.depth + 2) if adaptive else time_dim * width
    time = 2.0 * (time_dim * time_dim + modulation) * times
    return Pass(
        forward=first + skip + expand + blocks + attention + head + time,
        backward=(1 + input_gradient) * first + skip + expand + 2 * (blocks + attention + head + time),
    )


class Meter:
    """Adds up what one micro-batch, or the writing of some text, executes.

    Args:
        backbone: gives the costs of blocks and head.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._shape = stack_shape(backbone)
        self._blocks = backbone.num_blocks
        self.flops: dict[str, float] = {}
        """FLOPs by part, a subset of :data:`PARTS`."""

    @property
    def total(self) -> float:
        """FLOPs of all parts."""
        return float(sum(self.flops.values()))

    def add(self, part: str, flops: float) -> None:
        """Add FLOPs counted elsewhere. Parts outside :data:`PARTS` are a programming error."""
        assert part in PARTS, f"{part!r} is no part of the ledger: {', '.join(PARTS)}"
        self.flops[part] = self.flops.get(part, 0.0) + flops

    def merge(self, flops: Mapping[str, float]) -> None:
        """Add another meter's parts."""
        for part, value in flops.items():
            self.add(part, value)

    def prefix(
        self, split: int, *, batch: int, new: int, keys: int | None = None, part: str = "teacher_prefix"
    ) -> None:
        """``Backbone.prefix``: blocks below the split. ``keys``: new and cached positions; None: no cache."""
        self.add(part, self._shape.forward(0, split, batch=batch, new=new, keys=new if keys is None else keys))

    def suffix(
        self,
        split: int,
        *,
        batch: int,
        new: int,
        keys: int | None = None,
        backward: bool = False,
        adapters: Iterable[Tensor] = (),
        part: str = "suffix_forward",
    ) -> None:
        """``Backbone.suffix_features``: blocks from the split on.

        Args:
            split: first block run.
            batch: sequences.
            new: positions of the call.
            keys: new and cached positions; None: no cache.
            backward: the gradient of the state is taken (part ``suffix_backward``).
            adapters: LoRA weights that act in this pass.
            part: ``suffix_forward``, or ``teacher_suffix`` for true states.
        """
        sizes = {"batch": batch, "new": new, "keys": new if keys is None else keys}
        lora = 2.0 * sum(weight.numel() for weight in adapters) * batch * new
        self.add(part, self._shape.forward(split, self._blocks, **sizes) + lora)
        if backward:
            self.add("suffix_backward", self._shape.backward(split, self._blocks, **sizes) + 2 * lora)

    def stack(
        self, *, batch: int, new: int, backward: bool = False, weights: bool = True, adapters: Iterable[Tensor] = ()
    ) -> None:
        """All blocks of a backbone that is itself the network (``dihal.masked``), parts ``denoiser_*``.

        Args:
            batch: sequences.
            new: positions of each; all attend to all.
            backward: gradients are taken, down to the embeddings.
            weights: of the blocks' own weights, too.
            adapters: LoRA weights that act.
        """
        sizes = {"batch": batch, "new": new, "keys": new}
        lora = 2.0 * sum(weight.numel() for weight in adapters) * batch * new
        self.add("denoiser_forward", self._shape.forward(0, self._blocks, **sizes) + lora)
        if backward:
            cost = self._shape.backward(0, self._blocks, **sizes, weights=weights)
            self.add("denoiser_backward", cost + 2 * lora)

    def head(
        self,
        positions: int,
        *,
        backward: bool = False,
        weights: bool = False,
        recomputed: bool = False,
        part: str = "head",
    ) -> None:
        """``Backbone.head``: logits of so many positions.

        ``backward``: the gradient of the features is taken; ``weights``: and that of a trained head; ``recomputed``: the
        logits are made a second time for it.
        """
        products = 1 + recomputed + backward * (1 + weights)
        self.add(part, products * 2.0 * self._shape.head * positions)

    def denoiser(
        self,
        network: DenoiserTransformer,
        *,
        batch: int,
        new: int,
        keys: int | None = None,
        times: int | None = None,
        backward: bool = False,
        null: bool = False,
        part: str = "denoiser_forward",
    ) -> None:
        """One call of the denoiser.

        Args:
            network: the denoiser.
            batch: sequences.
            new: positions of the call.
            keys: new and cached positions; None: no cache.
            times: numbers in the time tensor (``t.numel()``); None: one per sequence.
            backward: its weights are trained in this pass (part ``denoiser_backward``).
            null: ``drop_condition`` was given and the null condition is trained.
            part: ``denoiser_forward``, or ``self_conditioning`` for the earlier pass.
        """
        cost = denoiser_flops(
            network.config,
            state_dim=network.state_dim,
            condition_dim=network.condition_dim,
            output_dim=network.head.out_features,
            batch=batch,
            new=new,
            keys=new if keys is None else keys,
            times=batch if times is None else times,
            input_gradient=null,
        )
        self.add(part, cost.forward)
        if backward:
            self.add("denoiser_backward", cost.backward)

    def space(self, space: Space, operation: str, *, batch: int, new: int, backward: bool = False) -> None:
        """An operation of a state space (:class:`~dihal.spaces.base.Space`).

        Args:
            space: the state space.
            operation: one of ``dihal.spaces.cost.OPERATIONS``; ``encode`` is counted without the prefix (see :meth:`prefix`).
            batch: sequences.
            new: positions of each. Chosen positions of a whole batch are one sequence.
            backward: its gradients are taken: of the network's output where it comes from there, and of what is
                trained in it.
        """
        assert operation in OPERATIONS, f"{operation!r} is no operation of a space: {', '.join(OPERATIONS)}"
        for cost in SPACE_COSTS[type(space)](space, self._shape.head).get(operation, ()):
            positions = batch * cost.multiple * math.ceil(new / cost.multiple)
            self.add(cost.part, positions * (cost.forward + backward * cost.backward))

    def evaluation(self, space: Space, *, batch: int, new: int, self_conditioned: bool) -> None:
        """What a space does with one output of the denoiser while text is written, but for reading tokens.

        It interprets the output, feeds it back where the denoiser is self-conditioned, and goes on to the next noised
        state. The space `embedding` remembers what it fed back and steps with it.
        """
        sizes = {"batch": batch, "new": new}
        self.space(space, "interpret", **sizes)
        if self_conditioned:
            self.space(space, "feedback", **sizes)
        if not (self_conditioned and isinstance(space, EmbeddingSpace)):
            self.space(space, "solver", **sizes)

    def layers(self, module: nn.Module, positions: int, *, part: str, gradient: Gradient = "none") -> None:
        """Every linear layer of a module, applied once to so many positions.

        ``gradient``: what is differentiated: the ``input`` (frozen weights), the ``weights`` (an input without
        gradient; exact for a single layer), ``both``.
        """
        self.add(part, (1 + _PRODUCTS[gradient]) * layers_flops(module) * positions)

    def product(self, rows: int, columns: int, positions: int, *, part: str, gradient: Gradient = "none") -> None:
        """A (rows x columns) matrix applied to so many positions."""
        self.add(part, (1 + _PRODUCTS[gradient]) * 2.0 * rows * columns * positions)
