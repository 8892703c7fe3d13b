"""Trains what a config describes, and turns errors into one message and an exit code.

    python -m disttrain.run CONFIG [section.key=value ...]

Start it with torchrun, srun, `accelerate launch`, or alone for one process. The rank that failed first prints the
cause. The other ranks end within seconds and name that rank. `disttrain.errors` lists the exit codes.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn

from disttrain.config import load_to_train
from disttrain.errors import FINISHED, INTERRUPTED, ConfigError, DisttrainError, LaunchError
from disttrain.launch.accelerate import settle_strategy
from disttrain.logs import package_logger, start_logs
from disttrain.runtime.environment import Launch, quiet_torch, read_launch
from disttrain.runtime.imports import fast_imports
from disttrain.runtime.leaving import leave

USAGE = "usage: python -m disttrain.run CONFIG [section.key=value ...]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, and return the exit code. Every process of the world must call it."""
    return attempt(sys.argv[1:] if arguments is None else arguments)[0]


def run_and_exit(arguments: Sequence[str]) -> NoReturn:
    """Train, and end this process with the exit code. Every process of the world must call it."""
    code, error = attempt(arguments)
    if code != FINISHED:
        leave(code)  # while `error` is held: releasing it releases the engine, which may wait for peers that never come
    del error
    sys.exit(code)


def attempt(given: Sequence[str]) -> tuple[int, BaseException | None]:
    """Train, and return the exit code with the error that was reported, if there was one."""
    launch: Launch | None = None
    try:
        launch = read_launch()
        start_logs(rank=launch.rank)
        if not given or given[0] in ("-h", "--help"):
            print(f"{USAGE}\n\n{__doc__}", file=sys.stdout if given else sys.stderr)
            return FINISHED if given else ConfigError.exit_code, None
        return _train(given[0], given[1:]), None
    except (Exception, KeyboardInterrupt, SystemExit) as error:  # noqa: BLE001 - user code may raise anything
        return _report(error, launch), error


def _report(error: BaseException, launch: Launch | None) -> int:
    """Print the first cause on the rank that had it, and one line on the others. Returns the exit code."""
    cause = getattr(error, "first_cause", None)
    if cause is not None and not cause.mine:
        if cause.rank >= 0 and launch is not None:
            print(f"rank {launch.rank} ends: rank {cause.rank} failed first", file=sys.stderr, flush=True)
        return int(cause.exit_code)
    if isinstance(error, KeyboardInterrupt):
        print("stopped at once; the last checkpoint remains", file=sys.stderr, flush=True)
        return INTERRUPTED
    if cause is not None and cause.replaced:
        print(f"error (exit {cause.exit_code}): {cause.text}", file=sys.stderr, flush=True)
        return int(cause.exit_code)
    if isinstance(error, DisttrainError):
        if cause is None and not isinstance(error, LaunchError):
            _wait_for_first_process(launch)
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
        print(f"error (exit {error.exit_code}): {error}{notes}", file=sys.stderr, flush=True)
        return error.exit_code
    if cause is None:
        _wait_for_first_process(launch)
    traceback.print_exception(error)
    sys.stderr.flush()
    return 1


def _wait_for_first_process(launch: Launch | None) -> None:
    """Let the first process of each node report an error that all ranks have alike, before the group exists.

    The other processes wait. If nobody ended them meanwhile, the error is theirs alone and they report it.
    """
    if launch is not None and launch.local_rank > 0:
        time.sleep(2.0)


def _train(config: str, overrides: Sequence[str]) -> int:
    loaded = settle_strategy(load_to_train(config, overrides))  # an invalid config is reported before torch is loaded
    quiet_torch()
    with fast_imports(keep=True):
        from disttrain.engine.loop import train

    run = train(loaded)
    package_logger("run").info("%s at step %d; %s", run.state, run.step, run.folder)
    return INTERRUPTED if run.state == "interrupted" else FINISHED


if __name__ == "__main__":
    run_and_exit(sys.argv[1:])
