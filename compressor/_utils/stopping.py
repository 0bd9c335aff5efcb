"""A request to stop (Ctrl-C, SIGTERM, SIGHUP), answered at once or, in the middle of a step, at its end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # the last one is not everywhere


class StopRequest:
    """Whether this process was asked to stop.

    Attributes:
        signal: the number of the signal that asked; None if none did.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._is_deferring = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Turn signals into KeyboardInterrupt inside this `with`; of the main thread only, as Python has it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        known = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
        before = {number: signal.signal(number, self._handle) for number in known}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        is_first = self.signal is None
        self.signal = number
        if self._is_deferring and is_first:
            return
        raise KeyboardInterrupt  # also at the second one: whoever asks twice does not want to wait

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let what runs in this `with` come to its end; `signal` says afterwards whether to go on."""
        self._is_deferring = True
        try:
            yield
        finally:
            self._is_deferring = False
