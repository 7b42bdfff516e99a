"""Layers at a time: independent work on a CPU, one thread for each layer instead of all threads for one.

Scoring a layer is many middling steps (an eigenproblem of a few hundred rows, gathers, short
products) that gain little from a second thread and much from a second layer beside them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["LayerMap", "layer_workers"]

Item = TypeVar("Item")
Result = TypeVar("Result")
LayerMap = Callable[[Callable[[Item], Result], Iterable[Item]], Iterator[Result]]
"""Like :func:`map`: results in the order of the items; the first failure in that order is raised."""


@contextlib.contextmanager
def layer_workers(device: torch.device) -> Iterator[LayerMap]:
    """A map over layers: on a CPU as many at a time as torch has threads here, elsewhere one after another.

    Every layer is computed by one thread whatever their number, so results do not depend on it.
    """
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
