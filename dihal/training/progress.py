"""What a person sees while training: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

__all__ = ["TrainingProgress"]


def _clock(seconds: float) -> str:
    whole = int(max(0.0, seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60:02d}:{rest % 60:02d}"


class TrainingProgress:
    """Progress in shares of the budget.

    Args:
        enabled: off for all ranks but the first and where the user wants quiet.
        total_steps: optimiser steps the budget allows.
        console: where it goes; default: standard error.
        interval: seconds between lines where the console is no terminal.
    """

    def __init__(
        self, enabled: bool, total_steps: int, *, console: Console | None = None, interval: float = 10.0
    ) -> None:
        self._enabled = enabled
        self._total = total_steps
        self._console = console or Console(file=sys.stderr)
        self._interval = interval
        self._last = -float("inf")
        self._bar: Progress | None = None
        self._text = ""
        self._started = time.monotonic()
        self._share_at_start: float | None = None

    def start(self) -> None:
        """Open the bar on a terminal."""
        self._started = time.monotonic()
        if self._enabled and self._console.is_terminal:
            columns = (TextColumn("step {task.fields[step]}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
            self._bar = Progress(*columns, TextColumn("{task.fields[text]}"), console=self._console, transient=False)
            self._task = self._bar.add_task("", total=1.0, step=0, text="")
            self._bar.start()

    def update(self, step: int, share: float, record: Mapping[str, Any] | None = None) -> None:
        """Show a step.

        Args:
            step: optimiser steps done.
            share: share of the budget spent, in [0, 1].
            record: newest record of metrics, if there is a new one.
        """
        if not self._enabled:
            return
        now = time.monotonic()
        if self._share_at_start is None:
            self._share_at_start = share
            self._started = now
        if record is not None and "loss" in record:
            terms = [f"loss {record['loss']:.4f}"]
            if record.get("tokens_per_second"):
                terms.append(f"{record['tokens_per_second']:,.0f} tok/s")
            self._text = "  ".join(terms)
        gained = share - self._share_at_start
        left = "--:--" if gained <= 0 else _clock((now - self._started) * (1 - share) / gained)
        text = f"{self._text}  ETA {left}"
        if self._bar is not None:
            self._bar.update(self._task, completed=share, step=f"{step}/{self._total}", text=text)
        elif record is not None and (now - self._last >= self._interval or share >= 1.0):
            self._last = now
            self._console.print(f"step {step}/{self._total}  {100 * share:.0f}%  {text}", highlight=False)

    def note(self, message: str) -> None:
        """Say one thing above the bar, also where the bar is off."""
        (self._bar.console if self._bar is not None else self._console).print(message, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the last state on screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
