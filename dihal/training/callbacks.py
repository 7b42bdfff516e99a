"""What happens between optimiser steps: records, validation, checkpoints, the end."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch

from dihal.checkpoint import prune, save_checkpoint
from dihal.config.convert import to_dict
from dihal.errors import UsageError
from dihal.training.ledger import unique_tokens
from dihal.training.logs import Mirror, Record
from dihal.training.module import BridgeModule, Step
from dihal.training.optim import optimizer_state
from dihal.training.progress import TrainingProgress

__all__ = ["RunCallback", "peak_memory"]


def peak_memory(device: torch.device) -> int:
    """Largest memory in bytes: allocated on a GPU, resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class RunCallback(L.Callback):
    """Keeps the record of a run, validates, saves, and stops it.

    Args:
        folder: run folder.
        manifest: origin of the numbers, for every checkpoint.
        record: the record; None on all ranks but the first.
        mirrors: further places for records.
        progress: what a person sees.
        quantities: numbers stored beside the budget's counters (parameters, hardware).
    """

    def __init__(
        self,
        folder: Path,
        *,
        manifest: dict[str, Any],
        record: Record | None,
        mirrors: list[Mirror],
        progress: TrainingProgress,
        quantities: dict[str, Any],
    ) -> None:
        self.folder = folder
        self.signal = 0
        """The signal training stopped for; 0 where the budget was spent."""
        self.validation: dict[str, float] = {}
        """Newest validation."""
        self._manifest = manifest
        self._record = record
        self._mirrors = mirrors
        self._progress = progress
        self._quantities = quantities
        self._marked = (0, 0.0)
        self._saved = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: BridgeModule) -> None:
        """Take over signals, share the normalisation, start the clock."""
        pl_module.signals.install()
        if trainer.world_size > 1:
            for buffer in pl_module.method.buffers():
                torch.distributed.broadcast(buffer, src=0)
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._marked = (pl_module.spent.tokens, pl_module.spent.seconds)
        self._saved = pl_module.spent.step if pl_module.spent.step else -1
        self._progress.start()
        pl_module.clock.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: BridgeModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimiser step: record, show, validate, save, stop; each when due."""
        step = pl_module.last
        if step is None:
            return
        spent, config = pl_module.spent, pl_module.config
        over = pl_module.plan.is_spent(spent)
        record = None
        if spent.step % config.log.every == 0 or over:
            record = self._train_record(trainer, pl_module, step)
            self._write(record)
        self._progress.update(spent.step, pl_module.plan.share(spent), record)
        every = config.trainer.validate_every
        if step.signal == 0 and (over or (every and spent.step % every == 0)):
            self._validate(trainer, pl_module)
        if over or step.signal:
            self.signal = 0 if over else step.signal
            trainer.should_stop = True
        elif config.trainer.save_every and spent.step % config.trainer.save_every == 0:
            self._save(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: BridgeModule) -> None:
        """The last checkpoint."""
        pl_module.clock.pause()
        if pl_module.spent.step != self._saved:
            self._save(trainer, pl_module)
        pl_module.signals.restore()

    def close(self) -> None:
        """Release files and terminal, whatever happened."""
        self._progress.close()
        if self._record is not None:
            self._record.close()
        for mirror in self._mirrors:
            mirror.close()

    def _write(self, record: dict[str, Any]) -> None:
        if self._record is not None:
            self._record.write(record)
        for mirror in self._mirrors:
            mirror.write(record)

    def _train_record(self, trainer: L.Trainer, module: BridgeModule, step: Step) -> dict[str, Any]:
        spent = module.spent
        tokens, seconds = spent.tokens - self._marked[0], spent.seconds - self._marked[1]
        self._marked = (spent.tokens, spent.seconds)
        return {
            "kind": "train",
            "step": spent.step,
            "tokens": spent.tokens,
            "samples_seen": spent.samples_seen,
            "loss": step.loss,
            **step.terms,
            "grad_norm": step.grad_norm,
            "lr": step.lr,
            "tokens_per_second": tokens / seconds if seconds > 0 else None,
            "seconds": spent.seconds,
            "unique_tokens": unique_tokens(trainer.datamodule.stream, spent.samples_seen),
            "flops": spent.total_flops,
            **{f"flops/{part}": value for part, value in spent.flops.items()},
            "peak_memory": _peak(module),
        }

    def _validate(self, trainer: L.Trainer, module: BridgeModule) -> None:
        limit = module.config.trainer.validate_batches
        if limit == 0:
            return
        module.clock.pause()
        self.validation = module.validate(trainer.datamodule.val_dataloader(), limit)
        spent = module.spent
        self._write({"kind": "validation", "step": spent.step, "tokens": spent.tokens, **self.validation})
        module.clock.start()

    def _save(self, trainer: L.Trainer, module: BridgeModule) -> None:
        module.clock.pause()
        problem: str | None = None
        if trainer.is_global_zero:
            try:
                path = save_checkpoint(
                    self.folder,
                    tensors=self._tensors(module),
                    state=self._state(trainer, module),
                    config=to_dict(module.config),
                    manifest_extra=self._manifest,
                )
                prune(self.folder, module.config.trainer.keep, valid=path)
            except (UsageError, OSError) as error:
                problem = str(error)
        # All ranks wait for the outcome and share it: none trains on towards a checkpoint that is not there.
        problem = trainer.strategy.broadcast(problem)
        if problem is not None:
            raise UsageError(problem)
        self._saved = module.spent.step
        module.clock.start()

    @staticmethod
    def _tensors(module: BridgeModule) -> dict[str, dict[str, torch.Tensor]]:
        assert module.optimizer is not None
        groups = {
            "model": module.method.state_dict(),
            "optimizer": optimizer_state(module.method, module.optimizer),
        }
        if module.ema is not None:
            groups["ema"] = module.ema.state_dict()
        return groups

    def _state(self, trainer: L.Trainer, module: BridgeModule) -> dict[str, Any]:
        spent = module.spent
        spent.seconds, spent.peak_memory = module.clock.seconds, _peak(module)
        return {
            **spent.state(),
            "ema_updates": 0 if module.ema is None else module.ema.updates,
            "global_batch": module.plan.sequences_per_step,
            "budget": {
                "name": module.config.budget.name,
                "tokens": spent.tokens,
                "unique_tokens": unique_tokens(trainer.datamodule.stream, spent.samples_seen),
                "seconds": spent.seconds,
                "flops": spent.total_flops,
                "trials": module.config.budget.trials,
                "spent": module.plan.is_spent(spent),
                "peak_memory": spent.peak_memory,
                **self._quantities,
            },
            "validation": self.validation,
        }


def _peak(module: BridgeModule) -> int:
    """Peak memory so far, of a resumed run's earlier parts as well."""
    return max(module.spent.peak_memory, peak_memory(module.device))
