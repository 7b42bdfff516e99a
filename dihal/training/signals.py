"""Being asked to stop: a flag, read at the end of a step.

A handler that communicates or raises can hang a process group or leave half a step behind, so it
does nothing but remember the signal. Ranks agree on the flag in the all-reduce of the next step.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

__all__ = ["StopSignals", "exit_code"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def exit_code(number: int) -> int:
    """Exit status after stopping for a signal: 130 for SIGINT; 143 for SIGTERM and for SIGUSR1, a scheduler's notice."""
    return 130 if number == signal.SIGINT else 143


class StopSignals:
    """Catches SIGINT, SIGTERM and SIGUSR1 between :meth:`install` and :meth:`restore`.

    A second SIGINT interrupts at once. Outside the main thread signals stay as they are.
    """

    def __init__(self) -> None:
        self.received: int = 0
        """Number of the signal, 0 for none; the first one counts."""
        self._earlier: dict[int, object] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or int(number)

    def install(self) -> None:
        """Take over the signals. Lightning installs a SIGTERM handler that broadcasts: install after it."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._earlier[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Give the signals back."""
        while self._earlier:
            number, earlier = self._earlier.popitem()
            signal.signal(number, earlier if earlier is not None else signal.SIG_DFL)
