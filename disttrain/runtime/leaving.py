"""The way out of a process that failed: what it takes down in the end may wait for peers that never come.

A collective under way keeps a thread of gloo's until its peers join it, and whoever lets go of the process group last
waits for that thread (torch 2.13, ProcessGroupGloo's destructor).
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import sys
from typing import NoReturn

LEAVE_S = 20.0
"""Most that a process may take to end once training has failed."""


def leave_in_time() -> None:
    """If this process is still here LEAVE_S from now it says where it hangs, and ends with exit code 1. Local."""
    with contextlib.suppress(AttributeError, ValueError):  # no stderr to say it to
        faulthandler.dump_traceback_later(LEAVE_S, exit=True, file=sys.__stderr__ or sys.stderr)


def leave(code: int) -> NoReturn:
    """End this process, after what was registered for its end. Local."""
    leave_in_time()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
