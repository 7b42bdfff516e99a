"""The passes of a batch: tensors at fixed addresses, functions on them, and CUDA graphs of these functions.

At some hundred tokens a GPU computes for a fraction of the time in which the host starts its kernels, and hooks are more
work for the host. So what is done to every batch of one shape is a few functions of fixed tensors, without a number of
the device being asked for: a run at an end of the path, a run between them with its gradients, the
contraction. The first batch of a shape runs them as they are, the second one captures them, later ones replay. Where
nothing is captured (on a CPU, with hooks of others on the model, where masks or rotary tables depend on the length in a
way of the library's own) they always run as they are.

Memory: tensors that live from pass to pass are views of one arena that all shapes share, and what passes need
in between is one pool that all graphs share, for they run one after another. The pool is kept from then on, so that it is
to be as small as the largest of them: the contraction, whose tensors are the largest, is captured before the
passes, which then find room in its pieces; captured after them it would need its own. Nothing runs beside the pool that
could run in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from dihal.circuits.adapters import Adapter
from dihal.circuits.capture import Capture
from dihal.circuits.contraction import (
    Contraction,
    Delta,
    Gathered,
    Generic,
    Readers,
    contract,
    fast_products,
    product_type,
)
from dihal.circuits.graph import GraphSpec
from dihal.circuits.metrics import solved
from dihal.circuits.types import Metric, PairBatch
from dihal.writing.graphs import Function, Graphs, Recorder, recorder

__all__ = ["Memory", "Passes", "Plan", "Room"]

Found = TypeVar("Found")

_ALIGNED = 512
"""Bytes; kernels read several numbers at once."""


_CONTRACT = ("contract",)
"""Name of the contraction among the functions of a batch."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is done to every batch."""

    adapter: Adapter
    spec: GraphSpec
    readers: Readers
    points: list[tuple[float, float]]
    metric: Metric
    contraction: Contraction
    noise_seed: int
    chunk_bytes: int


Take = Callable[..., Tensor]
"""Gives a tensor of a shape and ``dtype``, its values undefined."""

Call = Callable[[Hashable, Function], tuple[Tensor, ...]]
"""Calls a function, or replays what it did; its name says which it is."""


class _Arena:
    """One piece of memory; tensors are taken from it one behind the other."""

    def __init__(self, size: int, device: torch.device | str) -> None:
        self.flat = torch.empty(size, dtype=torch.uint8, device=device)
        self.used = 0

    def __call__(self, *shape: int, dtype: torch.dtype) -> Tensor:
        count = torch.Size(shape).numel() * dtype.itemsize
        found = self.flat[self.used : self.used + count].view(dtype).view(shape)
        self.used += -(-count // _ALIGNED) * _ALIGNED
        return found


class Passes:
    """Tensors of a batch, and the functions that fill them.

    Args:
        plan: what is done.
        batch: the batch, or with ``static`` one of its shape.
        take: gives the tensors.
        static: the functions are to be captured: the batch is copied to where it stays, and attention is
            given its mask, for the library decides by values of the device whether it needs one.
    """

    def __init__(self, plan: Plan, batch: PairBatch, take: Take, *, static: bool = False) -> None:
        adapter = plan.adapter
        self.plan = plan
        self.batch = batch.map(lambda value: take(*value.shape, dtype=value.dtype)) if static else batch
        rows, time = batch.clean.shape
        self.state = take(rows, time, adapter.width, dtype=adapter.dtype)
        self.step = take(1, dtype=torch.int64)
        self.live = torch.ones(1, dtype=adapter.work_dtype, device=self.state.device)
        """What is added up counts so many times: 0 while a function is only run to be captured."""
        self.mask: Tensor | None = None
        if static and batch.attention == "causal":
            self.mask = take(rows, 1, time, time, dtype=adapter.dtype)
        self.delta = Delta.empty(adapter, plan.spec, rows, time, take)
        kind = Generic if plan.contraction == "generic" else Gathered
        self.gathered = kind(plan.readers, len(plan.points), rows, time, take)

    def enter(self, batch: PairBatch, states: dict[float, Tensor]) -> None:
        """Take in a batch and the ends of its path."""
        if self.batch is not batch:
            self.batch.copy_(batch)
        if self.mask is not None:
            self.mask.fill_(-torch.inf).triu_(1)
        self.step.zero_()
        self.gathered.clear()
        self.delta.state.copy_(states[0.0]).sub_(states[1.0])

    def run(self, state: Tensor, end: float | None, weight: float | None, call: Call) -> tuple[Tensor, Tensor]:
        """One forward, with gradients if it has a weight, from a state: metric of every prompt, and whether it is solved."""
        self.state.copy_(state)
        found = call(("pass", end, weight), lambda: self._pass(end, weight))
        if weight is not None:
            self.step.add_(1)
        return found[0], found[1]

    def _pass(self, end: float | None, weight: float | None) -> tuple[Tensor, Tensor]:
        plan, adapter, batch = self.plan, self.plan.adapter, self.batch
        # The generic form is a reference: it takes nothing of a norm for granted.
        norms = None if plan.contraction == "generic" else (plan.readers.attention, plan.readers.wide)
        with Capture(adapter, plan.spec.seam, norms) as capture:
            record = capture.start(writers=end is not None, readers=weight is not None)
            with torch.set_grad_enabled(weight is not None):
                state = self.state.detach().requires_grad_(weight is not None)
                options: dict[str, Any] = {"attention": batch.attention, "mask": self.mask}
                logits = adapter.logits(state, plan.spec.seam, batch.positions, **options)
                values = plan.metric(logits.to(adapter.work_dtype), batch)
            if weight is not None:
                self.gathered.add(record, capture.gradients(values.sum()), weight, self.step, self.live)
            if end is not None:
                self.delta.add(record, self.live, first=end == 0.0)
            # Nothing of a run may live on beside the next one.
            capture.start(writers=False, readers=False)
        return values.detach(), solved(logits.detach(), batch)

    def contract(self, call: Call) -> tuple[Float[Tensor, "batch writers readers"], Float[Tensor, "batch readers"]]:
        """Scores, and what all writers of a reader score together, found on another way."""
        found = call(_CONTRACT, self._contract)
        return found[0], found[1]

    def _contract(self) -> tuple[Tensor, Tensor]:
        plan, dtype = self.plan, product_type(self.plan.adapter)
        # A wider type in smaller pieces: the passes' own memory is then enough.
        chunk = plan.chunk_bytes if dtype == plan.adapter.work_dtype else plan.chunk_bytes // 16
        with fast_products(plan.adapter.dtype):
            return contract(self.delta, self.gathered, chunk, dtype)


class Memory:
    """Peak device memory: what is allocated, and besides what the graphs' pool holds without its being allocated.

    That is what a device must have. Counted are the weights, all tensors, workspaces of libraries, and the pool in whole
    pieces, as the allocator took them; of the pool, what a graph's outputs occupy is allocated and is not counted again. Pieces
    that the allocator keeps for tensors outside of graphs are not counted: it gives them back when memory is short.

    Args:
        device: nothing is counted on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.idle = 0
        """Bytes of the pool that are not allocated."""
        self.peak: int | None = None
        """Bytes, since `begin`."""

    def begin(self) -> None:
        """Count anew."""
        if self._device.type == "cuda":
            self.peak = 0
            torch.cuda.reset_peak_memory_stats(self._device)

    def note(self) -> None:
        """Count what has been allocated since the last call."""
        if self.peak is not None:
            self.peak = max(self.peak, torch.cuda.max_memory_allocated(self._device) + self.idle)
            torch.cuda.reset_peak_memory_stats(self._device)

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """Scope of a capture, in which all that is new is the pool's."""
        if self._device.type != "cuda":
            yield
            return
        self.note()
        torch.cuda.empty_cache()  # a capture does so: what it gives back is not what the graph takes
        allocated, reserved = self._sizes()
        try:
            yield
        finally:
            now, grown = self._sizes()
            self.idle += (grown - reserved) - (now - allocated)
            # What was allocated meanwhile lies in the pool, which is counted as it is now.
            torch.cuda.reset_peak_memory_stats(self._device)
            self.note()

    def _sizes(self) -> tuple[int, int]:
        return torch.cuda.memory_allocated(self._device), torch.cuda.memory_reserved(self._device)


class _Idle:
    """A recorder whose captures leave no trace in sums, and take no memory but the pool.

    Args:
        recorder: captures.
        memory: told what a capture takes.
    """

    def __init__(self, recorder: Recorder, memory: Memory) -> None:
        self._recorder = recorder
        self._memory = memory
        self.live: Tensor | None = None

    def warm(self, function: Function, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run it, and for good."""
        return self._recorder.warm(function, given)

    def capture(self, function: Function, given: tuple[Tensor, ...]) -> Function:
        """Capture it; what it may have run meanwhile counts for nothing."""
        assert self.live is not None
        live = self.live

        def captured(*values: Tensor) -> tuple[Tensor, ...]:
            # It has run in the batch before, in the same way: once more only to warm up would need its memory beside the pool.
            if live.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
                return ()
            return function(*values)

        live.zero_()
        try:
            with self._memory.capturing():
                return self._recorder.capture(captured, given)
        finally:
            live.fill_(1.0)


def _plain(_: Hashable, function: Function) -> tuple[Tensor, ...]:
    return function()


class Room:
    """Where batches are scored; given to several calls of `attribute`, graphs serve them all.

    The model must stay as it is meanwhile.

    Args:
        adapter: the model.
        graphs: use CUDA graphs where there are any.
    """

    def __init__(self, adapter: Adapter, *, graphs: bool = True) -> None:
        self.adapter = adapter
        self.memory = Memory(adapter.device)
        found = recorder(adapter.device) if graphs else None
        self._recorder = None if found is None else _Idle(found, self.memory)
        self.graphs = None if self._recorder is None else Graphs(self._recorder)
        self._arena: _Arena | None = None
        self._passes: dict[Hashable, Passes] = {}
        self._readers: dict[GraphSpec, Readers] = {}
        self._static = False

    def readers(self, spec: GraphSpec) -> Readers:
        """What the model's weights say about the readers of a graph; in a session of the adapter."""
        if spec not in self._readers:
            self._readers[spec] = Readers(self.adapter, spec)
        return self._readers[spec]

    def open(self) -> None:
        """Look whether the model's runs can be captured; before hooks of this package are on it."""
        self._static = self.graphs is not None and not _hooked(self.adapter) and not _dynamic(self.adapter)

    def aside(self, function: Callable[[], Found]) -> Found:
        """Call a function where the passes run: cuBLAS keeps memory of its own for every stream that it has worked on."""
        if self._recorder is None or not self._static:
            return function()
        found: list[Found] = []

        def keep() -> tuple[Tensor, ...]:
            found.append(function())
            return ()

        self._recorder.warm(keep, ())
        return found[0]

    def reserve(self, plan: Plan, batches: Sequence[PairBatch]) -> None:
        """Make room for the largest of these batches."""
        if not self._static or plan.contraction == "generic":
            return
        need = 0
        for batch in batches:
            counted = _Arena(1 << 60, "meta")
            Passes(plan, batch, counted, static=True)
            need = max(need, counted.used)
        if self._arena is None or self._arena.flat.numel() < need:
            # Graphs know addresses: those of the old arena go with it.
            assert self._recorder is not None
            self._passes, self.graphs, self._arena, self.memory.idle = {}, Graphs(self._recorder), None, 0
            self._arena = _Arena(need, self.adapter.device)

    def passes(self, plan: Plan, batch: PairBatch) -> tuple[Passes, Call]:
        """The passes for a batch on the device, and what calls their functions."""
        if self._arena is None or not self._static or plan.contraction == "generic" or _windowed(plan.adapter, batch):
            return Passes(plan, batch, _fresh(batch.clean.device)), _plain
        key = (plan.spec, tuple(plan.points), plan.metric, plan.chunk_bytes, batch.attention)
        key += tuple(value.shape for value in batch.tensors().values())
        first = key not in self._passes
        if first:
            self._arena.used = 0
            self._passes[key] = Passes(plan, batch, self._arena, static=True)
        assert self._recorder is not None
        assert self.graphs is not None
        passes, call = self._passes[key], self._caller(key, first)
        self._recorder.live = passes.live
        if not (first or self.graphs.failed or (key, _CONTRACT) in self.graphs.captured):
            # Before the passes, and so on whatever numbers are there: its large tensors make the pieces they fit in.
            passes.contract(call)
        return passes, call

    def _caller(self, key: Hashable, first: bool) -> Call:
        known: set[Hashable] = set()

        def call(name: Hashable, function: Function) -> tuple[Tensor, ...]:
            assert self.graphs is not None
            assert self._recorder is not None
            if first and name in known:
                # All is captured in the second batch: a run beside a graph of another would need its memory besides.
                return self._recorder.warm(function, ())
            known.add(name)
            return self.graphs((key, name), function)

        return call


def _fresh(device: torch.device) -> Take:
    return lambda *shape, dtype: torch.empty(shape, dtype=dtype, device=device)


def _hooked(adapter: Adapter) -> bool:
    """Whether anybody's hooks are on the model: a replay would not call them."""
    return any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        for module in adapter.model.modules()
    )


def _dynamic(adapter: Adapter) -> bool:
    """Whether rotary tables are made anew when prompts get longer: the library asks the device for the longest."""
    found = getattr(adapter.model.config, "rope_parameters", None) or {}
    kinds = [found, *(value for value in found.values() if isinstance(value, dict))]
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)


def _windowed(adapter: Adapter, batch: PairBatch) -> bool:
    """Whether some position sees less than all before it, which a plain causal mask does not say."""
    if batch.attention != "causal":
        return False
    window = getattr(adapter.model.config, adapter.layout.windows, None) if adapter.layout.windows else None
    return window is not None and window < batch.time
