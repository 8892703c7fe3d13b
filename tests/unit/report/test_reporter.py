"""The reporter: what it writes where, what people see, and that its decoration may fail."""

from __future__ import annotations

import errno
import io
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from disttrain.report import Reporter, RunFolder, TensorBoardTracker
from disttrain.report.display import Lines, amount, duration, measures

LINE = {"step": 120, "loss": 1.2341, "lr": 3e-3, "grad_norm": 0.8199, "tokens_per_s": 8123.0, "step_time_s": 42 / 180}


class Memory:
    """A tracker that records its calls and raises from call number `fail_at`."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at, self.calls, self.seen, self.closed = fail_at, 0, [], 0

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.calls += 1
        if self.fail_at is not None and step >= self.fail_at:
            raise RuntimeError("service is down")
        self.seen.append((step, dict(values)))

    def close(self) -> None:
        self.closed += 1


class Terminal(io.StringIO):
    """A terminal that can hang up. From then on the system answers every write with EIO."""

    hung_up = False

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.hung_up:
            raise OSError(errno.EIO, "Input/output error")
        return super().write(text)


def reporter_of(folder: RunFolder | None, **more: Any) -> tuple[Reporter, io.StringIO]:
    stream = more.pop("stream", io.StringIO())
    return Reporter(folder, **({"total_steps": 300, "plot": False} | more), stream=stream), stream


def test_the_plain_line_reads_as_documented(tmp_path: Path) -> None:
    reporter, stream = reporter_of(RunFolder(tmp_path))
    reporter.start(0, {})
    reporter.step(LINE)
    assert stream.getvalue() == "step 120/300  loss 1.234  lr 3.0e-03  grad 0.82  8.1k tokens/s  0:42 left\n"


def test_time_left_comes_from_the_steps_after_the_first() -> None:
    clock = iter([100.0, 130.0])
    lines = Lines(stream := io.StringIO(), 16, now=lambda: next(clock))
    lines.advance(1)  # the slow first step ended at 100
    lines.step({"step": 6, "step_time_s": 999.0})  # five steps in 30 s: ten more take 60 s
    assert stream.getvalue() == "step 6/16  1:00 left\n"


def test_a_run_without_an_end_shows_no_time_left() -> None:
    Lines(stream := io.StringIO(), None).step({"step": 6, "step_time_s": 1.0})
    assert stream.getvalue() == "step 6\n"


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "0.5"), (812, "812"), (999.9, "1.0k"), (8123, "8.1k"), (123456, "123k"), (1.2e6, "1.2M")]
)
def test_amounts(value: float, text: str) -> None:
    assert amount(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (42.4, "0:42"), (59.6, "1:00"), (725, "12:05"), (11525, "3:12:05")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("loss", "text"), [(0.0, "0.000"), (float("nan"), "nan"), (1.5e-7, "1.50e-07"), (12345.6, "12346"), (2.0, "2.000")]
)
def test_losses_of_any_size_stay_short(loss: float, text: str) -> None:
    assert measures({"loss": loss}) == [f"loss {text}"]


def test_metrics_trackers_and_ledger_get_their_parts(tmp_path: Path) -> None:
    folder, memory = RunFolder(tmp_path), Memory()
    reporter, _ = reporter_of(folder, trackers=[memory])
    reporter.start(0, {"strategy": "ddp"})
    reporter.step(LINE | {"strategy": "ddp", "mfu": None})
    reporter.evaluation(120, {"eval/held_out/loss": 1.5})
    reporter.checkpoint(120, tmp_path / "checkpoints" / "step-00000120")
    reporter.finish("finished", 120, 0, None)
    reporter.close()
    assert folder.read_metrics() == [LINE | {"strategy": "ddp", "mfu": None}, {"step": 120, "eval/held_out/loss": 1.5}]
    numbers = {key: value for key, value in LINE.items() if key != "step"}
    assert memory.seen == [(120, numbers), (120, {"eval/held_out/loss": 1.5})]
    assert memory.closed == 1
    assert [line["event"] for line in folder.read_ledger()] == ["checkpoint", "finished"]
    assert (folder.read_status() or {})["state"] == "finished"


def test_a_tracker_that_raises_is_reported_once_and_dropped(tmp_path: Path) -> None:
    folder, broken, whole = RunFolder(tmp_path), Memory(fail_at=2), Memory()
    reporter, _ = reporter_of(folder, trackers=[broken, whole])
    for step in (1, 2, 3, 4):
        reporter.step({"step": step, "loss": 1.0})
    reporter.finish("finished", 4, 0, None)
    assert (broken.calls, len(whole.seen)) == (2, 4)
    incidents = [line for line in folder.read_ledger() if line["event"] == "incident"]
    assert len(incidents) == 1
    assert "Memory" in incidents[0]["tracker"]
    assert incidents[0]["error"] == "RuntimeError: service is down"


def test_a_plot_that_fails_does_not_fail_the_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.loss_png.mkdir()  # a folder cannot be replaced by a file
    reporter, _ = reporter_of(folder, plot=True)
    reporter.step({"step": 1, "loss": 1.0})
    reporter.finish("finished", 1, 0, None)
    assert (folder.read_status() or {})["state"] == "finished"
    assert [line["kind"] for line in folder.read_ledger() if line["event"] == "incident"] == ["plot"]


def test_a_silent_rank_prints_and_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    reporter, stream = reporter_of(None)
    reporter.start(0, {})
    reporter.advance(1)
    reporter.step({"step": 1})
    reporter.evaluation(1, {})
    reporter.checkpoint(1, Path("x"))
    reporter.incident("x")
    reporter.finish("finished", 1, 0, None)
    reporter.close()
    assert (stream.getvalue(), *capfd.readouterr()) == ("", "", "")


def test_a_closed_stream_ends_the_display_only(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    reporter, stream = reporter_of(folder)
    stream.close()
    reporter.step(LINE)
    reporter.step(LINE)
    assert len(folder.read_metrics()) == 2


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    reporter, stream = reporter_of(RunFolder(tmp_path), stream=Terminal())
    reporter.start(100, {})
    for step in (101, 102):
        reporter.advance(step)
        reporter.step(LINE | {"step": step})
    reporter.evaluation(102, {"eval/a/loss": 1.25})
    reporter.close()
    assert "step 102/300" in stream.getvalue()
    assert "eval/a/loss 1.2500" in stream.getvalue()


def test_a_terminal_that_hangs_up_ends_the_display_only(tmp_path: Path) -> None:
    folder, before = RunFolder(tmp_path), (sys.stdout, sys.stderr)
    reporter, stream = reporter_of(folder, stream=Terminal())
    reporter.start(0, {})
    stream.hung_up = True
    time.sleep(0.25)  # the bar's thread reaches the end first: it redraws every 0.1 s
    reporter.advance(1)
    reporter.step(LINE)
    reporter.evaluation(120, {"eval/a/loss": 1.25})
    reporter.incident("tracker", error="gone")
    reporter.finish("finished", 120, 0, None)
    assert (folder.read_status() or {})["state"] == "finished"
    assert (sys.stdout, sys.stderr) == before


def test_output_that_a_script_redirects_to_a_file_goes_there_while_the_bar_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reporter, stream = reporter_of(RunFolder(tmp_path), stream=Terminal())
    reporter.start(0, {})
    print("a result")
    reporter.close()
    assert capsys.readouterr().out == "a result\n"
    assert "a result" not in stream.getvalue()


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoardTracker(run_folder=tmp_path)
    tracker.log(10, {"loss": 2.0, "eval/a/loss": 3.0})
    tracker.log(20, {"loss": 1.0})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars("train/loss")] == [(10, 2.0), (20, 1.0)]
    assert [one.value for one in events.Scalars("eval/a/loss")] == [3.0]
    assert json.dumps(sorted(events.Tags()["scalars"])) == '["eval/a/loss", "train/loss"]'
