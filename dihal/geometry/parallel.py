"""Layers at a time: independent work, one thread for each layer.

Scoring a layer is many middling steps (an eigenproblem, gathers, short products). On a CPU they gain
little from a second thread and much from a second layer beside them. On a GPU an eigenproblem of 4,096
rows is thousands of small kernels one after another: several, each on a stream of its own, share it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from dihal.geometry.moments import cusolver

__all__ = ["STREAMS", "LayerMap", "layer_workers"]

Item = TypeVar("Item")
Result = TypeVar("Result")
STREAMS = 3
"""Layers at a time on a GPU: each holds the working set of one more layer (at d = 4,096 about 1 GB)."""

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
    threads = torch.get_num_threads()
    # torch keeps the number per thread: this leaves the caller's own alone.
    pool = ThreadPoolExecutor(threads, "dihal-layers", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool.map
    finally:
        # After a failure, work that nobody will read is not begun.
        pool.shutdown(cancel_futures=True)
        # What threads started from now on inherit is process-wide, and the workers changed it.
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _stream_workers(device: torch.device) -> Iterator[LayerMap]:
    """Threads with a CUDA stream each. A call begins after what its caller had begun, and ends with its own work done."""
    caller = torch.cuda.current_stream(device)
    own = threading.local()

    def on_stream(function: Callable[[Item], Result]) -> Callable[[Item], Result]:
        def call(item: Item) -> Result:
            if not hasattr(own, "stream"):
                torch.cuda.set_device(device)
                own.stream = torch.cuda.Stream(device)
            own.stream.wait_stream(caller)
            with torch.cuda.stream(own.stream):
                try:
                    return function(item)
                finally:
                    # What it used may then be freed by any thread.
                    own.stream.synchronize()

        return call

    pool = ThreadPoolExecutor(STREAMS, "dihal-streams")
    try:
        with cusolver(device):
            yield lambda function, items: pool.map(on_stream(function), items)
    finally:
        pool.shutdown(cancel_futures=True)
