"""Layers at a time: independent work, one thread for each layer.

Scoring a layer is many middling steps (an eigenproblem, gathers, short products). On a CPU they gain
little from a second thread and much from a second layer beside them. On a GPU an eigenproblem of 4,096
rows is thousands of small kernels one after another: several, each on a stream of its own, share it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from dihal.geometry.moments import cusolver

__all__ = ["STREAMS", "LayerMap", "layer_queue", "layer_workers"]

Item = TypeVar("Item")
Result = TypeVar("Result")
STREAMS = 2
"""Layers at a time on a GPU: while the host looks at the numbers of one, the device works on the other. Each holds the
working set of one more layer (at d = 4,096 about 1 GB); a third gains nothing (measured)."""

LayerMap = Callable[[Callable[[Item], Result], Iterable[Item]], Iterator[Result]]
"""Like :func:`map`: results in the order of the items; the first failure in that order is raised."""


@contextlib.contextmanager
def layer_workers(device: torch.device) -> Iterator[LayerMap]:
    """A map over layers: on a CPU as many at a time as torch has threads here, on a GPU ``STREAMS``.

    Every layer is computed by one thread whatever their number, so results do not depend on it.
    """
    if device.type == "cuda":
        with _stream_workers(device) as over:
            yield over
        return
    if device.type != "cpu":
        yield map
        return
    with _threads(torch.get_num_threads()) as pool:
        yield pool.map


@contextlib.contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Workers of one torch thread each."""
    # torch keeps the number per thread: this leaves the caller's own alone.
    pool = ThreadPoolExecutor(count, "dihal-layers", initializer=torch.set_num_threads, initargs=(1,))
    before = torch.get_num_threads()
    try:
        yield pool
    finally:
        # After a failure, work that nobody will read is not begun.
        pool.shutdown(cancel_futures=True)
        # What threads started from now on inherit is process-wide, and the workers changed it.
        torch.set_num_threads(before)


@contextlib.contextmanager
def layer_queue(device: torch.device) -> Iterator[Callable[..., Future[Any]]]:
    """``submit(function, layer, ...)`` beside the caller's own work, as :func:`layer_workers` would compute it.

    On a GPU a layer begins when what the caller had begun *at its submission* is done: what the caller begins later
    runs at the same time. Leaving after a failure, work that has not begun is dropped.
    """
    if device.type == "cuda":
        with _streams(device) as submit:
            yield submit
        return
    with _threads(torch.get_num_threads() if device.type == "cpu" else 1) as pool:
        yield pool.submit


@contextlib.contextmanager
def _streams(device: torch.device) -> Iterator[Callable[..., Future[Any]]]:
    """Threads with a CUDA stream each. A call begins after what its caller had begun, and ends with its own work done."""
    own = threading.local()

    def call(begun: torch.cuda.Event, function: Callable[..., Result], *arguments: Any) -> Result:
        if not hasattr(own, "stream"):
            torch.cuda.set_device(device)
            own.stream = torch.cuda.Stream(device)
        own.stream.wait_event(begun)
        # Gradients and the like are settings of a thread: nothing here is differentiated.
        with torch.no_grad(), torch.cuda.stream(own.stream):
            try:
                return function(*arguments)
            finally:
                # What it used may then be freed by any thread.
                own.stream.synchronize()

    def submit(function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        begun = torch.cuda.current_stream(device).record_event()
        return pool.submit(call, begun, function, *arguments)

    # torch loads its solvers at the first use, and two threads that do so at once fail.
    torch.linalg.cholesky_ex(torch.eye(2, device=device))
    # One torch thread each: the small eigenproblems of the host gain nothing from more, whose waiting takes the
    # processors from the thread that launches the forward pass.
    with cusolver(device), _threads(STREAMS) as pool:
        yield submit


@contextlib.contextmanager
def _stream_workers(device: torch.device) -> Iterator[LayerMap]:
    with _streams(device) as submit:

        def over(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
            begun = [submit(function, item) for item in items]
            return (future.result() for future in begun)

        yield over
