"""Axes: where a value lies, and which ticks to write. A logarithmic axis keeps a place of its own for zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Scale", "linear_scale", "log_scale", "tick_text"]

_ZERO_SHARE = 0.07


def tick_text(value: float) -> str:
    """A short decimal: ``0.003``, ``0.5``, ``20``."""
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e5:
        return f"{value:.6f}".rstrip("0").rstrip(".") if abs(value) < 1 else f"{value:g}"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Maps values to 0..1. ``ticks`` are values; ``zero`` is where 0 lies on a logarithmic axis, if it is shown."""

    low: float
    high: float
    logarithmic: bool
    ticks: tuple[float, ...]
    zero: bool = False

    def __call__(self, value: float) -> float:
        """Place of a value; what lies below a logarithmic axis is drawn at its zero."""
        if not self.logarithmic:
            return (value - self.low) / (self.high - self.low)
        start = _ZERO_SHARE if self.zero else 0.0
        if value < self.low:
            return 0.0
        span = math.log10(self.high) - math.log10(self.low)
        return start + (1.0 - start) * (math.log10(value) - math.log10(self.low)) / span


def log_scale(values: Sequence[float]) -> Scale:
    """A logarithmic axis over the positive values, with a place for zero where one is there."""
    positive = [value for value in values if value > 1e-9]
    low, high = (min(positive), max(positive)) if positive else (0.1, 1.0)
    low, high = low / 1.25, high * 1.25
    if high / low < 4:
        middle = math.sqrt(low * high)
        low, high = middle / 2.0, middle * 2.0
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        ticks = tuple(round(f * 10.0**e, 12) for e in exponents for f in factors if low <= f * 10.0**e <= high)
        if len(ticks) >= 3:
            break
    zero = len(positive) < len(values)
    return Scale(low=low, high=high, logarithmic=True, ticks=((0.0, *ticks) if zero else ticks), zero=zero)


def linear_scale(values: Sequence[float], *, count: int = 5) -> Scale:
    """A linear axis with round ticks."""
    low, high = min(values), max(values)
    pad = 0.08 * (high - low) or max(0.05 * abs(high), 0.1)
    low, high = low - pad, high + pad
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough)
    first = math.ceil(low / step)
    ticks = tuple(round(i * step, 12) for i in range(first, math.floor(high / step) + 1))
    return Scale(low=low, high=high, logarithmic=False, ticks=ticks)
