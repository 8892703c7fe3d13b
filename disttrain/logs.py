"""Sends disttrain's messages for people to stderr, each with the name of its package as a prefix.

All loggers are children of the logger `disttrain`. Importing this module changes nothing: a command calls `start_logs`
once, and an `Engine` opens `DefaultLogs` for as long as it exists.
"""

from __future__ import annotations

import io
import logging
import os
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


class _CurrentStderr(logging.Handler):
    """Writes to `sys.stderr` as it is when a message comes: notebooks and tests replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except (OSError, ValueError):  # nobody reads stderr any more
            self.handleError(record)


class DefaultLogs:
    """Send disttrain's messages to stderr until `close`, unless the application has configured logging. Local.

    An application has configured logging if the logger `disttrain` has a handler, a level or no propagation, or if the
    root logger has a handler that people can read. Then nothing is changed. Otherwise messages reach stderr once: all
    of them on rank 0, errors only on the other ranks. They still propagate to the root logger's handlers.

    Args:
        rank: this process's rank.
        wanted: False leaves the logger alone.
    """

    def __init__(self, *, rank: int, wanted: bool = True) -> None:
        self._logger = logging.getLogger(ROOT)
        self._handler: logging.Handler | None = None
        if wanted and not _application_configured(self._logger):
            self._handler = _CurrentStderr()
            self._handler.setFormatter(_Prefix())
            self._logger.addHandler(self._handler)
            self._logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)

    def close(self) -> None:
        """Leave the logger as it was before."""
        if self._handler is not None:
            self._logger.removeHandler(self._handler)
            self._logger.setLevel(logging.NOTSET)
            self._handler = None

    def __enter__(self) -> DefaultLogs:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _application_configured(logger: logging.Logger) -> bool:
    if logger.handlers or logger.level != logging.NOTSET or not logger.propagate:
        return True
    return any(not _is_hidden(handler) for handler in logging.getLogger().handlers)


def _is_hidden(handler: logging.Handler) -> bool:
    """Return whether a handler shows nothing: it drops messages or collects them in memory, as pytest's handlers do."""
    if isinstance(handler, logging.FileHandler):
        return handler.baseFilename == os.devnull
    in_memory = isinstance(handler, logging.StreamHandler) and isinstance(handler.stream, io.StringIO)
    return in_memory or isinstance(handler, logging.NullHandler)
