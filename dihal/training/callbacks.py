"""What happens between optimiser steps: records, validation, checkpoints, the end."""

from __future__ import annotations

import resource
import sys
from typing import Any

import lightning as L
import torch

from dihal.config.convert import to_dict
from dihal.training.guard import RunEnded, TrainingDiverged, named
from dihal.training.ledger import unique_tokens
from dihal.training.logs import Mirror, Record
from dihal.training.module import BridgeModule, Step
from dihal.training.optim import optimizer_state
from dihal.training.progress import TrainingProgress
from dihal.training.saving import Saver

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
        saver: writes the checkpoints; used on the first rank only.
        record: the record; None on all ranks but the first.
        mirrors: further places for records.
        progress: what a person sees.
        quantities: numbers stored beside the budget's counters (parameters, hardware).
    """

    def __init__(
        self,
        *,
        saver: Saver,
        record: Record | None,
        mirrors: list[Mirror],
        progress: TrainingProgress,
        quantities: dict[str, Any],
    ) -> None:
        self.signal = 0
        """The signal training stopped for; 0 where the budget was spent."""
        self.validation: dict[str, float] = {}
        """Newest validation."""
        self._saver = saver
        self._record = record
        self._mirrors = mirrors
        self._progress = progress
        self._quantities = quantities
        self._marked = (0, 0.0)
        self._saved = -1
        self._reserved = False

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
        self._reserve(trainer, pl_module)
        self._settle(pl_module)
        if step.save_failed:
            self._end_unsaved(trainer)
        over = pl_module.plan.is_spent(spent)
        record = None
        if step.skipped:
            self._skipped(trainer, pl_module, step)
        elif spent.step % config.log.every == 0 or over:
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
        """The last checkpoint, whole before anything else happens."""
        if pl_module.spent.step != self._saved:
            self._save(trainer, pl_module)
        self._finish_saving(trainer, pl_module)
        pl_module.signals.restore()

    def close(self) -> None:
        """Release files and terminal, whatever happened."""
        self._saver.wait()
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

    def _skipped(self, trainer: L.Trainer, module: BridgeModule, step: Step) -> None:
        """Record a step that moved nothing; end the run after too many that were not finite."""
        spent, limit = module.spent, module.config.trainer.max_nonfinite
        self._write(
            {
                "kind": "skipped",
                "step": spent.step,
                "tokens": spent.tokens,
                "samples_seen": spent.samples_seen,
                "reason": step.skipped,
                "loss": step.loss,
                "grad_norm": step.grad_norm,
                "skipped": spent.skipped,
                "sample_ids": step.sample_ids,
            }
        )
        what = "is not finite" if step.skipped == "nonfinite" else "is a spike"
        about = f"step {spent.step} {what}: loss {step.loss}, gradient norm {step.grad_norm}, samples {named(step.sample_ids)}"
        if trainer.is_global_zero:
            self._progress.note(f"skipped: {about}")
        if spent.nonfinite_in_a_row < limit:
            return
        spent.nonfinite_in_a_row = 0  # whoever goes on has as many steps again
        # Earlier checkpoints stay: one of them may be the better place to go on from.
        self._save(trainer, module, prunes=False)
        self._finish_saving(trainer, module)
        raise TrainingDiverged(
            f"{limit} steps in a row were not finite (trainer.max_nonfinite), the last one: {about}. None of them moved "
            f"the weights; step-{spent.step:08d} holds them, earlier checkpoints are untouched. Lower optim.lr, raise "
            "optim.warmup or set optim.clip, then train again, or go on with resume=true: after these samples, or from "
            "an earlier checkpoint if you remove this one."
        )

    def _reserve(self, trainer: L.Trainer, module: BridgeModule) -> None:
        """After the first step, when all that is saved exists, get the memory its copies need."""
        if not self._reserved and trainer.is_global_zero and not module.sharded:
            self._saver.reserve(self._tensors(module))
        self._reserved = True

    def _settle(self, module: BridgeModule) -> None:
        """Let the step after a save wait for it; learn of a save that failed."""
        if self._saver.busy and module.spent.step == self._saver.step + 1:
            module.clock.pause()
            self._saver.settle()
            module.clock.start()
        module.save_failed = self._saver.problem is not None

    def _save(self, trainer: L.Trainer, module: BridgeModule, *, prunes: bool = True) -> None:
        module.clock.pause()
        tensors = self._tensors(module)
        if trainer.is_global_zero:
            self._saver.start(tensors, self._state(trainer, module), to_dict(module.config), prunes=prunes)
        self._saved = module.spent.step
        module.clock.start()

    def _finish_saving(self, trainer: L.Trainer, module: BridgeModule) -> None:
        """All ranks wait for the outcome and share it."""
        module.clock.pause()
        self._saver.finish()
        problem = trainer.strategy.broadcast(self._saver.problem)
        if problem is not None:
            raise RunEnded(problem)

    def _end_unsaved(self, trainer: L.Trainer) -> None:
        # None trains on towards a checkpoint that will not be there.
        raise RunEnded(trainer.strategy.broadcast(self._saver.problem))

    @staticmethod
    def _tensors(module: BridgeModule) -> dict[str, dict[str, torch.Tensor]]:
        assert module.optimizer is not None
        groups = {
            "model": module.method.state_dict(),
            "optimizer": optimizer_state(module.method, module.optimizer),
        }
        if module.ema is not None:
            groups["ema"] = module.ema.state_dict()
        return {name: module.whole(tensors) for name, tensors in groups.items()}

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
            "validation": dict(self.validation),
        }


def _peak(module: BridgeModule) -> int:
    """Peak memory so far, of a resumed run's earlier parts as well."""
    return max(module.spent.peak_memory, peak_memory(module.device))
