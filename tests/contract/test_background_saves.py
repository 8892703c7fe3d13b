"""Saves in the background: of the right step, one at a time, and a failure stops all ranks at the next step."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.engine_runs import QUIET, STRATEGIES, to_numpy
from contract.test_user_models import user_module
from world import WorldError, run_world

import disttrain
from disttrain.checkpoint import Checkpoint, list_checkpoints
from disttrain.engine.checkpointing import snapshot
from disttrain.errors import CheckpointError, ConfigError, TrainingError

STEPS = 7
BACKGROUND = ["checkpoint.every=2", "checkpoint.background=true", "checkpoint.keep_last=9"]


def start(folder: Path, name: str, overrides: list[str]) -> disttrain.Engine:
    config = {"run": {"name": name, "dir": str(folder), "seed": 7, "steps": STEPS}}
    engine = disttrain.Engine(config, [*QUIET, *overrides])
    engine.prepare("model", user_module().Slope, lambda parameters: torch.optim.Adam(parameters, lr=0.05))
    return engine


def loop(engine: disttrain.Engine, after: Any = lambda engine: None) -> int:
    """Take the steps of a custom loop. Returns the number of steps."""
    batches = engine.batches(user_module().Augmented(20), global_batch=6, micro_batch=2)
    for micro_batches in batches:
        engine.accumulate("model", micro_batches, objective)
        engine.step()
        engine.log()
        after(engine)
        if engine.should_stop():
            break
    return engine.progress.steps


def objective(model: Any, batch: Any) -> Any:
    return (model(batch[0]) - batch[1]).square().sum(), len(batch[0])


def stored(path: Path) -> dict[str, Any]:
    checkpoint = Checkpoint.open(path)
    return {name: checkpoint.read(name).numpy() for name in checkpoint.tensors}


def ledger(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name / "ledger.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------- missing ranks


def killed_before_its_first_save(folder: Path) -> None:
    """Rank 1 is killed at the start of its first save. Rank 0 measures how long it waits."""
    with start(folder, "killed", [*BACKGROUND, "strategy.name=ddp", "run.timeout_s=100"]) as engine:
        if engine.rank == 1:
            engine._state.saver.begin = lambda taken: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        began = time.monotonic()
        try:
            loop(engine)
        finally:
            (folder / f"stayed-{engine.rank}").write_text(str(time.monotonic() - began))


def test_a_rank_that_is_killed_before_its_first_save_is_missed_at_once(tmp_path: Path) -> None:
    with pytest.raises(WorldError, match="no result from rank"):
        run_world(2, killed_before_its_first_save, tmp_path, timeout_s=150)
    assert float((tmp_path / "stayed-0").read_text()) < 50, "half of run.timeout_s"


# ---------------------------------------------------------------------- content of a save


def at_once_and_in_background(folder: Path, cases: dict[str, list[str]]) -> None:
    for name, overrides in cases.items():
        for kind, how in (("once", BACKGROUND[:1] + BACKGROUND[2:]), ("beside", BACKGROUND)):
            with start(folder, f"{name}-{kind}", [*how, *overrides]) as engine:
                loop(engine)


@pytest.mark.parametrize("size", [1, 2])
def test_writes_what_an_immediate_save_writes_under_every_strategy(size: int, tmp_path: Path) -> None:
    cases = {name: case for name, case in STRATEGIES.items() if (name != "none") == (size > 1)}
    run_world(size, at_once_and_in_background, tmp_path, cases)
    for name in cases:
        once, beside = (list_checkpoints(tmp_path / f"{name}-{kind}" / "checkpoints") for kind in ("once", "beside"))
        assert [path.name for path in once] == [path.name for path in beside]
        assert [int(path.name.removeprefix("step-")) for path in beside] == [2, 4, 6, STEPS]
        for first, second in zip(once, beside, strict=True):
            Checkpoint.open(second).verify()
            before, after = stored(first), stored(second)
            assert before.keys() == after.keys()
            for key, value in before.items():
                assert value.tobytes() == after[key].tobytes(), f"{name}: {key} of {first.name}"


def held_up(folder: Path) -> dict[str, Any]:
    """The writer waits for three more steps. Returns the weights at the save and the written weights."""
    write, go, steps = snapshot.save_checkpoint, threading.Event(), []

    def slow(*args: Any, **named: Any) -> Path:
        assert go.wait(60)
        steps.append(engine.progress.steps)
        return write(*args, **named)

    snapshot.save_checkpoint = slow
    weights: dict[int, Any] = {}

    def note(engine: disttrain.Engine) -> None:
        weights[engine.progress.steps] = to_numpy(engine.full_weights("model"))
        if engine.progress.steps == 5:
            assert not list_checkpoints(engine.folder / "checkpoints"), "step 2 is still being written"
            go.set()

    with start(folder, "held", ["checkpoint.every=4", *BACKGROUND[1:], "strategy.name=ddp"]) as engine:
        loop(engine, note)
    return {"weights": weights, "written at": steps}


def test_training_continues_during_a_save_of_the_requested_step(tmp_path: Path) -> None:
    found = run_world(2, held_up, tmp_path)[0]
    assert found["written at"][0] >= 5
    four, last = list_checkpoints(tmp_path / "held" / "checkpoints")
    for path, step in ((four, 4), (last, STEPS)):
        for name, value in found["weights"][step].items():
            assert stored(path)[f"model/model/{name}"].tobytes() == value.tobytes(), f"{name} of {path.name}"
    assert Checkpoint.open(four).document["progress"]["steps"] == 4
    assert Checkpoint.open(four).document["progress"]["positions"]["train"]["position"] == 6 + 6 + 6 + 2


def one_at_a_time(folder: Path) -> list[tuple[str, int]]:
    write, seen = snapshot.save_checkpoint, []

    def slow(root: Path, step: int, *args: Any, **named: Any) -> Path:
        seen.append(("begins", step))
        time.sleep(0.3)
        path = write(root, step, *args, **named)
        seen.append(("ends", step))
        return path

    snapshot.save_checkpoint = slow
    with start(folder, "slow", [*BACKGROUND, "strategy.name=ddp"]) as engine:
        loop(engine)
    return seen


def test_one_save_at_a_time_and_the_end_waits_for_the_last(tmp_path: Path) -> None:
    expected = [(act, step) for step in (2, 4, 6, 7) for act in ("begins", "ends")]
    assert run_world(2, one_at_a_time, tmp_path) == [expected, expected]
    assert [path.name[-1] for path in list_checkpoints(tmp_path / "slow" / "checkpoints")] == ["2", "4", "6", "7"]


# ---------------------------------------------------------------------- failures


def disk_fills(folder: Path, policy: str, failures: int, how: list[str]) -> Any:
    """Rank 1's disk fails that many times. Returns the error's class and where the loop stopped."""
    from disttrain.checkpoint.storage import durable_files

    write, left = durable_files.DiskFile.write, [failures]

    def full(self: Any, content: Any) -> None:
        if engine.rank == 1 and engine.progress.steps >= 4 and left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, content)

    durable_files.DiskFile.write = full
    try:
        with start(folder, policy, [*how, f"checkpoint.on_failure={policy}", "strategy.name=ddp"]) as engine:
            loop(engine, lambda engine: time.sleep(0.3))
    except CheckpointError as error:
        return "stopped", engine.progress.steps, "No space left" in str(error), "needs" in str(error)
    finally:
        durable_files.DiskFile.write = write
    return "finished", engine.progress.steps


@pytest.mark.parametrize("how", [BACKGROUND, [BACKGROUND[0], BACKGROUND[2]]], ids=["background", "at once"])
def test_a_save_that_fails_on_one_rank_stops_all(how: list[str], tmp_path: Path) -> None:
    first, second = run_world(2, disk_fills, tmp_path, "stop", 1, how)
    assert first == second
    assert first[0] == "stopped" and first[2:] == (True, True)
    assert first[1] in ((4, 5, 6) if how == BACKGROUND else (4,)), (
        "at the step after it failed, or when it is waited for"
    )
    assert [path.name for path in (tmp_path / "stop" / "checkpoints").iterdir()] == ["step-00000002"]
    status = json.loads((tmp_path / "stop" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 5) and "No space left" in status["reason"]


@pytest.mark.parametrize("how", [BACKGROUND, [BACKGROUND[0], BACKGROUND[2]]], ids=["background", "at once"])
def test_a_run_may_continue_without_the_save(how: list[str], tmp_path: Path) -> None:
    assert run_world(2, disk_fills, tmp_path, "go_on", 1, how) == [("finished", STEPS)] * 2
    assert [path.name[-1] for path in list_checkpoints(tmp_path / "go_on" / "checkpoints")] == ["2", "6", "7"]
    incidents = [entry for entry in ledger(tmp_path, "go_on") if entry["event"] == "incident"]
    assert [(one["kind"], one["step"]) for one in incidents] == [("checkpoint", 4)]
    assert "No space left" in incidents[0]["error"]


@pytest.mark.parametrize("how", [BACKGROUND, [BACKGROUND[0], BACKGROUND[2]]], ids=["background", "at once"])
def test_a_save_may_be_tried_again(how: list[str], tmp_path: Path) -> None:
    assert run_world(2, disk_fills, tmp_path, "retry", 2, how) == [("finished", STEPS)] * 2
    assert [path.name[-1] for path in list_checkpoints(tmp_path / "retry" / "checkpoints")] == ["2", "4", "6", "7"]


def nan_weights(folder: Path) -> Any:
    def spoil(engine: disttrain.Engine) -> None:
        if engine.progress.steps == 6:  # the last step: the next one would raise because its loss is not finite
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(float("nan"))

    try:
        how = [*BACKGROUND, "checkpoint.on_failure=go_on", "run.steps=6", "strategy.name=ddp"]
        with start(folder, "nan", how) as engine:
            model = engine._prepared["model"].model
            loop(engine, spoil)
    except TrainingError as error:
        return "nothing was saved" in str(error), engine.progress.steps
    return "finished"


def test_weights_that_are_not_finite_are_never_saved_whatever_the_policy(tmp_path: Path) -> None:
    first, second = run_world(2, nan_weights, tmp_path)
    assert first == second == (True, 6)
    assert sorted(path.name[-1] for path in (tmp_path / "nan" / "checkpoints").iterdir()) == ["2", "4"]


def save_by_hand(folder: Path) -> list[Any]:
    found = []

    def ask(engine: disttrain.Engine) -> None:
        if engine.progress.steps in (3, 5):
            path = engine.save()
            found.append(None if path is None else path.name[-1])
            found.append([one.name[-1] for one in list_checkpoints(engine.folder / "checkpoints")])
            found.append(engine.save())

    with start(folder, "hand", [*BACKGROUND, "strategy.name=fsdp"]) as engine:
        loop(engine, ask)
    return found


def test_a_manual_save_waits_for_the_one_under_way_and_is_durable_on_return(tmp_path: Path) -> None:
    expected = ["3", ["2", "3"], None, "5", ["2", "3", "4", "5"], None]
    assert run_world(2, save_by_hand, tmp_path) == [expected, expected]


def without_permission_for_priorities(folder: Path) -> str:
    import os

    def reject(*args: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    os.setpriority = reject
    with start(folder, "plain", [*BACKGROUND, "strategy.name=none"]) as engine:
        loop(engine)
        return engine.finish()


def test_a_thread_that_cannot_lower_its_priority_writes_too(tmp_path: Path) -> None:
    assert run_world(1, without_permission_for_priorities, tmp_path) == ["finished"]
    assert [path.name[-1] for path in list_checkpoints(tmp_path / "plain" / "checkpoints")] == ["2", "4", "6", "7"]


# ---------------------------------------------------------------------- consistency


def seen_batches(folder: Path, name: str, save_at: int | None, stop_at: int) -> list[list[float]]:
    """Returns the inputs of each step. Saves by hand after the step's batch was read, and between step and log."""
    seen = []
    with start(folder, name, ["strategy.name=none", "checkpoint.at_end=false"]) as engine:
        for micro_batches in engine.batches(user_module().Augmented(20), global_batch=6, micro_batch=2):
            if engine.progress.steps == save_at:
                engine.save()
            seen.append([float(micro.batch[0].sum()) for micro in micro_batches])
            engine.accumulate("model", micro_batches, objective)
            engine.step()
            with pytest.raises(ConfigError, match=r"without engine\.log"):
                engine.save()
            engine.log()
            if engine.progress.steps == stop_at or engine.should_stop():
                break
    return seen


def test_a_save_within_a_step_is_of_its_beginning_or_rejected(tmp_path: Path) -> None:
    (through,) = run_world(1, seen_batches, tmp_path, "through", None, STEPS)
    run_world(1, seen_batches, tmp_path, "parts", 3, 5)
    (after,) = run_world(1, seen_batches, tmp_path, "parts", None, STEPS)
    assert after == through[3:], "the batch that was taken before the save is taken again"
