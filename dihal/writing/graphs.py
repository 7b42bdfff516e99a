"""Functions of tensors as CUDA graphs: run as they are the first time, captured the second, replayed from then on.

Thousands of kernels started one by one from Python take several times what they compute at small batch. What a graph
replays is what was launched while it was captured: numbers of the host are constants in it, so whatever may change
from call to call is a tensor given to it, a tensor at a fixed address, or part of its key.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = ["CudaRecorder", "Function", "Graphs", "Recorder", "reason_of", "recorder"]

Function = Callable[..., tuple[Tensor, ...]]

_MOST = 32
"""Captured functions that are held; the one captured first goes."""


@runtime_checkable
class Recorder(Protocol):
    """What captures."""

    def warm(self, function: Function, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run a function that may be captured later, so that libraries and caches make what they keep."""
        ...

    def capture(self, function: Function, given: tuple[Tensor, ...]) -> Function:
        """Return what replays it on other values of the same shapes.

        The function may run once more before: twice must be as good as once.

        Raises:
            RuntimeError: it does what cannot be captured, such as waiting for the device.
        """
        ...


@functools.cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures: cuBLAS keeps workspaces of every stream it has worked on, 64 MiB with those of backward on an H200."""
    return torch.cuda.Stream(device)


class CudaRecorder:
    """Captures CUDA graphs. They share memory: they run one after another, and outputs are copied out of it.

    Args:
        device: where.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = _side(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm(self, function: Function, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """On a stream of its own, as captures want it; the current one waits for it."""
        current = torch.cuda.current_stream(self._device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            found = function(*given)
        current.wait_stream(self._side)
        return found

    def capture(self, function: Function, given: tuple[Tensor, ...]) -> Function:
        """Capture what has just run in the same way, so that whatever is made late (kernels, above all) is there."""
        held = [value.clone() for value in given]
        self.warm(function, tuple(held))
        current = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._side):
                found = function(*held)
        except RuntimeError:
            self._pool = torch.cuda.graph_pool_handle()  # the old one still belongs to the capture that failed
            raise
        finally:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own behind

        def replay(*values: Tensor) -> tuple[Tensor, ...]:
            for own, value in zip(held, values, strict=True):
                own.copy_(value)
            graph.replay()
            return tuple(output.clone() for output in found)  # the next replay writes over them

        return replay


def recorder(device: torch.device) -> Recorder | None:
    """What captures on a device; None: nothing does, functions run as they are."""
    return CudaRecorder(device) if device.type == "cuda" else None


def reason_of(error: Exception) -> str:
    """The first line of an error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Graphs:
    """Functions by key.

    What comes once (the last, shorter block) is not worth a capture: the first call with a key runs the function.
    If a capture fails, a warning says so once, and everything runs as it is from then on.

    Args:
        recorder: captures.
        simpler: told why a capture failed; makes functions simpler and says so, to have another try, or cannot.
    """

    def __init__(self, recorder: Recorder, simpler: Callable[[RuntimeError], bool] = lambda error: False) -> None:
        self._recorder = recorder
        self._simpler = simpler
        self._seen: set[Hashable] = set()
        self._captured: dict[Hashable, Function] = {}
        self.failed = False
        self.replays: Counter[Hashable] = Counter()
        """How often each was replayed."""

    def __len__(self) -> int:
        """Functions captured."""
        return len(self._captured)

    @property
    def captured(self) -> Mapping[Hashable, Function]:
        """What replays the captured functions, by key."""
        return self._captured

    def __call__(self, key: Hashable, function: Function, *given: Tensor) -> tuple[Tensor, ...]:
        """The function's outputs for these inputs.

        Args:
            key: of everything but the values of ``given`` that the outputs depend on, shapes included.
            function: not kept once it is captured.
            given: tensors.
        """
        if key not in self._captured and key in self._seen and not self.failed:
            self._capture(key, function, given)
        if key in self._captured:
            self.replays[key] += 1
            return self._captured[key](*given)
        self._seen.add(key)
        return self._recorder.warm(function, given)

    def _capture(self, key: Hashable, function: Function, given: tuple[Tensor, ...]) -> None:
        try:
            captured = self._recorder.capture(function, given)
        except RuntimeError as error:
            if not self._simpler(error):
                self.failed = True
                warnings.warn(f"this cannot be a CUDA graph, it runs without one: {reason_of(error)}", stacklevel=2)
            return
        while len(self._captured) >= _MOST:
            del self._captured[next(iter(self._captured))]
        self._captured[key] = captured
