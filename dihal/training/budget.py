"""What a run may spend and what it has spent."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from dihal.config import BudgetConfig
from dihal.errors import UsageError

__all__ = ["Clock", "Plan", "Spent", "plan_steps"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A budget in whole optimiser steps.

    Attributes:
        tokens_per_step: positions denoised per optimiser step, all devices together.
        sequences_per_step: the global batch.
        steps: optimiser steps that fit into the tokens.
        seconds: wall seconds of training at most, or None.
        flops: metered FLOPs of training at most, or None.
    """

    tokens_per_step: int
    sequences_per_step: int
    steps: int
    seconds: float | None
    flops: float | None

    @property
    def tokens(self) -> int:
        """Tokens that whole steps spend: at most the budget's."""
        return self.steps * self.tokens_per_step

    def share(self, spent: Spent) -> float:
        """Share of the budget spent, in [0, 1]: of tokens, seconds or FLOPs, whichever is furthest."""
        by_time = 0.0 if self.seconds is None else spent.seconds / self.seconds
        by_flops = 0.0 if self.flops is None else spent.total_flops / self.flops
        return min(1.0, max(spent.tokens / self.tokens, by_time, by_flops))

    def is_spent(self, spent: Spent) -> bool:
        """Whether one more step would exceed the tokens or the FLOPs, or the seconds have run out.

        The next step is taken to cost as many FLOPs as the one before: where a part sets in (the suffix, the end
        of an autoencoder's stage), the FLOPs may be exceeded by the difference, once.
        """
        return (
            spent.tokens + self.tokens_per_step > self.tokens
            or (self.seconds is not None and spent.seconds >= self.seconds)
            or (self.flops is not None and spent.total_flops + spent.step_flops > self.flops)
        )


def plan_steps(
    budget: BudgetConfig, *, sequence_length: int, batch_size: int, accumulate: int, world_size: int
) -> Plan:
    """Turn a budget into steps. A run never spends more than its budget, and less than one step less.

    Raises:
        UsageError: a budget that is not positive, or smaller than one optimiser step.
    """
    sequences = batch_size * accumulate * world_size
    per_step = sequences * sequence_length
    if budget.seconds is not None and not budget.seconds > 0:
        raise UsageError(f"budget.seconds is {budget.seconds}; it must be positive, or null for no limit.")
    if budget.flops is not None and not budget.flops > 0:
        raise UsageError(f"budget.flops is {budget.flops}; it must be positive, or null for no limit.")
    if budget.trials is not None and budget.trials < 1:
        raise UsageError(f"budget.trials is {budget.trials}; it counts this configuration, too: at least 1, or null.")
    if budget.tokens < per_step:
        raise UsageError(
            f"budget.tokens is {budget.tokens:,}, one optimiser step takes {per_step:,} "
            f"({world_size} devices x {accumulate} micro-batches x {batch_size} sequences x {sequence_length} tokens). "
            "Raise the budget, or lower data.batch_size, trainer.accumulate or data.sequence_length."
        )
    return Plan(
        tokens_per_step=per_step,
        sequences_per_step=sequences,
        steps=budget.tokens // per_step,
        seconds=budget.seconds,
        flops=budget.flops,
    )


_LATER = ("skipped", "nonfinite_in_a_row", "gradient_norms")
"""Counters that checkpoints of version 0.1.0 lack; a run then ended at the first step that was not finite."""


@dataclass(kw_only=True)
class Spent:
    """Counters of a run, all ranks together; what a resumed run starts from."""

    step: int = 0
    """Optimiser steps, skipped ones included: always the sequences seen divided by the global batch."""
    tokens: int = 0
    """Positions denoised."""
    samples_seen: int = 0
    """Sequences; the next step starts with the sequence of this number."""
    seconds: float = 0.0
    """Wall seconds of training: steps and waiting for data, without validation and saving."""
    flops: dict[str, float] = field(default_factory=dict)
    """FLOPs executed in training, by part of ``dihal.meter.PARTS``; preparation included, validation not."""
    step_flops: float = 0.0
    """FLOPs of the newest step."""
    peak_memory: int = 0
    """Largest memory of the first rank's process, in bytes."""
    skipped: int = 0
    """Steps that did not move the weights."""
    nonfinite_in_a_row: int = 0
    """Steps skipped since the last finite one."""
    gradient_norms: list[float] = field(default_factory=list)
    """The newest finite gradient norms, oldest first; kept where spikes are skipped."""

    @property
    def total_flops(self) -> float:
        """FLOPs of all parts."""
        return float(sum(self.flops.values()))

    def add_flops(self, flops: Mapping[str, float]) -> None:
        """Add FLOPs by part."""
        for part, value in flops.items():
            self.flops[part] = self.flops.get(part, 0.0) + value

    def state(self) -> dict[str, Any]:
        """The counters as JSON data."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any], where: str) -> Spent:
        """Inverse of :meth:`state`; further entries are passed over.

        Raises:
            UsageError: counters are missing, as in checkpoints from before the ledger.
        """
        names = [counter.name for counter in fields(cls) if counter.name in state or counter.name not in _LATER]
        missing = [name for name in names if name not in state]
        if missing:
            raise UsageError(
                f"the checkpoint {where!r} lacks the counters {', '.join(missing)}: it was written before DiHAL metered "
                "its budget, and what was spent cannot be known any more. Train again into another folder."
            )
        return cls(**{name: state[name] for name in names})


class Clock:
    """Wall seconds of training, with pauses.

    Args:
        seconds: already spent.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._before = seconds
        self._since: float | None = None

    def start(self) -> None:
        """Run, if it does not."""
        if self._since is None:
            self._since = time.perf_counter()

    def pause(self) -> None:
        """Stand still, if it runs."""
        self._before = self.seconds
        self._since = None

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return self._before + (0.0 if self._since is None else time.perf_counter() - self._since)
