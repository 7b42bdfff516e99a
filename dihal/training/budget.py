"""What a run may spend and what it has spent."""

from __future__ import annotations

import time
from dataclasses import dataclass

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
    """

    tokens_per_step: int
    sequences_per_step: int
    steps: int
    seconds: float | None

    @property
    def tokens(self) -> int:
        """Tokens that whole steps spend: at most the budget's."""
        return self.steps * self.tokens_per_step

    def share(self, tokens: int, seconds: float) -> float:
        """Share of the budget spent, in [0, 1]: of tokens or of seconds, whichever is further."""
        by_time = 0.0 if self.seconds is None else seconds / self.seconds
        return min(1.0, max(tokens / self.tokens, by_time))

    def is_spent(self, tokens: int, seconds: float) -> bool:
        """Whether one more step would exceed the tokens, or the seconds have run out."""
        return tokens + self.tokens_per_step > self.tokens or (self.seconds is not None and seconds >= self.seconds)


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
    )


@dataclass(kw_only=True)
class Spent:
    """Counters of a run, all ranks together; what a resumed run starts from."""

    step: int = 0
    """Optimiser steps."""
    tokens: int = 0
    """Positions denoised."""
    samples_seen: int = 0
    """Sequences; the next step starts with the sequence of this number."""
    seconds: float = 0.0
    """Wall seconds of training: steps and waiting for data, without validation and saving."""


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
