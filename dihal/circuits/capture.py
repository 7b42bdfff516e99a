"""Hooks that show what every component writes and reads during one run."""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dihal.circuits.adapters import Adapter
from dihal.circuits.norms import Norm

__all__ = ["Capture", "Hooks", "Record"]


@dataclass
class Record:
    """Tensors of one run, by layer. Sites of MLPs and logits are keyed by layer, the logits' by L."""

    heads: dict[int, Tensor] = field(default_factory=dict)
    """Attention outputs before the output projection, (batch, time, heads * head_dim)."""
    mlps: dict[int, Tensor] = field(default_factory=dict)
    """MLP outputs, (batch, time, dim)."""
    attention_inputs: dict[int, Tensor] = field(default_factory=dict)
    """The residual stream before the attention's norm."""
    inputs: dict[int, Tensor] = field(default_factory=dict)
    """The residual stream before the MLP's norm, and before the final norm."""
    projected: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    """Queries, keys, values as the linear layers give them."""
    normed: dict[int, Tensor] = field(default_factory=dict)
    """What the MLP and the unembedding read: outputs of the norms."""

    def gradients(self, objective: Tensor) -> Record:
        """A record that holds the gradient of ``objective`` at ``projected`` and ``normed``; zeros where nothing depends on them."""
        flat = [tensor for tensors in self.projected.values() for tensor in tensors] + list(self.normed.values())
        found = iter(torch.autograd.grad(objective, flat, allow_unused=True, materialize_grads=True))
        out = Record()
        out.projected = {layer: tuple(next(found) for _ in tensors) for layer, tensors in self.projected.items()}
        out.normed = {layer: next(found) for layer in self.normed}
        return out


class Hooks(abc.ABC):
    """Context manager: hooks that are removed whatever happens, also while they are being attached."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    @abc.abstractmethod
    def _attach(self) -> None:
        """Register the hooks and keep their handles."""

    def __enter__(self) -> Any:  # Self; the run-time type checker of the tests does not know it
        try:
            self._attach()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _Through(torch.autograd.Function):
    """A norm's output, computed outside the graph, with its gradient in closed form.

    The library composes an RMSNorm of six operations, whose backward is a dozen. Counted for a
    Llama, norms were two fifths of the operations of a backward pass, and a GPU waits for the host to launch each.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, output: tuple[Tensor], norm: Norm, scales: list[Tensor], site: int) -> Tensor:
        ctx.save_for_backward(x)
        # The list and not the record: a record that holds the output would hold itself, and its memory.
        ctx.norm, ctx.scales, ctx.site = norm, scales, site
        return output[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        scale = ctx.scales[0][ctx.site]
        pulled = ctx.norm.pull_back(gradient, x * scale, scale)
        return pulled.to(x.dtype), None, None, None, None


_TOGETHER = 8
"""Sites whose scales are found at once."""


def _scales(norm: Norm, states: list[Tensor]) -> Tensor:
    # Everything that the backward needs is held now: a copy of the whole stream beside it would be the peak.
    return torch.cat([norm.scales(states[at : at + _TOGETHER]) for at in range(0, len(states), _TOGETHER)])


class Capture(Hooks):
    """Context manager: hooks on every block from the seam on, removed whatever happens.

    Set ``record`` to a new `Record` before a run; ``writers`` and ``readers`` say which half of it is kept.

    Args:
        adapter: the model.
        seam: lowest block.
        norms: numbers of the attentions' norms and of the others; given, gradients pass RMSNorms in closed form, while
            forward passes stay the model's own. None: torch differentiates the model's code.
    """

    def __init__(self, adapter: Adapter, seam: int, norms: tuple[Norm, Norm] | None = None) -> None:
        super().__init__()
        self.norms = norms if adapter.layout.norm_kind == "rms" else None
        self._scales: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.adapter = adapter
        self.seam = seam
        self.record = Record()
        self.writers = True
        self.readers = False

    def start(self, *, writers: bool, readers: bool) -> Record:
        """A new record for the next run."""
        self.writers, self.readers = writers, readers
        self.record, self._scales = Record(), ([], [])
        return self.record

    def gradients(self, objective: Tensor) -> Record:
        """`Record.gradients` of the run that has just been made."""
        if self.norms is not None:
            with torch.no_grad():
                for norm, scales, read in zip(
                    self.norms, self._scales, (self.record.attention_inputs, self.record.inputs), strict=True
                ):
                    scales.append(_scales(norm, list(read.values())))
        return self.record.gradients(objective)

    def _attach(self) -> None:
        layout = self.adapter.layout
        for layer in range(self.seam, self.adapter.layers):
            self._norm(self.adapter.part(layer, layout.attention_norm), "attention_inputs", layer)
            for name in layout.projections:
                self._project(self.adapter.part(layer, name), layer)
            self._before(self.adapter.part(layer, layout.attention_output), "heads", layer)
            if layout.mlp is not None:
                self._norm(self.adapter.part(layer, layout.mlp_norm), "inputs", layer)
                self._after(self.adapter.part(layer, layout.mlp), "mlps", layer)
        self._norm(self.adapter.norm, "inputs", self.adapter.layers)

    def _before(self, module: nn.Module, kind: str, layer: int) -> None:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if kind != "heads" or self.writers:
                getattr(self.record, kind)[layer] = arguments[0].detach()

        self._handles.append(module.register_forward_pre_hook(hook))

    def _after(self, module: nn.Module, kind: str, layer: int) -> None:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            if self.writers:
                getattr(self.record, kind)[layer] = output.detach()

        self._handles.append(module.register_forward_hook(hook))

    def _norm(self, module: nn.Module, kind: str, layer: int) -> None:
        closed, scales = None, int(kind == "inputs")
        site = -1 if layer == self.adapter.layers else layer - self.seam
        # Another's hook may change what is read or written: then torch has to find the gradient.
        if self.norms is not None and not (module._forward_hooks or module._forward_pre_hooks):
            closed = self.norms[scales].at(site)
        entered: list[Tensor] = []

        def before(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            x = arguments[0]
            getattr(self.record, kind)[layer] = x.detach()
            if closed is None or not self.readers:
                return None
            entered.append(x)
            return (x.detach(), *arguments[1:])

        def after(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            if entered:
                output = _Through.apply(entered.pop(), (output,), closed, self._scales[scales], site)
            elif kind == "inputs":
                # A view: an identity gives the stream itself, whose gradient is not that of this reader alone.
                output = output.view_as(output)
            if self.readers and kind == "inputs":
                self.record.normed[layer] = output
            return output

        self._handles.append(module.register_forward_pre_hook(before))
        self._handles.append(module.register_forward_hook(after))

    def _project(self, module: nn.Module, layer: int) -> None:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            if self.readers:
                self.record.projected[layer] = (*self.record.projected.get(layer, ()), output)

        self._handles.append(module.register_forward_hook(hook))
