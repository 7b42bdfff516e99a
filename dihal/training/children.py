"""Processes that `python train.py trainer.devices=N` starts: they end with the first one, and leave the last word to it.

Lightning starts the other processes of the node and kills the first one if any of them ends with a
status other than 0, whatever it was about to say or save. Under torchrun and srun nothing here applies.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import lightning as L

__all__ = ["ending_with_parent", "is_child", "marked_as_parent"]

_PARENT = "DIHAL_PARENT"
_INTERVAL = 1.0


def is_child() -> bool:
    """Whether the first process of a run started this one."""
    return os.environ.get(_PARENT) == str(os.getppid())


@contextlib.contextmanager
def marked_as_parent(trainer: L.Trainer) -> Iterator[None]:
    """Processes started inside the block know that this one started them."""
    cluster = getattr(trainer.strategy, "cluster_environment", None)
    if cluster is None or cluster.creates_processes_externally:
        yield
        return
    os.environ[_PARENT] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[_PARENT]


@contextlib.contextmanager
def ending_with_parent() -> Iterator[None]:
    """Inside the block a child ends when its parent is gone: a collective would wait for it for half an hour."""
    if not is_child():
        yield
        return
    parent, over = os.getppid(), threading.Event()

    def watch() -> None:
        while not over.wait(_INTERVAL):
            if os.getppid() != parent:
                os._exit(1)

    threading.Thread(target=watch, name="dihal-parent", daemon=True).start()
    try:
        yield
    finally:
        over.set()
