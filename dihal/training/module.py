"""The LightningModule: one optimiser step, spelled out.

Optimisation is manual. What has to be exact (which micro-batches make a step, when gradients are
reduced, clipped and checked, when weights and average move, what is counted) then stands in one
place, in order, instead of following from hooks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from dihal.backbone import Backbone
from dihal.config import TrainConfig
from dihal.data.batch import Batch
from dihal.meter import PARTS
from dihal.methods import AnyMethod, LossOutput
from dihal.training.budget import Clock, Plan, Spent
from dihal.training.ema import Ema
from dihal.training.guard import Reason, judge
from dihal.training.optim import build_optimizer, load_optimizer_state, lr_factor
from dihal.training.sharding import apart, average_rest, clip, gradient_norm, scattered, shard, unsynchronised, whole
from dihal.training.signals import StopSignals

__all__ = ["BridgeModule", "Step"]

_VALIDATION_GRID = 64
"""Places of the low-discrepancy times in validation; a window's time then depends on its number only."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """Outcome of an optimiser step, the same on every rank.

    Attributes:
        loss: mean over the global batch of the quantity that was differentiated.
        terms: means of the loss terms.
        grad_norm: before clipping.
        lr: learning rate of the step.
        signal: the signal some rank received, 0 for none.
        save_failed: whether a checkpoint could not be written.
        skipped: why the weights did not move; empty: they did.
        sample_ids: samples behind a skipped step: those of the micro-batches whose loss is not finite, else all.
    """

    loss: float
    terms: dict[str, float]
    grad_norm: float
    lr: float
    signal: int
    save_failed: bool
    skipped: Reason
    sample_ids: list[int]


class BridgeModule(L.LightningModule):
    """Trains a method beside a frozen backbone.

    ``method`` is the only registered submodule. The backbone is no ``nn.Module`` and stays out of
    the registry: it is in no checkpoint, no broadcast and no average.

    Args:
        config: resolved configuration.
        backbone: frozen, on the device of this rank.
        method: with its normalisation measured.
        plan: the budget in steps.
        spent: counters to go on from.
        signals: requests to stop.
        optimizer_state: named state to go on from.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        backbone: Backbone,
        method: AnyMethod,
        plan: Plan,
        spent: Spent,
        signals: StopSignals,
        optimizer_state: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config = config
        self.method = method
        self.backbone = backbone
        self.plan = plan
        self.spent = spent
        self.signals = signals
        self.clock = Clock(spent.seconds)
        self.ema = Ema(method, config.optim.ema) if config.optim.ema > 0 else None
        self.save_failed = False
        """Whether this rank could not write a checkpoint; the others hear of it at the next step."""
        self._optimizer_state = optimizer_state
        self.optimizer: torch.optim.Optimizer | None = None
        self.last: Step | None = None
        """Set when a micro-batch completed an optimiser step, else None."""
        self._micro: list[tuple[Tensor, LossOutput]] = []
        # Running means of the losses inside a learned schedule: a forward pass moves them, a skipped step must not.
        fitted = [part for part in method.modules() if hasattr(part, "fit_loss")]
        self._running = [buffer for part in fitted for buffer in part.buffers(recurse=False)]
        self._before: list[Tensor] = []

    @property
    def sharded(self) -> bool:
        """Whether weights are held in shards."""
        return self.config.trainer.strategy == "fsdp" and self.trainer.world_size > 1

    def configure_model(self) -> None:
        """Shard what is to be sharded; processes know each other by now."""
        if not self.sharded:
            return
        self.method.to(self.device)
        shard(self.method)
        parameters = dict(self.method.named_parameters())
        if self.ema is not None:
            averages, updates = scattered(self.ema.state_dict(), parameters), self.ema.updates
            self.ema = Ema(self.method, self.config.optim.ema)
            self.ema.load_state_dict(averages, updates=updates)
        if self._optimizer_state is not None:
            self._optimizer_state = scattered(self._optimizer_state, parameters)

    def whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors without their shards, on the first rank; elsewhere none. Every rank must ask."""
        if not self.sharded:
            return tensors
        found = {}
        for name, tensor in tensors.items():
            full = whole(tensor.detach())
            if self.global_rank == 0:
                found[name] = full.cpu()
        return found

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimiser, built (and restored) after the strategy has moved the module to its device."""
        self.optimizer = build_optimizer(self.method, self.config.optim)
        if self.sharded:
            apart(self.optimizer)
        if self._optimizer_state is not None:
            load_optimizer_state(self.method, self.optimizer, self._optimizer_state)
            self._optimizer_state = None
        return self.optimizer

    # -- training

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One micro-batch; the last one of a step moves the weights."""
        self.last = None
        accumulate = self.config.trainer.accumulate
        number = len(self._micro)
        if number == 0:
            self._before = [buffer.clone() for buffer in self._running]
        # Dropout is the one source of randomness that is not keyed by sample id: keyed by step
        # instead, so that no generator state has to be saved.
        _reseed(_seed(self.config.seed, self.spent.step, number, self.global_rank), self.device)
        final = number == accumulate - 1
        with contextlib.nullcontext() if final else self._no_reduction():
            out = self.method.loss(
                self.backbone,
                batch,
                seed=self.config.seed,
                step=self.spent.step,
                batch_index=batch.sample_ids - self.spent.samples_seen,
                global_batch=self.plan.sequences_per_step,
                progress=self.plan.share(self.spent),
            )
            # Training windows hold no padding, so micro-batches and ranks weigh the same.
            self.manual_backward(out.total / accumulate)
        self._micro.append((batch.sample_ids, out))
        if final:
            self.last = self._finish_step()

    def _no_reduction(self) -> contextlib.AbstractContextManager[Any]:
        if self.trainer.world_size == 1:
            return contextlib.nullcontext()
        if self.sharded:
            return unsynchronised(self.method)
        return self.trainer.strategy.block_backward_sync()

    def _finish_step(self) -> Step:
        assert self.optimizer is not None
        micro, self._micro = self._micro, []
        norm = self._gradient_norm()
        names = list(micro[0][1].terms)
        loss = torch.stack([out.total.detach() for _, out in micro]).double().mean()
        terms = [torch.stack([out.terms[name].detach() for _, out in micro]).double().mean() for name in names]
        tokens = sum(out.tokens for _, out in micro)
        rank_zero = self.global_rank == 0
        # Everything ranks must agree on travels in one small all-reduce and reaches the host once.
        running = [buffer.double().flatten() for buffer in self._running]
        numbers = torch.cat([torch.stack([loss, *terms, norm.double()]), *running])
        executed = [sum(out.flops.get(part, 0.0) for _, out in micro) for part in PARTS]
        flags = torch.tensor(
            [*executed, float(tokens), self.clock.seconds if rank_zero else 0.0],
            dtype=torch.float64,
            device=numbers.device,
        )
        highest = torch.tensor(
            [float(self.signals.received), float(self.save_failed)], dtype=torch.float64, device=numbers.device
        )
        total_loss, *rest, all_tokens, seconds, signal, save_failed = self._agree(numbers, flags, highest)
        *total_terms, grad_norm = rest[: len(names) + 1]
        means, executed = rest[len(names) + 1 : -len(PARTS)], rest[-len(PARTS) :]
        flops = {part: value for part, value in zip(PARTS, executed, strict=True) if value}

        # A skipped step has used its samples, its share of the budget and its number; only weights, average
        # and optimiser stay as they are.
        spent = self.spent
        spent.tokens += int(all_tokens)
        spent.seconds = seconds
        spent.step_flops = sum(flops.values())
        spent.add_flops(flops)
        lr = self.config.optim.lr * lr_factor(self.plan.share(spent), self.config.optim)
        skipped = judge(total_loss, grad_norm, spent, self.config.trainer)
        if not skipped:
            self._move(lr, norm)
        self._settle_running(means, undo=bool(skipped))
        self.optimizer.zero_grad(set_to_none=True)
        ids = self._blamed(micro) if skipped else []
        spent.step += 1
        spent.samples_seen += self.plan.sequences_per_step
        return Step(
            loss=total_loss,
            terms=dict(zip(names, total_terms)),
            grad_norm=grad_norm,
            lr=lr,
            signal=int(signal),
            save_failed=bool(save_failed),
            skipped=skipped,
            sample_ids=ids,
        )

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.method.parameters() if p.grad is not None]

    def _gradient_norm(self) -> Tensor:
        if not self.sharded:
            return get_total_norm(self._gradients())
        average_rest(self.method.parameters())
        return gradient_norm(self._gradients())

    def _move(self, lr: float, norm: Tensor) -> None:
        assert self.optimizer is not None
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.config.optim.clip > 0 and self.sharded:
            clip(self._gradients(), self.config.optim.clip, norm)
        elif self.config.optim.clip > 0:
            clip_grads_with_norm_(self.method.parameters(), self.config.optim.clip, norm)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update()

    def _settle_running(self, means: list[float], *, undo: bool) -> None:
        """Leave the running means as before the step, or with the mean over ranks: they are linear in the batch."""
        for buffer, before in zip(self._running, self._before, strict=True):
            values, means = means[: buffer.numel()], means[buffer.numel() :]
            if undo:
                buffer.copy_(before)
            elif self.trainer.world_size > 1:
                buffer.copy_(torch.tensor(values, dtype=torch.float64).view_as(buffer))

    def _agree(self, means: Tensor, sums: Tensor, highest: Tensor) -> list[float]:
        """Mean, sum and maximum over ranks, in this order, as host numbers."""
        world = self.trainer.world_size
        if world > 1:
            import torch.distributed as dist

            joined = torch.cat([means / world, sums])
            dist.all_reduce(joined)
            dist.all_reduce(highest, op=dist.ReduceOp.MAX)
            return torch.cat([joined, highest]).tolist()
        return torch.cat([means, sums, highest]).tolist()

    def _blamed(self, micro: list[tuple[Tensor, LossOutput]]) -> list[int]:
        own = [ids for ids, out in micro if not bool(torch.isfinite(out.total.detach()))]
        blamed = sorted(int(i) for ids in own for i in ids.tolist())
        if self.trainer.world_size > 1:
            import torch.distributed as dist

            gathered: list[list[int]] = [[] for _ in range(self.trainer.world_size)]
            dist.all_gather_object(gathered, blamed)
            blamed = sorted(i for part in gathered for i in part)
        first = self.spent.samples_seen
        return blamed or list(range(first, first + self.plan.sequences_per_step))

    # -- validation

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch], limit: int) -> dict[str, float]:
        """Loss terms on held-out windows, with the last and with the averaged weights (``ema_`` in front).

        Every term is a mean over real tokens, over all ranks' batches. Times and noise are keyed by
        window and by the run's seed, so that two validations differ by their weights only.

        Args:
            batches: this rank's batches; the first ``limit`` are used.
        """
        training = self.method.training
        self.method.eval()
        sums: dict[str, Tensor] = {}
        count = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, batch in enumerate(batches):
            if number >= limit:
                break
            batch = batch.to(self.device)
            for prefix, weights in self._weights():
                with weights:
                    out = self.validation_step(batch, number)
                for name, value in {"loss": out.total, **out.terms}.items():
                    zero = torch.zeros((), dtype=torch.float64, device=self.device)
                    sums[prefix + name] = sums.get(prefix + name, zero) + value.double() * out.tokens
            count += out.tokens
        self.method.train(training)
        packed = torch.stack([*sums.values(), count])
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(packed)
        *totals, tokens = packed.tolist()
        return {name: total / tokens for name, total in zip(sums, totals)} | {"validation_tokens": int(tokens)}

    def _weights(self) -> list[tuple[str, contextlib.AbstractContextManager[None]]]:
        own: list[tuple[str, contextlib.AbstractContextManager[None]]] = [("", contextlib.nullcontext())]
        return own if self.ema is None else [*own, ("ema_", self.ema.swapped())]

    def validation_step(self, batch: Batch, batch_idx: int) -> LossOutput:
        """Loss of one batch with the weights as they are."""
        with self.trainer.precision_plugin.val_step_context():
            return self.method.loss(
                self.backbone,
                batch,
                seed=self.config.seed,
                step=0,
                batch_index=batch.sample_ids % _VALIDATION_GRID,
                global_batch=_VALIDATION_GRID,
            )


def _reseed(seed: int, device: torch.device) -> None:
    # torch.manual_seed does the same for every kind of device there is, at a hundred times the price.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def _seed(seed: int, step: int, micro: int, rank: int) -> int:
    # Any fixed mixing does: distinct (step, micro, rank) must not share a generator's start.
    mixed = seed & 0xFFFFFFFF
    for part in (step, micro, rank):
        mixed = (mixed * 6364136223846793005 + 2 * part + 1442695040888963407) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 29
    return mixed & 0x7FFFFFFFFFFFFFFF
