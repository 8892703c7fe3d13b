"""Kills each rank of a save at each of its operations. Runs as a script, so that ranks are forks of a small process.

`python killed_ranks.py FOLDER SIZE` leaves one folder `VICTIM-OPERATION` per trial and prints a JSON list of trials:
victim, number of the operation before which it was killed, and that operation (null if it had no more).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from checkpoint_world import LAYOUTS

from disttrain.checkpoint import Disk, prune, save_checkpoint
from disttrain.checkpoint.storage import durable_files

LOST = 3
"""The exit code of a rank whose peer went away."""


def state_of(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model/m/w": torch.randn(61, 41, generator=generator),
        "model/m/b": torch.randn(3, generator=generator),
        "optim/m/w:exp_avg": torch.randn(61, 41, generator=generator),
        "optim/m/w:step": torch.tensor(float(step)),
    }


class PipeRanks:
    """Ranks as processes.

    Rank 0 has a pipe to each other rank. A peer's death is an EOFError, like a lost connection.
    """

    def __init__(self, rank: int, size: int, links: list[Connection]) -> None:
        self.rank, self.size, self._links = rank, size, links

    def gather(self, value: Any, /) -> list[Any] | None:
        if self.rank:
            self._links[0].send(value)
            return None
        return [value, *(link.recv() for link in self._links)]

    def broadcast(self, value: Any, /) -> Any:
        if self.rank:
            return self._links[0].recv()
        for link in self._links:
            link.send(value)
        return value

    def barrier(self) -> None:
        self.broadcast(self.gather(None))


def save(root: Path, step: int, ranks: PipeRanks, disk: Disk) -> None:
    """Save as a run does, then remove older checkpoints."""
    shards = LAYOUTS["rows"](state_of(step), ranks.rank, ranks.size)
    save_checkpoint(root, step, shards, {"step": step}, ranks, disk=disk, chunk_bytes=4096)
    if ranks.rank == 0:
        prune(root, 1, disk=disk)


def fork_rank(rank: int, size: int, pipes: list[tuple[Connection, Connection]], root: Path, step: int, at: int) -> int:
    """Start one rank. It dies before its operation number `at`, unless that is negative. Returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        links = [near for near, _ in pipes] if rank == 0 else [pipes[rank - 1][1]]
        for one in [end for pair in pipes for end in pair if end not in links]:
            one.close()
        seen = 0

        def before(operation: str, path: Path) -> None:
            nonlocal seen
            if seen == at:
                (root.parent / "killed-before").write_text(operation)
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

        try:
            save(root, step, PipeRanks(rank, size, links), Disk(before))
            code = 0
        except (EOFError, BrokenPipeError, ConnectionResetError):
            code = LOST
    finally:
        os._exit(code)


def save_with(root: Path, size: int, step: int, victim: int = -1, at: int = -1) -> list[int]:
    """A save by `size` ranks. Returns how each ended, as reported by `os.waitpid`."""
    pipes = [Pipe() for _ in range(size - 1)]
    pids = [fork_rank(rank, size, pipes, root, step, at if rank == victim else -1) for rank in range(size)]
    for end in [end for pair in pipes for end in pair]:
        end.close()
    return [os.waitpid(pid, 0)[1] for pid in pids]


def main(folder: Path, size: int) -> None:
    durable_files._PIECE = 4096  # so that these files bypass the page cache as large ones do, and the manifest does not
    trials = []
    for victim in range(size):
        at = 0
        while True:
            place = folder / f"{victim}-{at}"
            place.mkdir()
            assert save_with(place / "checkpoints", size, 100) == [0] * size
            ends = save_with(place / "checkpoints", size, 200, victim, at)
            note = place / "killed-before"
            killed = note.read_text() if note.exists() else None
            assert os.WIFSIGNALED(ends[victim]) == (killed is not None), ends
            others = {os.waitstatus_to_exitcode(end) for rank, end in enumerate(ends) if rank != victim}
            assert others <= {0, LOST}, ends
            trials.append((victim, at, killed))
            if killed is None:
                break
            at += 1
    print(json.dumps(trials))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
