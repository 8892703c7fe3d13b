"""Where each rank's own generators stand, in a checkpoint: row r of each tensor is rank r's, and never another's.

What disttrain draws is keyed by (seed, step, place in the batch) and needs none of it. This is for what a script draws
besides: it goes on where it stood, on every rank that was there when it was saved.
"""

from __future__ import annotations

import torch

from disttrain.checkpoint import Box, Checkpoint, Shard
from disttrain.runtime.seeds import generator_states, set_generator_states

OWNER = "disttrain"
"""The owner of what the engine itself keeps under `user/`: no tracked object may have that name."""
_PREFIX = f"user/{OWNER}/random/"


def random_shards(rank: int, size: int, device: torch.device) -> list[Shard]:
    """This rank's row of each kind's tensor, of shape (ranks, length). Local."""
    return [
        Shard(f"{_PREFIX}{kind}", (size, len(state)), Box((rank, 0), (1, len(state))), state.unsqueeze(0))
        for kind, state in generator_states(device).items()
    ]


def restore_random(checkpoint: Checkpoint, rank: int, device: torch.device) -> None:
    """Put this rank's generators back; those of a rank that was not there stay as they are. Local."""
    states = {}
    for name, info in checkpoint.tensors.items():
        if name.startswith(_PREFIX) and rank < info.shape[0]:
            row = checkpoint.read(name, Box((rank, 0), (1, info.shape[1])))
            states[name.removeprefix(_PREFIX)] = row[0]
    set_generator_states(states, device)
