"""Reports a run to metrics.jsonl, ledger.jsonl and status.json, to trackers, and to people as lines or a bar.

Called by the engine. A rank without a folder makes the same calls and nothing happens, so the loop needs no
`if rank == 0`. A failing tracker, plot or bar never ends a run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TextIO

from disttrain.errors import CheckpointError
from disttrain.logs import package_logger
from disttrain.report.display import Bar, Lines, NoDisplay, describe
from disttrain.report.run_folder import RunFolder
from disttrain.report.trackers import Tracker

_log = package_logger("report")


class Reporter:
    """Reports one run. Local.

    Args:
        folder: the run's folder, None on a silent rank.
        trackers: receive the numbers of reported steps and evaluations.
        total_steps: the run's steps, None where a script decides.
        progress: whether to show a bar or lines.
        stream: where to show them; stderr by default.
        plot: whether to draw loss.png at the end.
    """

    def __init__(
        self,
        folder: RunFolder | None,
        *,
        trackers: Sequence[Tracker] = (),
        total_steps: int | None,
        progress: bool = True,
        stream: TextIO | None = None,
        plot: bool = True,
    ) -> None:
        self._folder = folder
        self._trackers = list(trackers)
        self._plot = plot
        self._display: Bar | Lines | NoDisplay = NoDisplay()
        if folder is not None and progress:
            stream = sys.stderr if stream is None else stream
            self._display = (Bar if stream.isatty() else Lines)(stream, total_steps)

    def start(self, step: int, info: Mapping[str, Any]) -> None:
        """Report the start of the loop after `step` steps, with `info` in one line."""
        if self._folder is not None:
            _log.info("%s: from step %d, %s", self._folder.path, step, describe(info))
        self._display.start(step)

    def advance(self, step: int) -> None:
        """Move the display. Cheap, because it is called after every step."""
        self._display.advance(step)

    def step(self, values: Mapping[str, Any]) -> None:
        """Report the values of a step, `step` among them. Raises CheckpointError if they cannot be written."""
        if self._folder is None:
            return
        self._folder.append_metrics(values)
        self._folder.refresh_status(int(values["step"]))
        self._track(int(values["step"]), values)
        self._display.step(values)

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Report an evaluation. The keys of `values` are `eval/SET/NAME`."""
        if self._folder is None:
            return
        self._folder.append_metrics({"step": step, **values})
        self._track(step, values)
        self._display.say(f"step {step}  " + "  ".join(f"{key} {value:.4f}" for key, value in values.items()))

    def checkpoint(self, step: int, path: object) -> None:
        """Report a complete checkpoint."""
        if self._folder is None:
            return
        self._folder.append_ledger("checkpoint", step=step, path=str(path))
        self._display.say(f"step {step}  saved {path}")

    def incident(self, kind: str, **fields: Any) -> None:
        """Report something that went wrong and did not end the run, in the ledger and as a warning."""
        if self._folder is None:
            return
        self._folder.append_ledger("incident", kind=kind, **fields)
        if isinstance(self._display, Bar):
            self._display.say(f"[report] warning: {kind}: {describe(fields)}")  # a logged line would break the bar
        else:
            _log.warning("%s: %s", kind, describe(fields))

    def finish(self, state: str, step: int, exit_code: int, reason: str | None) -> None:
        """Close everything, then write status, ledger and plot of a run that ended in order."""
        self.close()
        self._display = NoDisplay()
        if self._folder is None:
            return
        self._folder.write_status(state, step, exit_code, reason)
        self._folder.append_ledger(state, step=step, exit_code=exit_code, reason=reason)
        if self._plot:
            self._survive("plot", self._draw)
        _log.info("%s: %s at step %d%s", self._folder.path, state, step, f", {reason}" if reason else "")

    def close(self) -> None:
        """Stop the bar and close the trackers. Idempotent."""
        self._display.close()
        trackers, self._trackers = self._trackers, []
        for tracker in trackers:
            self._survive("tracker", tracker.close, tracker=_name(tracker))

    # ------------------------------------------------------------------ within

    def _track(self, step: int, values: Mapping[str, Any]) -> None:
        if not self._trackers:
            return
        numbers = {
            key: float(value)
            for key, value in values.items()
            if key != "step" and isinstance(value, int | float) and not isinstance(value, bool)
        }
        self._trackers = [
            tracker
            for tracker in self._trackers
            if self._survive("tracker", partial(tracker.log, step, dict(numbers)), tracker=_name(tracker), step=step)
        ]

    def _draw(self) -> None:
        assert self._folder is not None, "a silent rank has no plot"
        from disttrain.report.plot import plot_loss  # matplotlib takes half a second and is needed at the end only

        plot_loss(self._folder.read_metrics(), self._folder.loss_png)

    def _survive(self, kind: str, act: Callable[[], None], **fields: Any) -> bool:
        """Call `act` and return whether it succeeded. A failure becomes an incident, and the run continues."""
        try:
            act()
        except Exception as error:  # noqa: BLE001 - other people's code, which training does not need
            details = fields | {"error": f"{type(error).__name__}: {error}"}
            try:
                self.incident(kind, **details)
            except CheckpointError as unwritable:
                _log.warning("%s: %s; the ledger cannot be written either: %s", kind, describe(details), unwritable)
            return False
        return True


def _name(tracker: Tracker) -> str:
    return f"{type(tracker).__module__}:{type(tracker).__qualname__}"
