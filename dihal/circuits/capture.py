"""Hooks that show what every component writes and reads during one run."""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dihal.circuits.adapters import Adapter

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


class Capture(Hooks):
    """Context manager: hooks on every block from the seam on, removed whatever happens.

    Set ``record`` to a new `Record` before a run; ``writers`` and ``readers`` say which half of it is kept.
    """

    def __init__(self, adapter: Adapter, seam: int) -> None:
        super().__init__()
        self.adapter = adapter
        self.seam = seam
        self.record = Record()
        self.writers = True
        self.readers = False

    def start(self, *, writers: bool, readers: bool) -> Record:
        """A new record for the next run."""
        self.writers, self.readers = writers, readers
        self.record = Record()
        return self.record

    def _attach(self) -> None:
        layout = self.adapter.layout
        for layer in range(self.seam, self.adapter.layers):
            self._before(self.adapter.part(layer, layout.attention_norm), "attention_inputs", layer)
            for name in layout.projections:
                self._project(self.adapter.part(layer, name), layer)
            self._before(self.adapter.part(layer, layout.attention_output), "heads", layer)
            if layout.mlp is not None:
                self._norm(self.adapter.part(layer, layout.mlp_norm), layer)
                self._after(self.adapter.part(layer, layout.mlp), "mlps", layer)
        self._norm(self.adapter.norm, self.adapter.layers)

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

    def _norm(self, module: nn.Module, layer: int) -> None:
        self._before(module, "inputs", layer)

        def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            # A view: an identity gives the stream itself, whose gradient is not that of this reader alone.
            output = output.view_as(output)
            if self.readers:
                self.record.normed[layer] = output
            return output

        self._handles.append(module.register_forward_hook(hook))

    def _project(self, module: nn.Module, layer: int) -> None:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            if self.readers:
                self.record.projected[layer] = (*self.record.projected.get(layer, ()), output)

        self._handles.append(module.register_forward_hook(hook))
