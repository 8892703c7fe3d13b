"""Saves and restores each rank's random generators: row r of each tensor is rank r's, and never another rank's.

disttrain draws its random numbers from keys (seed, step, index in the batch) and needs none of this. The states are for
the random numbers of a script: they continue after a resume, on every rank that existed when the checkpoint was saved.
"""

from __future__ import annotations

import torch

from disttrain.checkpoint import Box, Checkpoint, Shard
from disttrain.runtime.seeds import generator_states, set_generator_states

OWNER = "disttrain"
"""The owner of what the engine itself keeps under `user/`. No tracked object may have this name."""
_PREFIX = f"user/{OWNER}/random/"


def random_shards(rank: int, size: int, device: torch.device) -> list[Shard]:
    """Return this rank's row of each generator's tensor, of shape (ranks, length). Local."""
    return [
        Shard(f"{_PREFIX}{kind}", (size, len(state)), Box((rank, 0), (1, len(state))), state.unsqueeze(0))
        for kind, state in generator_states(device).items()
    ]


def restore_random(checkpoint: Checkpoint, rank: int, device: torch.device) -> None:
    """Restore this rank's generators. They stay as they are on a rank that the checkpoint does not know. Local."""
    states = {}
    for name, info in checkpoint.tensors.items():
        if name.startswith(_PREFIX) and rank < info.shape[0]:
            row = checkpoint.read(name, Box((rank, 0), (1, info.shape[1])))
            states[name.removeprefix(_PREFIX)] = row[0]
    set_generator_states(states, device)
