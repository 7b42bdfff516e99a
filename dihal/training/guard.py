"""Steps that must not be taken: not finite, or a spike.

The decision is a pure function of numbers that every rank holds alike after the all-reduce of a
step, so ranks agree without asking. What it remembers lives in the run's counters and so in its
checkpoints: a resumed run decides as an uninterrupted one.
"""

from __future__ import annotations

import math
import statistics
from typing import Literal

from dihal.config import TrainerConfig
from dihal.errors import UsageError
from dihal.training.budget import Spent

__all__ = ["Reason", "RunEnded", "TrainingDiverged", "judge", "named"]

Reason = Literal["", "nonfinite", "spike"]
"""Why a step was skipped; empty: it was taken."""

_WINDOW = 128
"""Gradient norms behind the running median."""
_LEAST = 16
"""Fewer norms than this tell nothing about what is usual."""
_SHOWN = 16
"""Sample ids in a message; the record holds all of them."""


class RunEnded(UsageError):
    """The ranks agreed to end the run: raised on all of them at once, told by the first."""


class TrainingDiverged(RunEnded):
    """Too many steps in a row were not finite. Weights, average and optimiser are those before them."""

    exit_status = 3
    """Of the command line: other than for bad input, so that a scheduler does not try again."""


def judge(loss: float, grad_norm: float, spent: Spent, config: TrainerConfig) -> Reason:
    """Decide about a step, and count.

    Args:
        loss: of the global batch.
        grad_norm: of the global batch, before clipping.
        spent: the counters; ``skipped``, ``nonfinite_in_a_row`` and ``gradient_norms`` are updated.
        config: ``skip_spike``.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        spent.skipped += 1
        spent.nonfinite_in_a_row += 1
        return "nonfinite"
    spent.nonfinite_in_a_row = 0
    if config.skip_spike == 0:
        return ""
    usual = spent.gradient_norms
    spike = len(usual) >= _LEAST and grad_norm > config.skip_spike * statistics.median(usual)
    # A spike counts towards what is usual: where gradients have become larger for good, training goes on.
    spent.gradient_norms = [*usual, grad_norm][-_WINDOW:]
    spent.skipped += spike
    return "spike" if spike else ""


def named(sample_ids: list[int]) -> str:
    """Sample ids for a message."""
    return ", ".join(map(str, sample_ids[:_SHOWN])) + (", ..." if len(sample_ids) > _SHOWN else "")
