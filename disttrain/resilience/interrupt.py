"""Handles Ctrl-C: the first asks for a save and a stop at the end of the step, the second stops at once.

Handles SIGINT while it is entered. Decides nothing about the run: the engine reads `requested` once per step, and the
ranks agree on it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Literal

# Terminal and launcher may each pass on the same Ctrl-C. Within this time two signals count as one.
SAME_PRESS_S = 1.0

_ASKED = b"[resilience] Ctrl-C: finishing this step, then saving and stopping; press again to stop now\n"


class Interrupts:
    """Context manager that turns the first SIGINT into a request and a later one into KeyboardInterrupt. Local.

    Python delivers signals to the main thread only: entered elsewhere, it does nothing and `requested` stays None.
    A process that was started with SIGINT ignored, as a shell's background job is, keeps ignoring it.
    """

    def __init__(self, *, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._asked_at: float | None = None
        self._previous: Any = None
        self._entered = False

    @property
    def requested(self) -> Literal["interrupt"] | None:
        """Why this process was asked to save and stop, None if it was not asked."""
        return None if self._asked_at is None else "interrupt"

    def __enter__(self) -> Interrupts:
        in_main = threading.current_thread() is threading.main_thread()
        if not self._entered and in_main and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._previous = signal.signal(signal.SIGINT, self._pressed)
            self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._entered and threading.current_thread() is threading.main_thread():
            # None stands for a handler that was not set from Python and cannot be restored.
            signal.signal(signal.SIGINT, signal.default_int_handler if self._previous is None else self._previous)
            self._entered = False

    def _pressed(self, number: int, frame: FrameType | None) -> None:
        now = self._now()
        if self._asked_at is None:
            self._asked_at = now
            _print(_ASKED)
        elif now - self._asked_at >= SAME_PRESS_S:
            raise KeyboardInterrupt


def _print(line: bytes) -> None:
    """Write to the descriptor of stderr: a handler may run within a buffered write to sys.stderr, which would raise."""
    try:
        os.write(2, line)
    except OSError:
        return  # nobody reads stderr any more, and the request remains
