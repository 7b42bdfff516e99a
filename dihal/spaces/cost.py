"""What the operations of each state space cost, in the convention of ``dihal.meter``: one place, checked by torch's counter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from dihal.spaces.base import Space
from dihal.spaces.embedding import EmbeddingSpace
from dihal.spaces.hidden_state import HiddenStateSpace
from dihal.spaces.latent import LatentSpace
from dihal.spaces.simplex import NOISE_RUN, SimplexSpace

__all__ = ["OPERATIONS", "SPACE_COSTS", "Costs", "Operation", "layers_flops"]

OPERATIONS = (
    "encode",
    "noised",
    "interpret",
    "logits",
    "clean_features",
    "feedback",
    "hidden",
    "auxiliary_loss",
    "solver",
    "draw",
)
"""Operations of a space that are counted: those of its contract, and of its walk per evaluation:
``solver`` (estimate to next noised state) and ``draw`` (of tokens that the walk itself draws)."""


@dataclass(frozen=True, kw_only=True)
class Operation:
    """Cost of an operation of a space.

    Attributes:
        part: part of the ledger.
        forward: FLOPs per position.
        backward: FLOPs per position of its gradients.
        multiple: sequences are padded to a multiple of so many positions.
    """

    part: str
    forward: float
    backward: float = 0.0
    multiple: int = 1


Costs = dict[str, tuple[Operation, ...]]
"""Operation -> its costs by part. What costs nothing is left out."""


def layers_flops(module: nn.Module) -> float:
    """Return forward FLOPs per position of all linear layers in a module, each applied once."""
    return 2.0 * sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def _readout(layer: nn.Module, *, input_gradient: bool) -> Operation:
    # A readout frozen after an autoencoder's stage passes gradients on, and has none of its own.
    trained = any(weight.requires_grad for weight in layer.parameters())
    cost = layers_flops(layer)
    return Operation(part="own_head", forward=cost, backward=(input_gradient + trained) * cost)


def _hidden_costs(space: HiddenStateSpace, head_weights: int) -> Costs:
    head = 2.0 * head_weights
    return {
        "interpret": (_readout(space.readout, input_gradient=True),),
        "clean_features": (_readout(space.readout, input_gradient=False),),
        "logits": (Operation(part="own_head", forward=head, backward=head),),
    }


def _embedding_costs(space: EmbeddingSpace, head_weights: int) -> Costs:
    # Logits are made to take a mean of rows under their softmax, and once again for its gradient.
    logits, raw = 2.0 * space.vocab * space.output_dim, 2.0 * head_weights
    mean = Operation(part="space", forward=2 * logits)
    return {
        "logits": (Operation(part="own_head", forward=logits, backward=logits),),
        "feedback": (mean,),
        "solver": (mean,),
        "hidden": (Operation(part="space", forward=logits + raw, backward=2 * logits + raw),),
    }


def _latent_costs(space: LatentSpace, head_weights: int) -> Costs:
    head, readout = 2.0 * head_weights, layers_flops(space.readout)
    encoder, decoder = layers_flops(space.encoder), layers_flops(space.decoder)
    # Fixed after the first stage: gradients pass through, none reaches the weights.
    decode = Operation(part="space", forward=decoder, backward=decoder)
    # The state that the encoder reads has no gradient: only its last layer passes one on.
    stage = encoder + layers_flops(space.encoder.second) + 2 * (decoder + readout) + head
    return {
        "encode": (Operation(part="space", forward=encoder),),
        "interpret": (decode, _readout(space.readout, input_gradient=True)),
        "clean_features": (
            Operation(part="space", forward=decoder),
            _readout(space.readout, input_gradient=False),
        ),
        "logits": (Operation(part="own_head", forward=head, backward=head),),
        "hidden": (decode,),
        "auxiliary_loss": (Operation(part="autoencoder", forward=encoder + decoder + readout + head, backward=stage),),
    }


def _simplex_costs(space: SimplexSpace, head_weights: int) -> Costs:
    head = 2.0 * head_weights
    mixture = Operation(part="space", forward=head, multiple=NOISE_RUN)
    logits = Operation(part="own_head", forward=head, backward=head)
    return {
        "noised": (mixture,),
        "interpret": (_readout(space.readout, input_gradient=True),),
        "logits": (logits,),
        "feedback": (Operation(part="space", forward=2 * head),),
        "solver": (mixture,),
        "draw": (logits,),
    }


SPACE_COSTS: dict[type[Space], Callable[[Any, int], Costs]] = {
    HiddenStateSpace: _hidden_costs,
    EmbeddingSpace: _embedding_costs,
    LatentSpace: _latent_costs,
    SimplexSpace: _simplex_costs,
}
"""Space -> what its operations cost, given the weights of the backbone's head."""
