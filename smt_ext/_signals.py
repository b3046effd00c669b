"""Stopping between steps instead of within one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["StopSignal", "stop_signal"]


class StopSignal:
    """Whether SIGINT or SIGTERM has come."""

    def __init__(self) -> None:
        self._come = self._at_once = False

    def is_set(self) -> bool:
        return self._come

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """For long work that may be cut off anywhere: within, a signal raises KeyboardInterrupt."""
        self._at_once = True
        try:
            if self._come:
                raise KeyboardInterrupt
            yield
        finally:
            self._at_once = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self._come and number == signal.SIGINT
        self._come = True
        if again or self._at_once:
            raise KeyboardInterrupt


@contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """SIGINT and SIGTERM set what is yielded; a second SIGINT interrupts at once."""
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, stop._handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
