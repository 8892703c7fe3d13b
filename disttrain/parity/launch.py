"""Worlds of real processes for tasks: torchrun for several, plain Python for one, a time limit for each task.

Tasks of one world size share its processes, which take seconds to start. Where a task ends them (a crash, a hang) the
rest is run by new ones: a task hides no other. Ends only processes that it started.
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
from dataclasses import dataclass, replace
from pathlib import Path

from disttrain.errors import explain
from disttrain.parity.recorded import RESULT, Recorded
from disttrain.parity.task import Job, Task

HANG = 7
_START_S = 120.0
"""What new processes may take to import torch and user code, on a busy machine, before the first task's time counts."""
_LEAVE_S = 5.0
_TAIL = 2000


@dataclass(frozen=True)
class Failed:
    """A task without a result; `exit_code` is `disttrain.run`'s for the same error, 7 past the time limit."""

    exit_code: int
    text: str


Outcome = Recorded | Failed


def run_tasks(
    job: Job,
    tasks: Sequence[Task],
    world_size: int,
    *,
    limit_s: float,
    tell: Callable[[Task], None] = lambda task: None,
) -> dict[str, Outcome]:
    """Every task's outcome by key. `tell` is called as each begins."""
    left = list(tasks)
    found: dict[str, Outcome] = {}
    while left:
        reached = _run_world(replace(job, tasks=tuple(left)), world_size, limit_s, tell)
        for task in left[:reached]:
            found[task.key] = _outcome(job.folder / task.key, job.folder)
        left = left[reached:]
    return found


def _run_world(job: Job, world_size: int, limit_s: float, tell: Callable[[Task], None]) -> int:
    """Start the processes and watch them; returns how many of the job's tasks they have dealt with, at least one."""
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
                tell(job.tasks[begun])
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
    """torchrun passes SIGTERM on to its workers; what does not listen is killed, workers by the ids they left."""
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
    text = explain(f"A case has {limit_s:g} s.", "no end of it", "give it more by --limit-s, or see where it hangs")
    told = {"exit_code": HANG, "mine": True, "text": text}
    (folder / "error-0.json").write_text(json.dumps(told), encoding="utf-8")


def _outcome(folder: Path, job: Path) -> Outcome:
    """What the task's processes left: errors count before a result, the first cause's before the others'."""
    errors: list[Mapping[str, object]] = []
    for path in sorted(folder.glob("error-*.json")):
        with contextlib.suppress(ValueError):  # a process that was killed while it wrote
            errors.append(json.loads(path.read_text(encoding="utf-8")))
    for told in sorted(errors, key=lambda one: not one["mine"]):
        return Failed(int(str(told["exit_code"])), str(told["text"]).strip())
    if (folder / RESULT).exists():
        return Recorded.read(folder)
    output = (job / "output.txt").read_text(encoding="utf-8", errors="replace").strip()
    return Failed(1, f"its processes ended without a word\n{output[-_TAIL:]}")
