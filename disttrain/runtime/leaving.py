"""Ends a process that failed within a limited time, although its process group may wait for peers that never come.

A collective under way keeps a thread of gloo busy until its peers join. The destructor of the process group waits for
that thread (torch 2.13, ProcessGroupGloo).
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import sys
from typing import NoReturn

LEAVE_S = 20.0
"""The longest time that a process may take to end after training has failed."""


def leave_in_time() -> None:
    """After LEAVE_S seconds, print where this process hangs and end it with exit code 1. Local."""
    with contextlib.suppress(AttributeError, ValueError):  # there is no stderr
        faulthandler.dump_traceback_later(LEAVE_S, exit=True, file=sys.__stderr__ or sys.stderr)


def leave(code: int) -> NoReturn:
    """End this process after its atexit functions have run. Local."""
    leave_in_time()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
