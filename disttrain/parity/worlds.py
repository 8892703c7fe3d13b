"""Runs tasks in real processes: torchrun for several ranks, plain Python for one, with a time limit per task.

Tasks of one world size share their processes, which take seconds to start. If a task ends the processes (a crash, a
hang), new processes run the remaining tasks. Ends only processes that it started.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from disttrain.errors import explain
from disttrain.parity.recorded import RESULT, Recorded

APART: tuple[Any, ...] = (
    "checkpoint.resume=never",
    "checkpoint.every=null",
    "checkpoint.storage=null",
    "checkpoint.at_end=false",
    "report.every=1",
    "report.trackers=[]",
    "report.progress=false",
    "report.plot=false",
)
"""Overrides that keep a run separate from the user's runs and report the gradient norm of every step."""


@dataclass(frozen=True)
class Task:
    """One run. `key` names its folder.

    `reference` selects the plain loop at `micro_batch`. `evaluated` names the kinds of modules that stay in evaluation
    mode. `gradients` records gradients, and `probe` measures properties of the model; both need `reference`.
    """

    key: str
    overrides: tuple[str, ...] = ()
    micro_batch: int = 0
    reference: bool = False
    evaluated: tuple[str, ...] = ()
    gradients: bool = False
    probe: bool = False


@dataclass(frozen=True)
class Job:
    """Tasks over the user's config and overrides. Each task runs `steps` steps and records them below `folder`."""

    config: str
    overrides: tuple[str, ...]
    folder: Path
    steps: int
    tasks: tuple[Task, ...] = field(default=())

    def write(self, path: Path) -> None:
        """Writes the job as JSON."""
        path.write_text(json.dumps({**asdict(self), "folder": str(self.folder)}), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Job:
        """Reads what `write` wrote."""
        found = json.loads(path.read_text(encoding="utf-8"))
        tasks = tuple(
            Task(**{**one, "overrides": tuple(one["overrides"]), "evaluated": tuple(one["evaluated"])})
            for one in found["tasks"]
        )
        return cls(found["config"], tuple(found["overrides"]), Path(found["folder"]), found["steps"], tasks)


HANG = 7
_START_S = 120.0
"""Time for new processes to import torch and user code on a busy machine, before the first task's time counts."""
_LEAVE_S = 5.0
_TAIL = 2000


@dataclass(frozen=True)
class Failed:
    """A task without a result. `exit_code` is that of `disttrain.run` for the same error, or 7 past the time limit."""

    exit_code: int
    text: str


Outcome = Recorded | Failed


def run_tasks(
    job: Job,
    tasks: Sequence[Task],
    world_size: int,
    *,
    limit_s: float,
    started: Callable[[Task], None] = lambda task: None,
) -> dict[str, Outcome]:
    """Runs the tasks and returns their outcomes by key. Calls `started` when a task begins."""
    left = list(tasks)
    found: dict[str, Outcome] = {}
    while left:
        reached = _run_world(replace(job, tasks=tuple(left)), world_size, limit_s, started)
        for task in left[:reached]:
            found[task.key] = _outcome(job.folder / task.key, job.folder)
        left = left[reached:]
    return found


def _run_world(job: Job, world_size: int, limit_s: float, started: Callable[[Task], None]) -> int:
    """Starts the processes and watches them. Returns how many of the job's tasks they dealt with, at least one."""
    file = job.folder / "job.json"
    job.write(file)
    agent = ("torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}", "-m")
    command = [sys.executable, "-m", *(agent if world_size > 1 else ()), f"{__package__}.worker", str(file)]
    with (job.folder / "output.txt").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    begun, since = 0, time.monotonic() + _START_S
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.1)
            while begun < len(job.tasks) and (job.folder / job.tasks[begun].key / "pid-0").exists():
                started(job.tasks[begun])
                begun, since = begun + 1, time.monotonic()
            if process.returncode is not None:
                return len(job.tasks) if process.returncode == 0 else max(1, begun)
            if time.monotonic() - since > limit_s:
                task = job.tasks[max(0, begun - 1)]
                _leave_limit(job.folder / task.key, limit_s)
                return max(1, begun)
    finally:
        _end(process, job, world_size)


def _end(process: subprocess.Popen[bytes], job: Job, world_size: int) -> None:
    """Ends the processes. torchrun forwards SIGTERM to its workers; workers that ignore it are killed by their ids."""
    if process.poll() is not None:
        return
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=_LEAVE_S)
        return
    for task in job.tasks:
        for rank in range(world_size):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
                os.kill(int((job.folder / task.key / f"pid-{rank}").read_text(encoding="utf-8")), signal.SIGKILL)
    process.kill()
    process.wait()


def _leave_limit(folder: Path, limit_s: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = explain(
        "Cannot compare the case.",
        f"it did not finish within {limit_s:g} s",
        "raise the limit with --limit-s, or find out where it hangs",
    )
    told = {"exit_code": HANG, "mine": True, "text": text}
    (folder / "error-0.json").write_text(json.dumps(told), encoding="utf-8")


def _outcome(folder: Path, job: Path) -> Outcome:
    """Reads what the task's processes left. Errors precede a result, and the first cause precedes the others."""
    errors: list[Mapping[str, object]] = []
    for path in sorted(folder.glob("error-*.json")):
        with contextlib.suppress(ValueError):  # a process that was killed while it wrote
            errors.append(json.loads(path.read_text(encoding="utf-8")))
    for told in sorted(errors, key=lambda one: not one["mine"]):
        return Failed(int(str(told["exit_code"])), str(told["text"]).strip())
    if (folder / RESULT).exists():
        return Recorded.read(folder)
    output = (job / "output.txt").read_text(encoding="utf-8", errors="replace").strip()
    return Failed(1, f"its processes ended without an error message\n{output[-_TAIL:]}")
