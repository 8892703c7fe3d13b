"""Holds the training state of another library: weights and optimizer state as boxes in its mapped files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from disttrain.checkpoint.form.boxes import Box, overlap, tiling_fault
from disttrain.checkpoint.form.shards import Shard
from disttrain.checkpoint.formats.weights import WantedBox, WeightInfo, read_weight
from disttrain.errors import CheckpointError, explain


@dataclass(frozen=True)
class ForeignState:
    """A training state under the names of a disttrain checkpoint.

    `shards` tile each tensor and are views of mapped files. `ties` maps other names of weights to the name under which
    they are stored. `left_out` describes the content that is not converted.
    """

    path: Path
    kind: str
    shards: tuple[Shard, ...]
    steps: int = 0
    samples: int = 0
    ties: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def reject_incomplete(self) -> None:
        """Raise CheckpointError if the boxes of a tensor do not cover it."""
        boxes: dict[str, list[Box]] = defaultdict(list)
        for shard in self.shards:
            boxes[shard.name].append(shard.box)
        shapes = {shard.name: shard.shape for shard in self.shards}
        faults = [f"{name}: {fault}" for name, own in boxes.items() if (fault := tiling_fault(shapes[name], own))]
        if faults:
            fix = "a file is missing or belongs to another save: use a complete checkpoint"
            raise CheckpointError(explain(f"Cannot read {self.path} as {self.kind}.", "; ".join(faults[:5]), fix))


class ForeignWeights:
    """The weights in a `ForeignState`."""

    def __init__(self, state: ForeignState, owner: str) -> None:
        self.path = state.path
        self._parts: dict[str, list[Shard]] = defaultdict(list)
        for shard in state.shards:
            if shard.name.startswith(f"model/{owner}/"):
                self._parts[shard.name.removeprefix(f"model/{owner}/")].append(shard)
        self.tensors = {name: WeightInfo(own[0].shape, own[0].tensor.dtype) for name, own in self._parts.items()}

    def fill(self, wanted: Sequence[WantedBox]) -> None:
        """Copy the overlaps of stored and requested boxes from mapped memory."""
        with torch.no_grad():
            for one in wanted:
                for part in self._parts[one.name]:
                    shared = overlap(part.box, one.box)
                    if shared:
                        here, there = shared.slices(one.box.offsets), shared.slices(part.box.offsets)
                        one.into[here].copy_(part.tensor[there])

    def full_tensor(self, name: str) -> torch.Tensor:
        """Return a tensor, assembled from its boxes."""
        return read_weight(self, name)


def optimizer_shard(name: str, value: Any) -> Shard:
    """Return a 0-d shard of optimizer state. `step` is a float32, as in torch's optimizers."""
    dtype = torch.float32 if name.endswith(":step") else None
    tensor = value.detach() if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=dtype)
    return Shard(name, (), Box((), ()), tensor.reshape(()))
