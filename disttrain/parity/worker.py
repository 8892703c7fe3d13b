"""Runs a list of tasks in one process of a world: `python -m disttrain.parity.worker JOB`.

A task is the plain reference or a run of the public `Engine`. Rank 0 records. A task that fails leaves its error in a
file, and the world continues only if all its processes survived. `worlds` starts this process and limits its time.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from disttrain.config import Config, load_to_train
from disttrain.engine import build
from disttrain.engine.engine import Engine
from disttrain.errors import DisttrainError
from disttrain.logs import start_logs
from disttrain.parity.recorded import Recorder
from disttrain.parity.reference import NAME, build_plain, probe_plain, set_to_evaluation, train_plain
from disttrain.parity.worlds import APART, Job, Task
from disttrain.runtime import read_launch

_MEET_S = 20.0
"""How long a process waits for the others to finish a task. After that the world ends, and a new one is started."""


def run_tasks(job: Job, rank: int, size: int) -> int:
    """Runs every task. Returns 0, or 1 if new processes must run the remaining tasks. Collective."""
    for task in job.tasks:
        folder = job.folder / task.key
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"pid-{rank}").write_text(str(os.getpid()), encoding="utf-8")
        sound = True
        try:
            config = load_to_train(job.config, [*job.overrides, *task.overrides])
            recorder = Recorder(folder) if rank == 0 else None
            if task.reference:
                _run_reference(config, task, job.steps, folder)
            else:
                _run_engine(config, task, job, recorder)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - user code may raise anything
            _leave_error(folder, rank, error)
            sound = isinstance(error, DisttrainError)
        if not (_all_out(folder, rank, size) and sound):
            return 1
    return 0


def _run_reference(config: Config, task: Task, steps: int, folder: Path) -> None:
    plan = build.plan_run(config)
    world = build.start_world(plan)
    try:
        plain = build_plain(config, world)
        set_to_evaluation(plain.model, task.evaluated)
        recorder = Recorder(folder)
        found = train_plain(plain, recorder, steps=steps, micro_batch=task.micro_batch, gradients=task.gradients)
        facts = {"probe": probe_plain(plain, task.micro_batch)} if task.probe else {}
        recorder.finish(found["losses"], found["norms"], **facts)
    finally:
        world.group.close()


def _run_engine(config: Config, task: Task, job: Job, recorder: Recorder | None) -> None:
    """Trains with a custom loop. The loop stops early, so that the schedule keeps its length."""
    with Engine(config, [*APART, ("run.dir", str(job.folder / "runs")), ("run.name", task.key)]) as engine:
        set_to_evaluation(engine.prepare(NAME), task.evaluated)
        losses: list[float] = []
        norms: list[float | None] = []
        _record(engine, recorder, 0)
        for micro_batches in engine.batches():
            sums = engine.accumulate(NAME, micro_batches)
            outcome = engine.step(NAME)
            engine.log()
            losses.append(sums.loss)
            norms.append(outcome.grad_norm)
            _record(engine, recorder, len(losses))
            if len(losses) == job.steps or engine.finished():
                break
    if recorder is not None:
        recorder.finish(losses, norms)


def _record(engine: Engine, recorder: Recorder | None, step: int) -> None:
    weights = engine.full_weights(NAME)
    if recorder is not None:
        recorder.weights(step, weights)


def _leave_error(folder: Path, rank: int, error: BaseException) -> None:
    cause = getattr(error, "first_cause", None)
    told: dict[str, Any] = {
        "exit_code": getattr(error, "exit_code", 1),
        "mine": cause is None or cause.mine,
        "text": str(error) if isinstance(error, DisttrainError) else "".join(traceback.format_exception(error)),
    }
    (folder / f"error-{rank}.json").write_text(json.dumps(told), encoding="utf-8")


def _all_out(folder: Path, rank: int, size: int) -> bool:
    """Returns whether all processes finished this task. Uses files, because a collective would hang with them."""
    (folder / f"out-{rank}").touch()
    deadline = time.monotonic() + _MEET_S
    while not all((folder / f"out-{other}").exists() for other in range(size)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def main(arguments: Sequence[str]) -> int:
    """Reads the job file and runs it."""
    launch = read_launch()
    start_logs(rank=launch.rank)
    return run_tasks(Job.read(Path(arguments[0])), launch.rank, launch.world_size)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
