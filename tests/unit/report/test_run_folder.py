"""A run's folder: written files read back; a kill or a full disk leaves readable files or a clear error."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disttrain.errors import CheckpointError
from disttrain.report import RunFolder


def test_metrics_are_strict_json_and_name_values_that_json_lacks(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.append_metrics(
        {"step": 1, "loss": math.inf, "lr": 0.1, "mfu": None, "t": torch.tensor(2.0), "n": np.float32(0.5)}
    )
    raw = json.loads(folder.metrics.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert raw == {"step": 1, "loss": None, "lr": 0.1, "mfu": None, "t": 2.0, "n": 0.5, "nonfinite": ["loss"]}
    read = folder.read_metrics()[0]
    assert math.isnan(read["loss"])
    assert read["mfu"] is None


def test_the_names_of_new_folders_are_flushed_before_their_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[int, bool]] = []
    flush = os.fsync

    def note(descriptor: int) -> None:
        flushed.append((os.fstat(descriptor).st_ino, (tmp_path / "a" / "b" / "run" / ".lock").exists()))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    folder = RunFolder(tmp_path / "a" / "b" / "run")
    folder.lock()
    folder.unlock()
    parents = [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    assert flushed == [(parent.stat().st_ino, False) for parent in parents]


@settings(max_examples=25, deadline=None)
@given(steps=st.lists(st.integers(0, 30), max_size=20), after=st.integers(0, 30), torn=st.booleans())
def test_trim_keeps_the_past_and_moves_the_rest(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], after: int, torn: bool
) -> None:
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    for step in steps:
        folder.append_metrics({"step": step})
    if torn:
        with folder.metrics.open("a") as file:
            file.write('{"step": 1, "lo')
    moved = folder.trim_metrics(after)
    later = [step for step in steps if step > after]
    assert moved == len(later) + torn
    assert [line["step"] for line in folder.read_metrics()] == [step for step in steps if step <= after]
    found = [line for path in folder.incidents.glob("*") for line in path.read_text().splitlines()]
    assert [json.loads(line)["step"] for line in found[: len(later)]] == later
    assert folder.trim_metrics(after) == 0


def test_a_second_trim_at_the_same_step_overwrites_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for _ in range(2):
        folder.append_metrics({"step": 9})
        folder.trim_metrics(5)
    names = sorted(path.name for path in folder.incidents.iterdir())
    assert names == ["metrics-after-step-5-1.jsonl", "metrics-after-step-5-2.jsonl"]


def test_a_line_after_a_torn_one_is_intact(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.write_text('{"step": 1}\n{"st')
    folder.append_metrics({"step": 2})
    assert [line["step"] for line in folder.read_metrics()] == [1, 2]


def test_status_is_replaced_atomically_and_leaves_no_other_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_status() is None
    folder.write_status("running", 0, None, None)
    folder.write_status("failed", 7, 6, "loss is nan")
    status = folder.read_status()
    assert status is not None
    assert {key: status[key] for key in ("state", "step", "exit_code", "reason")} == {
        "state": "failed",
        "step": 7,
        "exit_code": 6,
        "reason": "loss is nan",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_ledger_lines_say_when_and_what(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append_ledger("segment", step=0, launcher="torchrun")
    (line,) = folder.read_ledger()
    assert line.pop("time").endswith("+00:00")
    assert line == {"event": "segment", "step": 0, "launcher": "torchrun"}


def test_an_unwritable_file_is_named_with_the_systems_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = RunFolder(tmp_path / "file" / "run")
    for write in (
        lambda: folder.append_metrics({"step": 1}),
        lambda: folder.write_status("running", 0, None, None),
        lambda: folder.write_config("version: 1\n"),
    ):
        with pytest.raises(CheckpointError, match=r"(?s)file/run/.*(Not a directory|File exists)"):
            write()


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    folder = RunFolder(tmp_path)
    folder.ledger.symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"(?s)ledger\.jsonl.*No space left"):
        folder.append_ledger("segment")


def test_a_status_that_is_not_json_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"status\.json"):
        RunFolder(tmp_path).read_status()
