"""Reads and writes the files of a run's folder `DIR/NAME/`, so that a killed process leaves them readable.

Owns the names in the folder and the bytes of metrics.jsonl, ledger.jsonl and status.json. Knows nothing of ranks: the
caller lets one process write. What cannot be written raises CheckpointError with path and operating-system error.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from disttrain.errors import CheckpointError, explain
from disttrain.logs import package_logger

_log = package_logger("report")


class RunFolder:
    """The paths of one run, and the few files that are appended to or replaced. Creating it touches no disk."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.ledger = self.path / "ledger.jsonl"
        self.status = self.path / "status.json"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.incidents = self.path / "incidents"
        self.loss_png = self.path / "loss.png"
        self.lock_file = self.path / ".lock"

        self._lock: int | None = None

    # ------------------------------------------------------------------ writing

    def lock(self, wait_s: float = 30.0) -> None:
        """Create the folder and lock it for this process, until `unlock` or the process's end.

        Waits `wait_s` seconds for a process that is just ending, as after a restart. Raises CheckpointError where
        another process still writes to the folder.
        """
        file = self.lock_file
        with _writing(file):
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a forked worker does not inherit it
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    _log.warning("cannot lock %s (%s): make sure that one run at a time writes to it", file, error)
                    break
                if time.monotonic() >= deadline:
                    os.close(descriptor)
                    raise CheckpointError(
                        explain(
                            f"Cannot write to {self.path}, which one run at a time may write to.",
                            f"another process still holds {file.name} after {wait_s:.0f} s",
                            "wait for it or stop it, or set another run.name",
                        )
                    ) from None
            time.sleep(0.2)
        self._lock = descriptor

    def unlock(self) -> None:
        """Let other processes write to the folder. Idempotent."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl. A number that is not finite becomes null and is named under `nonfinite`."""
        _append(self.metrics, _plain(values))

    def append_ledger(self, event: str, **fields: Any) -> None:
        """Append a line to ledger.jsonl: the time (UTC), the event, and the given fields."""
        _append(self.ledger, {"time": _now(), "event": event, **_plain(fields)})

    def refresh_status(self, step: int) -> None:
        """Replace status.json of a running run with a new step. Cheap, because it does not wait for the disk.

        A power cut may leave the file empty, which `read_status` accepts.
        """
        self._write_status("running", step, None, None, {}, durable=False)

    def write_status(self, state: str, step: int, exit_code: int | None, reason: str | None, **more: Any) -> None:
        """Replace status.json atomically: a reader sees the old file or the new file, never a part of either."""
        self._write_status(state, step, exit_code, reason, more, durable=True)

    def _write_status(
        self,
        state: str,
        step: int,
        exit_code: int | None,
        reason: str | None,
        more: Mapping[str, Any],
        *,
        durable: bool,
    ) -> None:
        status = {
            "state": state,
            "step": step,
            "exit_code": exit_code,
            "reason": reason,
            "time": _now(),
            **_plain(more),
        }
        _replace(self.status, json.dumps(status, indent=2, allow_nan=False) + "\n", durable=durable)

    def write_config(self, text: str) -> None:
        """Replace config.yaml atomically. Creates the folder if it is missing."""
        _replace(self.config, text)

    def trim_metrics(self, after_step: int) -> int:
        """Move the lines of steps after `after_step`, which were never saved, to incidents/. Returns their number.

        A line that a kill left incomplete is moved too. The moved lines are on disk before metrics.jsonl loses them.
        """
        kept: list[str] = []
        moved: list[str] = []
        for text, values in _lines(self.metrics):
            (kept if values is not None and _step_of(values) <= after_step else moved).append(text)
        if not moved:
            return 0
        _replace(self._unused_incident(after_step), "\n".join(moved) + "\n")
        _replace(self.metrics, "".join(f"{line}\n" for line in kept))
        return len(moved)

    def _unused_incident(self, after_step: int) -> Path:
        attempt = 1
        while (path := self.incidents / f"metrics-after-step-{after_step}-{attempt}.jsonl").exists():
            attempt += 1
        return path

    # ------------------------------------------------------------------ reading

    def read_status(self) -> dict[str, Any] | None:
        """Return the contents of status.json, None where it is missing or empty.

        Raises CheckpointError where it is not JSON.
        """
        if not self.status.exists():
            return None
        try:
            text = self.status.read_text(encoding="utf-8")
            if not text.strip("\0\n"):  # a power cut after `refresh_status`
                return None
            found = json.loads(text)
            if not isinstance(found, dict):
                raise ValueError(f"a {type(found).__name__}, not an object")
        except (OSError, ValueError) as error:
            raise CheckpointError(
                explain(f"Cannot read the run's state from {self.status}.", str(error), "repair or remove that file")
            ) from error
        return found

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the complete lines of metrics.jsonl in order. Numbers named under `nonfinite` come back as NaN."""
        return [_with_nan(values) for _, values in _lines(self.metrics) if values is not None]

    def read_ledger(self) -> list[dict[str, Any]]:
        """Return the complete lines of ledger.jsonl in order."""
        return [values for _, values in _lines(self.ledger) if values is not None]


# ---------------------------------------------------------------------- JSON


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values as JSON types. 0-d tensors and numpy scalars have `item`; other objects become text."""
    nonfinite: list[str] = []
    plain = {key: _plain_value(key, value, nonfinite) for key, value in values.items()}
    if nonfinite:
        plain["nonfinite"] = nonfinite
    return plain


def _plain_value(key: str, value: Any, nonfinite: list[str]) -> Any:
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        nonfinite.append(key)
        return None
    if isinstance(value, Mapping):
        return {str(inner): _plain_value(f"{key}.{inner}", one, nonfinite) for inner, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_value(f"{key}.{index}", one, nonfinite) for index, one in enumerate(value)]
    if callable(getattr(value, "item", None)) and getattr(value, "ndim", 0) == 0:
        return _plain_value(key, value.item(), nonfinite)
    return str(value)


def _with_nan(values: dict[str, Any]) -> dict[str, Any]:
    return values | {key: math.nan for key in values.get("nonfinite", ()) if key in values}


def _step_of(values: Mapping[str, Any]) -> int:
    step = values.get("step", 0)
    return step if isinstance(step, int) else 0


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


# ---------------------------------------------------------------------- bytes


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an error of the operating system into a CheckpointError that names the file."""
    try:
        _make_folders(path.parent)
        yield
    except OSError as error:
        raise CheckpointError(
            explain(
                f"Cannot write {path}.",
                f"{type(error).__name__}: {error.strerror or error}",
                "free space or allow writing there, or set another run.dir",
            )
        ) from error


def _make_folders(folder: Path) -> None:
    """Create a folder and its missing parents. Each name is flushed: a power cut would otherwise lose all below it."""
    for missing in [one for one in (*reversed(folder.parents), folder) if not one.exists()]:
        missing.mkdir(exist_ok=True)
        _flush_names(missing.parent)


def _flush_names(folder: Path) -> None:
    names = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(names)
    finally:
        os.close(names)


def _append(path: Path, values: Mapping[str, Any]) -> None:
    """Append a line by one write. After an incomplete line it starts a new line."""
    data = (json.dumps(values, allow_nan=False) + "\n").encode()
    with _writing(path):
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":
                data = b"\n" + data
            while data:  # a disk that fills up accepts a part, and reports why at the next attempt
                data = data[os.write(file, data) :]
        finally:
            os.close(file)


def _replace(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a temporary file and rename it to `path`. If `durable`, flush contents and name to the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _writing(path):
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        if durable:
            _flush_names(path.parent)


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Yield (text, object) of each line, with None as object where a kill left the line incomplete."""
    if not path.exists():
        return
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise CheckpointError(explain(f"Cannot read {path}.", str(error), "allow reading it")) from error
    for text in texts:
        if not text.strip():
            continue
        try:
            values = json.loads(text)
        except ValueError:
            values = None
        yield text, values if isinstance(values, dict) else None
