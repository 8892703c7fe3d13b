"""`python -m disttrain.run CONFIG [section.key=value ...]`, under torchrun, srun, accelerate launch, or alone.

Turns errors into exit codes and one message: the first cause, on the rank that had it. The others end within seconds
and say whose fault it was.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Sequence

from disttrain.config import load_to_train
from disttrain.errors import FINISHED, INTERRUPTED, ConfigError, DisttrainError, LaunchError
from disttrain.launch.accelerate import settle_strategy
from disttrain.logs import package_logger, start_logs
from disttrain.runtime.environment import Launch, quiet_torch, read_launch
from disttrain.runtime.leaving import leave

USAGE = "usage: python -m disttrain.run CONFIG [section.key=value ...]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, and return the exit code. Every process of the world calls it."""
    return attempt(sys.argv[1:] if arguments is None else arguments)[0]


def attempt(given: Sequence[str]) -> tuple[int, BaseException | None]:
    """Train; the exit code, and what went wrong and was told of."""
    launch: Launch | None = None
    try:
        launch = read_launch()
        start_logs(rank=launch.rank)
        if not given or given[0] in ("-h", "--help"):
            print(f"{USAGE}\n\n{__doc__}", file=sys.stdout if given else sys.stderr)
            return FINISHED if given else ConfigError.exit_code, None
        return _train(given[0], given[1:]), None
    except (Exception, KeyboardInterrupt, SystemExit) as error:  # noqa: BLE001 - user code may raise anything
        return _tell(error, launch), error


def _tell(error: BaseException, launch: Launch | None) -> int:
    """Print the first cause where it happened, one line elsewhere; returns the exit code."""
    cause = getattr(error, "first_cause", None)
    if cause is not None and not cause.mine:
        if cause.rank >= 0 and launch is not None:
            print(f"rank {launch.rank} ends: rank {cause.rank} failed first", file=sys.stderr, flush=True)
        return int(cause.exit_code)
    if isinstance(error, KeyboardInterrupt):
        print("stopped at once; the last checkpoint stands", file=sys.stderr, flush=True)
        return INTERRUPTED
    if cause is not None and cause.replaced:
        print(f"error (exit {cause.exit_code}): {cause.text}", file=sys.stderr, flush=True)
        return int(cause.exit_code)
    if isinstance(error, DisttrainError):
        if cause is not None or isinstance(error, LaunchError) or _speaks(launch):
            notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
            print(f"error (exit {error.exit_code}): {error}{notes}", file=sys.stderr, flush=True)
        return error.exit_code
    if cause is not None or _speaks(launch):
        traceback.print_exception(error)
        sys.stderr.flush()
    return 1


def _speaks(launch: Launch | None) -> bool:
    """Before the group exists most faults are found by all ranks alike: each node's first process says it.

    The others wait, and speak where nobody ended them meanwhile: then the fault is theirs alone.
    """
    if launch is not None and launch.local_rank > 0:
        time.sleep(2.0)
    return True


def _train(config: str, overrides: Sequence[str]) -> int:
    loaded = settle_strategy(load_to_train(config, overrides))  # a bad config is told before torch is loaded
    quiet_torch()
    from disttrain.engine.loop import train

    run = train(loaded)
    package_logger("run").info("%s at step %d; %s", run.state, run.step, run.folder)
    return INTERRUPTED if run.state == "preempted" else FINISHED


if __name__ == "__main__":
    code, error = attempt(sys.argv[1:])
    if code != FINISHED:
        leave(code)  # while `error` is held: with it goes the engine, and that may wait for peers that never come
    sys.exit(code)
