"""A run's folder `DIR/NAME/`: where each file lies, and how it is written so that a kill leaves it readable.

Owns the names in the folder and the bytes of metrics.jsonl, ledger.jsonl and status.json. Knows nothing of ranks: its
caller sees to it that one process writes. Refuses with CheckpointError, naming path and OS error, what it cannot write.
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
    """The paths of one run, and the few files that are appended to or replaced. Making one touches no disk."""

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
        """Make the folder, and this process the only one that writes to it, until `unlock` or the process's end.

        Waits for one that is just ending, as after a restart. Raises CheckpointError where another run goes on in it.
        """
        file = self.lock_file
        with _writing(file):
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a process's own: a forked worker has no part
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    _log.warning("%s cannot be locked here (%s): see that one run at a time writes to it", file, error)
                    break
                if time.monotonic() >= deadline:
                    os.close(descriptor)
                    raise CheckpointError(
                        explain(
                            f"{self.path} is written by one run at a time.",
                            f"another process that holds {file.name}, after waiting {wait_s:.0f} s",
                            "wait for it or stop it, or set another run.name",
                        )
                    ) from None
            time.sleep(0.2)
        self._lock = descriptor

    def unlock(self) -> None:
        """Let others write to the folder. Any number of times."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        """One line in metrics.jsonl. A number that JSON lacks is written as null and named under `nonfinite`."""
        _append(self.metrics, _plain(values))

    def append_ledger(self, event: str, **fields: Any) -> None:
        """One line in ledger.jsonl: when (UTC), what, and the fields given."""
        _append(self.ledger, {"time": _now(), "event": event, **_plain(fields)})

    def write_status(self, state: str, step: int, exit_code: int | None, reason: str | None, **more: Any) -> None:
        """Replace status.json whole: a reader sees the old one or the new one, never half of either."""
        status = {
            "state": state,
            "step": step,
            "exit_code": exit_code,
            "reason": reason,
            "time": _now(),
            **_plain(more),
        }
        _replace(self.status, json.dumps(status, indent=2, allow_nan=False) + "\n")

    def write_config(self, text: str) -> None:
        """Replace config.yaml whole, making the folder where there is none."""
        _replace(self.config, text)

    def trim_metrics(self, after_step: int) -> int:
        """Move what an unsaved past wrote after `after_step` to incidents/; returns how many lines that were.

        A line torn by a kill goes with them. The moved lines are safe on disk before metrics.jsonl loses them.
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
        """What status.json says; None where there is none. Raises CheckpointError where it is not JSON."""
        if not self.status.exists():
            return None
        try:
            found = json.loads(self.status.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError(f"a {type(found).__name__}, not an object")
        except (OSError, ValueError) as error:
            raise CheckpointError(
                explain(f"The run's state is to be read from {self.status}.", str(error), "mend or remove that file")
            ) from error
        return found

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every whole line of metrics.jsonl, in the order written; numbers named under `nonfinite` come back as NaN."""
        return [_with_nan(values) for _, values in _lines(self.metrics) if values is not None]

    def read_ledger(self) -> list[dict[str, Any]]:
        """Every whole line of ledger.jsonl, in the order written."""
        return [values for _, values in _lines(self.ledger) if values is not None]


# ---------------------------------------------------------------------- JSON


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values in JSON's own types. 0-d tensors and numpy scalars have `item`; the rest is written as text."""
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
        return [_plain_value(f"{key}.{place}", one, nonfinite) for place, one in enumerate(value)]
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
    """Turn the operating system's refusal into an error that names the file."""
    try:
        _make_folders(path.parent)
        yield
    except OSError as error:
        raise CheckpointError(
            explain(
                f"The run's record is to be written to {path}.",
                f"{type(error).__name__}: {error.strerror or error}",
                "free space or allow writing there, or set another run.dir",
            )
        ) from error


def _make_folders(folder: Path) -> None:
    """A folder and those above it that are missing, each name flushed: else a power cut takes all that is below it."""
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
    """One write for the whole line, on a line of its own even after a torn one."""
    data = (json.dumps(values, allow_nan=False) + "\n").encode()
    with _writing(path):
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":
                data = b"\n" + data
            while data:  # a disk that fills up takes a part, and says why at the next attempt
                data = data[os.write(file, data) :]
        finally:
            os.close(file)


def _replace(path: Path, text: str) -> None:
    """Write beside, flush to the disk, rename over, and flush the name too: what comes after may rely on it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _writing(path):
        try:
            with beside.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        _flush_names(path.parent)


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """(text, object) a line, None as object where a kill tore it."""
    if not path.exists():
        return
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise CheckpointError(explain(f"{path} is to be read.", str(error), "allow reading it")) from error
    for text in texts:
        if not text.strip():
            continue
        try:
            values = json.loads(text)
        except ValueError:
            values = None
        yield text, values if isinstance(values, dict) else None
