"""Sends disttrain's messages for people to stderr, each with the name of its package as a prefix.

All loggers are children of the logger `disttrain`. Importing this module changes nothing: an entry point calls
`start_logs` once.
"""

from __future__ import annotations

import logging
import sys

ROOT = "disttrain"


def package_logger(package: str) -> logging.Logger:
    """Return the logger of a package (`config`, `strategy`, ...). The package's name is the prefix of its lines."""
    return logging.getLogger(f"{ROOT}.{package}")


class _Prefix(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        package = record.name.removeprefix(f"{ROOT}.")
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        return f"[{package}] {level}{record.getMessage()}"


def start_logs(*, rank: int = 0, level: int = logging.INFO) -> None:
    """Send disttrain's messages to stderr: all of them on rank 0, errors only on the other ranks.

    Local. A second call replaces the handler of the first.
    """
    logger = logging.getLogger(ROOT)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Prefix())
    logger.addHandler(handler)
    logger.setLevel(level if rank == 0 else logging.ERROR)
    logger.propagate = False
