"""Runs in which some edges carry what another run has written.

A run starts from the clean input. Every reader outside the circuit's reach sees, instead of the running output
of a writer, a replacement: reader input = residual stream + sum over missing edges of (replacement -
*running* output). So the full circuit is the clean run, the empty circuit the run of the replacements, and
changes inside the circuit flow on through its own edges.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dihal.circuits.adapters import Adapter
from dihal.circuits.capture import Capture, Hooks
from dihal.circuits.graph import GraphSpec
from dihal.circuits.types import PairBatch

__all__ = ["Ablation", "CircuitRun", "Replacement", "Runner", "component_hooks", "logits_residuals"]

Ablation = Literal["corrupt", "mean", "zero"]
"""What stands for a missing edge: the corrupted run, the mean over prompts and positions of clean runs, or nothing."""


@dataclass
class Replacement:
    """What every component writes instead; heads before the output projection."""

    state: Tensor
    heads: dict[int, Tensor]
    mlps: dict[int, Tensor]

    def expand(self, like: Tensor) -> Replacement:
        """One value for all prompts and positions, at every one of them."""

        def spread(value: Tensor) -> Tensor:
            return value.expand(*like.shape[:2], -1)

        return Replacement(
            spread(self.state),
            {layer: spread(value) for layer, value in self.heads.items()},
            {layer: spread(value) for layer, value in self.mlps.items()},
        )


class Runner:
    """Plain runs of one model on one graph.

    Args:
        adapter: the model.
        spec: the graph.
        noise_seed: key of a hybrid's noise.
    """

    def __init__(self, adapter: Adapter, spec: GraphSpec, noise_seed: int = 0) -> None:
        self.adapter = adapter
        self.spec = spec
        self.noise_seed = noise_seed

    def state(self, batch: PairBatch, role: Literal["clean", "corrupted"]) -> Tensor:
        """The state at the seam."""
        ids = batch.clean if role == "clean" else batch.corrupted
        keys = {"sample_ids": batch.ids, "noise_seed": self.noise_seed}
        return self.adapter.states(ids, self.spec.seam, attention=batch.attention, role=role, **keys)

    @torch.no_grad()
    def logits(self, state: Tensor, batch: PairBatch) -> Tensor:
        """Logits at the targets, in the working type."""
        logits = self.adapter.logits(state, self.spec.seam, batch.positions, attention=batch.attention)
        return logits.to(self.adapter.work_dtype)

    def written(self, state: Tensor, batch: PairBatch) -> tuple[Replacement, Tensor]:
        """What every component writes in a plain run, and the run's logits."""
        with Capture(self.adapter, self.spec.seam) as capture:
            record = capture.start(writers=True, readers=False)
            logits = self.logits(state, batch)
        dtype = self.adapter.work_dtype
        heads = {layer: value.to(dtype) for layer, value in record.heads.items()}
        mlps = {layer: value.to(dtype) for layer, value in record.mlps.items()}
        return Replacement(state.to(dtype), heads, mlps), logits


class CircuitRun(Hooks):
    """Context manager in which a run is that of circuits: the prompts of the first one, then those of the next.

    A GPU starts kernels for longer than they compute; several circuits side by side are one run.

    Args:
        runner: model and graph.
        edges: True inside the circuit; one circuit or several.
        replacement: what missing edges carry.
        state: the clean state at the seam, of all prompts once; the run is given it once per circuit.
    """

    def __init__(
        self,
        runner: Runner,
        edges: Bool[np.ndarray, "*circuits writers readers"],
        replacement: Replacement,
        state: Float[Tensor, "batch time dim"],
    ) -> None:
        super().__init__()
        self.adapter, self.spec = runner.adapter, runner.spec
        self.replacement = replacement
        self.missing = (self.spec.edge_mask & ~edges).reshape(-1, *self.spec.edge_mask.shape)
        self.circuits, self.prompts = len(self.missing), len(state)
        self._dtype, self._device = self.adapter.work_dtype, state.device
        self._matrix = torch.from_numpy(self.missing).to(state.device, self._dtype)
        # (replacement - running output) of every writer that has run.
        rows = self.circuits * self.prompts
        self._change = torch.zeros(rows, self.spec.n_writers, *state.shape[1:], dtype=self._dtype, device=state.device)
        self._change[:, 0] = (replacement.state - state).repeat(self.circuits, 1, 1)
        self._input: Tensor | None = None
        self._outputs: list[Tensor] = []

    def _attach(self) -> None:
        layout, part = self.adapter.layout, self.adapter.part
        for layer in range(self.spec.seam, self.spec.layers):
            self._before(part(layer, layout.attention_norm), self._keep_input)
            for index, name in enumerate(layout.projections):
                self._after(part(layer, name), self._projector(layer, index))
            self._before(part(layer, layout.attention_output), self._head_writer(layer))
            if layout.mlp is not None:
                self._before(part(layer, layout.mlp_norm), self._reader(self.spec.reader_at(layer + 1) - 1))
                self._after(part(layer, layout.mlp), self._mlp_writer(layer))
        self._before(self.adapter.norm, self._reader(self.spec.n_readers - 1))

    def _before(self, module: nn.Module, hook: Any) -> None:
        self._handles.append(module.register_forward_pre_hook(lambda _, arguments: hook(arguments[0])))

    def _after(self, module: nn.Module, hook: Any) -> None:
        self._handles.append(module.register_forward_hook(lambda _, __, output: hook(output)))

    def _keep_input(self, x: Tensor) -> None:
        self._input = x

    def _sum(self, matrix: Float[Tensor, "circuits readers seen"]) -> Float[Tensor, "rows readers time dim"]:
        """Summed changes of the writers that each reader of each circuit misses."""
        seen = self._change[:, : matrix.shape[-1]]
        every = matrix.repeat_interleave(self.prompts, 0)
        return torch.bmm(every, seen.flatten(2)).view(len(seen), -1, *seen.shape[2:])

    def _distinct(self, readers: slice) -> tuple[Tensor, Tensor | None]:
        """What readers miss, every distinct set of a circuit once, and which of them each reader has (None: its own)."""
        seen, count = int(self.spec.prev[readers.start]), readers.stop - readers.start
        # Readers that miss the same edges, as most do in a small circuit, have one input.
        found = [np.unique(one[:seen, readers], axis=1, return_inverse=True) for one in self.missing]
        width = max(columns.shape[1] for columns, _ in found)
        if width == count:
            return self._matrix[:, :seen, readers].mT, None
        table = np.zeros((self.circuits, width, seen), dtype=bool)
        for row, (columns, _) in zip(table, found, strict=True):
            row[: columns.shape[1]] = columns.T
        which = torch.from_numpy(np.stack([inverse.reshape(-1) for _, inverse in found]))
        return torch.from_numpy(table).to(self._device, self._dtype), which.to(self._device)

    def _reader(self, index: int) -> Any:
        def hook(x: Tensor) -> tuple[Tensor]:
            change = self._sum(self._matrix[:, None, : int(self.spec.prev[index]), index])
            return ((x + change[:, 0]).to(x.dtype),)

        return hook

    def _projector(self, layer: int, index: int) -> Any:
        def hook(_: Tensor) -> Tensor:
            if index == 0:
                self._outputs = self._project(layer)
            return self._outputs.pop(0)

        return hook

    def _project(self, layer: int) -> list[Tensor]:
        spec, adapter = self.spec, self.adapter
        assert self._input is not None
        first = spec.reader_at(layer)
        matrix, which = self._distinct(slice(first, first + spec.heads + 2 * spec.kv_readers))
        read = (self._input[:, None] + self._sum(matrix)).to(self._input.dtype)
        # The module's forward alone: its hooks belong to the model's own call.
        normed = adapter.part(layer, adapter.layout.attention_norm).forward(read)
        weight, bias = adapter.projections(layer, spec.kv)
        matrices = weight.to(normed.dtype).unflatten(0, (-1, adapter.head_dim))
        if which is not None:
            rows = torch.arange(len(normed), device=normed.device)[:, None]
            normed = normed[rows, which.repeat_interleave(self.prompts, 0)]
        batch, readers, time, _ = normed.shape
        flat = normed.transpose(0, 1).reshape(readers, batch * time, -1)
        out = torch.bmm(flat, matrices.mT).view(readers, batch, time, -1).permute(1, 2, 0, 3).flatten(2)
        out = out if bias is None else out + bias.to(out.dtype)
        if len(adapter.layout.projections) == 1:
            return [out]
        keys = spec.kv_readers * adapter.head_dim
        return list(out.split([spec.heads * adapter.head_dim, keys, keys], -1))

    def _head_writer(self, layer: int) -> Any:
        def hook(running: Tensor) -> None:
            batch, time, _ = running.shape
            change = self._against(self.replacement.heads[layer], running).unflatten(-1, (self.spec.heads, -1))
            flat = change.permute(2, 0, 1, 3).flatten(1, 2)
            written = torch.bmm(flat, self.adapter.output_weight(layer).to(flat.dtype))
            first = self.spec.writer_at(layer)
            place = slice(first, first + self.spec.heads)
            self._change[:, place] = written.view(self.spec.heads, batch, time, -1).transpose(0, 1)

        return hook

    def _mlp_writer(self, layer: int) -> Any:
        def hook(running: Tensor) -> None:
            self._change[:, self.spec.writer_at(layer) + self.spec.heads] = self._against(
                self.replacement.mlps[layer], running
            )

        return hook

    def _against(self, replacement: Tensor, running: Tensor) -> Tensor:
        # Every circuit has the same replacement.
        return (replacement - running.unflatten(0, (self.circuits, -1))).flatten(0, 1)


@contextmanager
def component_hooks(runner: Runner, writers: list[int], replacement: Replacement) -> Iterator[None]:
    """Runs in which whole components write the replacement, to every reader. The lower writer cannot be among them."""
    adapter, spec = runner.adapter, runner.spec
    handles = []

    def replace_heads(module: nn.Module, heads: list[int], layer: int) -> Any:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
            running = arguments[0].unflatten(-1, (spec.heads, -1)).clone()
            given = replacement.heads[layer].unflatten(-1, (spec.heads, -1))
            running[..., heads, :] = given[..., heads, :].to(running.dtype)
            return (running.flatten(-2),)

        return module.register_forward_pre_hook(hook)

    def replace_mlp(module: nn.Module, layer: int) -> Any:
        return module.register_forward_hook(lambda _, __, output: replacement.mlps[layer].to(output.dtype).clone())

    try:
        for layer in range(spec.seam, spec.layers):
            first = spec.writer_at(layer)
            heads = [index - first for index in writers if first <= index < first + spec.heads]
            if heads:
                handles.append(replace_heads(adapter.part(layer, adapter.layout.attention_output), heads, layer))
            if spec.mlps and first + spec.heads in writers:
                assert adapter.layout.mlp is not None
                handles.append(replace_mlp(adapter.part(layer, adapter.layout.mlp), layer))
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits_residuals(adapter: Adapter, spec: GraphSpec, batch: PairBatch, *, noise_seed: int = 0) -> dict[str, float]:
    """Relative errors of "the full circuit is the clean run" and "the empty circuit is the corrupted run"."""
    runner = Runner(adapter, spec, noise_seed)
    state = runner.state(batch, "clean")
    clean = runner.logits(state, batch)
    replacement, corrupted = runner.written(runner.state(batch, "corrupted"), batch)
    residuals = {}
    for name, edges, expected in (
        ("full_circuit", spec.edge_mask, clean),
        ("empty_circuit", np.zeros_like(spec.edge_mask), corrupted),
    ):
        with CircuitRun(runner, edges, replacement, state):
            found = runner.logits(state, batch)
        scale = (expected - expected.mean(-1, keepdim=True)).abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
        residuals[name] = float((found - expected).abs().max() / scale)
    return residuals
