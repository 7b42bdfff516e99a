"""The matrix that a linear layer applies, whatever wraps it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from dihal.errors import UsageError

__all__ = ["LinearParts", "effective_linear"]


class LinearParts(NamedTuple):
    """A linear map: ``weight`` of shape (out, in), ``bias`` of shape (out,) or None."""

    weight: Tensor
    bias: Tensor | None


def effective_linear(module: nn.Module, transposed: bool, name: str) -> LinearParts:
    """Weight and bias of a linear layer, low-rank adapters that are active merged in.

    Args:
        module: ``nn.Linear``, GPT-2's transposed one, or peft's wrapper of one.
        transposed: it holds (in, out).
        name: of the model, for the message.

    Raises:
        UsageError: the weight is no readable matrix (quantised).
    """
    wrapped: Any = module
    base: Any = getattr(wrapped, "base_layer", module)
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise UsageError(
            f"circuits of {name} are not supported: its weights are quantised and cannot be read as matrices. "
            "Load it in bfloat16 or float32."
        )
    matrix = weight.detach()
    if base is not module and not wrapped.merged and not wrapped.disable_adapters:
        for adapter in wrapped.active_adapters:
            if adapter in wrapped.lora_A:
                matrix = matrix + wrapped.get_delta_weight(adapter).detach().to(matrix.dtype)
    bias = getattr(base, "bias", None)
    return LinearParts(matrix.T if transposed else matrix, None if bias is None else bias.detach())
