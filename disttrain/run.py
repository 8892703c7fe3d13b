"""`python -m disttrain.run CONFIG [section.key=value ...]`, under torchrun, srun, accelerate launch, or alone.

Turns errors into exit codes and one message: the first cause, on the rank that had it. The others end within seconds
and say whose fault it was.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from disttrain.errors import FINISHED, INTERRUPTED, ConfigError, DisttrainError
from disttrain.logs import room_logger, start_logs
from disttrain.runtime.environment import read_launch

USAGE = "usage: python -m disttrain.run CONFIG [section.key=value ...]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, and return the exit code. Every process of the world calls it."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    rank = 0
    try:
        launch = read_launch()
        rank = launch.rank
        start_logs(rank=rank)
        if not given or given[0] in ("-h", "--help"):
            print(USAGE + "\n\n" + str(__doc__), file=sys.stdout if given else sys.stderr)
            return FINISHED if given else ConfigError.exit_code
        return _train(given[0], given[1:])
    except DisttrainError as error:
        # What every rank finds alike is said once, by rank 0; what one rank alone finds, by that rank.
        if rank == 0 or getattr(error, "only_here", False):
            print(f"error (exit {error.exit_code}): {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped at once; the last checkpoint stands", file=sys.stderr, flush=True)
        return INTERRUPTED
    except Exception as error:  # the entry point: user code may raise anything
        if not getattr(error, "told", False):
            traceback.print_exc()
        return int(getattr(error, "exit_code", 1))


def _train(config: str, overrides: Sequence[str]) -> int:
    from disttrain.engine.loop import train

    run = train(config, overrides)
    room_logger("run").info("%s at step %d; %s", run.state, run.step, run.folder)
    return INTERRUPTED if run.state == "preempted" else FINISHED


if __name__ == "__main__":
    sys.exit(main())
