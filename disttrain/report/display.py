"""Shows a run's progress to people: a bar on a terminal, plain lines elsewhere.

Owns the wording. A closed stream (a broken pipe) silences the display and never ends a run.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text


class Pace:
    """Estimates the time left from the steps since the first. The first step includes compiling and warm-up."""

    def __init__(self, total_steps: int | None, now: Callable[[], float] = time.monotonic) -> None:
        self._total_steps = total_steps
        self._now = now
        self._first: tuple[int, float] | None = None

    def advance(self, step: int) -> None:
        """Count a step."""
        if self._first is None:
            self._first = (step, self._now())

    def left_s(self, step: int, step_time_s: float | None = None) -> float | None:
        """Return the seconds until the last step, None if unknown. `step_time_s` is used until two steps have ended."""
        if self._total_steps is None:
            return None
        if self._first is not None and step > self._first[0]:
            step_time_s = (self._now() - self._first[1]) / (step - self._first[0])
        return None if step_time_s is None else max(self._total_steps - step, 0) * step_time_s


class Guarded:
    """A text stream that drops text silently once it is closed (a broken pipe, a closed terminal), in any thread."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._gone = False

    def write(self, text: str) -> int:
        """Write the text, or drop it if nobody reads any more."""
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush, or do nothing if nobody reads any more."""
        self._attempt(self._stream.flush)

    def _attempt(self, act: Callable[[], object]) -> None:
        if self._gone:
            return
        try:
            act()
        except (OSError, ValueError):  # ValueError: the stream was closed
            self._gone = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)  # rich needs isatty, encoding and fileno of a console's file


class NoDisplay:
    """Shows nothing, for a silent rank or `report.progress: false`."""

    def start(self, step: int) -> None:
        """Do nothing."""

    def advance(self, step: int) -> None:
        """Do nothing."""

    def step(self, values: Mapping[str, Any]) -> None:
        """Do nothing."""

    def say(self, line: str) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Lines:
    """Prints one plain line for each reported step."""

    def __init__(self, stream: TextIO, total_steps: int | None, now: Callable[[], float] = time.monotonic) -> None:
        self._stream = Guarded(stream)
        self._total_steps = total_steps
        self._pace = Pace(total_steps, now)

    def start(self, step: int) -> None:
        """Do nothing: there is nothing to draw yet."""

    def advance(self, step: int) -> None:
        """Count the step."""
        self._pace.advance(step)

    def step(self, values: Mapping[str, Any]) -> None:
        """Print `step 120/300  loss 1.234  lr 3.0e-03  grad 0.82  8.1k tokens/s  0:42 left`."""
        step = int(values["step"])
        of = f"/{self._total_steps}" if self._total_steps is not None else ""
        parts = [f"step {step}{of}", *measures(values)]
        left_s = self._pace.left_s(step, values.get("step_time_s"))
        if left_s is not None:
            parts.append(f"{duration(left_s)} left")
        self.say("  ".join(parts))

    def say(self, line: str) -> None:
        """Print a line at once."""
        self._stream.write(line + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Do nothing: the stream belongs to the caller."""


class Bar:
    """Draws a bar that moves with every step and shows the last reported values."""

    def __init__(self, stream: TextIO, total_steps: int | None, now: Callable[[], float] = time.monotonic) -> None:
        self._pace = Pace(total_steps, now)
        self._last_step_time_s: float | None = None
        self._progress = Progress(
            BarColumn(bar_width=24),
            TextColumn("[bold]{task.fields[count]}"),
            TextColumn("{task.fields[measures]}"),
            TextColumn("[cyan]{task.fields[left]}"),
            console=Console(file=cast(TextIO, Guarded(stream))),
            # Otherwise rich would also capture what a script prints into a file or a pipe.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        self._total_steps = total_steps
        self._task = self._progress.add_task("", total=total_steps, count="", measures="", left="")

    def start(self, step: int) -> None:
        """Draw the bar."""
        self._move(step)
        self._progress.start()

    def advance(self, step: int) -> None:
        """Move the bar. A separate thread redraws it at most ten times a second."""
        self._pace.advance(step)
        self._move(step)

    def _move(self, step: int) -> None:
        left_s = self._pace.left_s(step, self._last_step_time_s)
        of = f"/{self._total_steps}" if self._total_steps is not None else ""
        left = "" if left_s is None else f"{duration(left_s)} left"
        self._progress.update(self._task, completed=step, count=f"step {step}{of}", left=left)

    def step(self, values: Mapping[str, Any]) -> None:
        """Show this step's values."""
        self._last_step_time_s = values.get("step_time_s")
        self._progress.update(self._task, measures="  ".join(measures(values)))

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(Text(line))

    def close(self) -> None:
        """Stop the bar and leave it on the screen."""
        self._progress.stop()


# ---------------------------------------------------------------------- words


def measures(values: Mapping[str, Any]) -> list[str]:
    """Return the most important values as text, in a fixed order. Missing values are left out."""
    parts = []
    for key, label, form in (("loss", "loss", "#.4g"), ("lr", "lr", ".1e"), ("grad_norm", "grad", "#.2g")):
        value = values.get(key)
        if isinstance(value, int | float):
            parts.append(f"{label} {value:{form}}" if key == "lr" else f"{label} {_short(float(value), form)}")
    for key, unit in (("tokens_per_s", "tokens/s"), ("samples_per_s", "samples/s")):
        if values.get(key):
            parts.append(f"{amount(float(values[key]))} {unit}")
            break
    return parts


def _short(value: float, form: str) -> str:
    """Return significant digits, without an exponent if the plain number is short."""
    if not math.isfinite(value):
        return str(value)
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:.0f}" if abs(value) >= 1e3 else f"{value:{form}}".rstrip(".")


def amount(value: float) -> str:
    """Return a short number: `812`, `8.1k`, `1.2M`, `3.4G`."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            return f"{value / limit:.1f}{unit}" if abs(value) < limit * 99.95 else f"{value / limit:.0f}{unit}"
    return f"{value:.1f}" if abs(value) < 10 else f"{value:.0f}"


def duration(seconds: float) -> str:
    """Return a time as `0:42`, `12:05` or `3:12:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def describe(info: Mapping[str, Any]) -> str:
    """Return a mapping as text: `strategy ddp, world_size 2, parameters model 1.2M`."""
    parts = []
    for key, value in info.items():
        if isinstance(value, Mapping):
            inner = " ".join(f"{name} {amount(one) if isinstance(one, int) else one}" for name, one in value.items())
            parts.append(f"{key} {inner}")
        else:
            parts.append(f"{key} {value}")
    return ", ".join(parts)
