"""Checkpoints written beside training: a copy is taken between two steps, a thread does the rest.

Lost work. A run that is killed goes on from the newest checkpoint that was complete. The step after
a copy was taken runs beside the writing, and then waits for it: half as long as that step took, or, where
the checkpoint is small enough to be on any disk by then, a quarter of a second. A checkpoint that is complete
then never costs more than ``trainer.save_every`` steps. One that takes longer is not waited for, because a
save shall not stall training by more than a step; the steps made while it is written may be lost as well.
The next copy waits for it, so that twice ``trainer.save_every`` steps are never exceeded.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dihal.checkpoint import prune, save_checkpoint
from dihal.errors import UsageError

__all__ = ["Saver", "patience"]

_SMALL = 16 << 20
"""Bytes of a checkpoint that is written, hashed and synced within ``_PATIENCE``."""
_PATIENCE = 0.25
"""Seconds that a step waits for the small checkpoint of the step before it."""

Groups = Mapping[str, Mapping[str, Tensor]]


def patience(size: int, took: float) -> float:
    """Seconds that a step of ``took`` seconds waits for a checkpoint of ``size`` bytes which the one before it began."""
    return max(_PATIENCE if size <= _SMALL else 0.0, took / 2)


class Saver:
    """Writes one checkpoint at a time into a run folder.

    Args:
        folder: the run folder.
        manifest: origin of the numbers, for every checkpoint.
        keep: checkpoints that stay.
    """

    def __init__(self, folder: Path, *, manifest: dict[str, Any], keep: int) -> None:
        self.problem: str | None = None
        """Why a checkpoint could not be written. Nothing is written any more after that."""
        self.step = -1
        """Step of the newest copy."""
        self._folder = folder
        self._manifest = manifest
        self._keep = keep
        self._thread: threading.Thread | None = None
        self._begun = 0.0
        self._bytes = 0
        self._reserving: threading.Thread | None = None
        self._pinned: dict[tuple[str, str], Tensor] = {}

    def reserve(self, tensors: Groups) -> None:
        """Get the page-locked memory of later copies, beside training: getting it takes longer than a copy.

        Args:
            tensors: what :meth:`start` will be given. Those that are not on a GPU need nothing.
        """
        wanted = [
            (group, name, tensor)
            for group, entries in tensors.items()
            for name, tensor in {_view(tensor): (name, tensor) for name, tensor in reversed(entries.items())}.values()
            if tensor.is_cuda
        ]

        def get() -> None:
            for group, name, tensor in wanted:
                self._host(group, name, tensor)

        if wanted:
            self._reserving = threading.Thread(target=get, name="dihal-pinned", daemon=True)
            self._reserving.start()

    def start(self, tensors: Groups, state: dict[str, Any], config: dict[str, Any], *, prunes: bool = True) -> None:
        """Copy tensors to the host and begin to write them. The one before is finished first.

        Args:
            tensors: file name -> tensors by name.
            state: counters; not changed by the caller afterwards.
            config: the resolved configuration as plain data.
            prunes: whether old checkpoints are deleted once this one is whole.
        """
        self.finish()
        if self.problem is not None:
            return
        if self._reserving is not None:
            self._reserving.join()
        self.step = int(state["step"])
        copies = self._copy(tensors)
        self._bytes = sum(t.numel() * t.element_size() for entries in copies.values() for t in entries.values())
        # No daemon: where training fails meanwhile, the process still ends with a whole checkpoint.
        self._thread = threading.Thread(
            target=self._write, args=(copies, state, config, prunes), name="dihal-checkpoint", daemon=False
        )
        self._begun = time.perf_counter()
        self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until nothing is being written, at most so many seconds."""
        if self._thread is not None:
            self._thread.join(seconds)
            if not self._thread.is_alive():
                self._thread = None

    def settle(self) -> None:
        """Wait a little for what was begun one step ago."""
        self.wait(patience(self._bytes, time.perf_counter() - self._begun))

    def finish(self) -> str | None:
        """Wait to the end; return the problem, if there is one."""
        self.wait()
        return self.problem

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def _write(
        self, copies: dict[str, dict[str, Tensor]], state: dict[str, Any], config: dict[str, Any], prunes: bool
    ) -> None:
        try:
            path = save_checkpoint(
                self._folder, tensors=copies, state=state, config=config, manifest_extra=self._manifest
            )
            if prunes:
                prune(self._folder, self._keep, valid=path)
        except UsageError as error:
            self.problem = str(error)
        except Exception as error:  # a defect, but one that must not end a thread in silence
            self.problem = f"the checkpoint of step {state['step']} was not written: {type(error).__name__}: {error}"

    def _copy(self, tensors: Groups) -> dict[str, dict[str, Tensor]]:
        """Copies on the host; names of one tensor stay names of one tensor."""
        copies: dict[str, dict[str, Tensor]] = {}
        devices = set()
        for group, entries in tensors.items():
            made: dict[tuple, Tensor] = {}
            copies[group] = {}
            for name, tensor in entries.items():
                tensor = tensor.detach()
                view = _view(tensor)
                if view not in made or not tensor.numel():
                    made[view] = self._host(group, name, tensor).copy_(tensor, non_blocking=tensor.is_cuda)
                copies[group][name] = made[view]
                devices |= {tensor.device} if tensor.is_cuda else set()
        for device in devices:
            torch.cuda.synchronize(device)
        return copies

    def _host(self, group: str, name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_cuda:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        # Page-locked memory is copied to at the full rate of the bus and takes seconds to get: made once.
        held = self._pinned.get((group, name))
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._pinned[group, name] = held
        return held


def _view(tensor: Tensor) -> tuple:
    """Equal for names of one tensor."""
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
