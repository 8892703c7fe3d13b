"""Lines for people, on stderr, each with its room as prefix; rank 0 speaks unless a line is `everywhere`.

Owns the one logger tree `disttrain`. No effect at import: `start_logs` is called once by an entry point.
"""

from __future__ import annotations

import logging
import sys

ROOT = "disttrain"


def room_logger(room: str) -> logging.Logger:
    """The logger of a room (`config`, `strategy`, ...); its name is the prefix of its lines."""
    return logging.getLogger(f"{ROOT}.{room}")


class _Prefix(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        room = record.name.removeprefix(f"{ROOT}.")
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        return f"[{room}] {level}{record.getMessage()}"


def start_logs(*, rank: int = 0, level: int = logging.INFO) -> None:
    """Send disttrain's lines to stderr: all of them on rank 0, errors only on the other ranks. Local; idempotent."""
    logger = logging.getLogger(ROOT)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Prefix())
    logger.addHandler(handler)
    logger.setLevel(level if rank == 0 else logging.ERROR)
    logger.propagate = False
