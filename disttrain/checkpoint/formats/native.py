"""disttrain's own checkpoints as weights, wherever they lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from disttrain.checkpoint.form.shards import Shard
from disttrain.checkpoint.formats.weights import WantedBox, WeightInfo
from disttrain.checkpoint.read.reader import Checkpoint
from disttrain.errors import CheckpointError, explain


class NativeWeights:
    """The weights `model/OWNER/...` of a checkpoint; every chunk read is held against its checksum."""

    def __init__(self, checkpoint: Checkpoint, owner: str) -> None:
        self.checkpoint, self.path = checkpoint, checkpoint.path
        self._prefix = f"model/{owner}/"
        self.tensors: Mapping[str, WeightInfo] = {
            name.removeprefix(self._prefix): WeightInfo(info.shape, info.dtype)
            for name, info in checkpoint.tensors.items()
            if name.startswith(self._prefix)
        }
        if not self.tensors:
            owners = sorted({name.split("/")[1] for name in checkpoint.tensors if name.startswith("model/")})
            found = f"models prepared as {', '.join(owners)}" if owners else "no model"
            raise CheckpointError(
                explain(f"The model {owner!r} of {checkpoint.path} is to be loaded.", found, "name one of them")
            )

    def fill(self, wanted: Sequence[WantedBox]) -> None:
        """Two passes: nothing is written before every chunk needed was read and checked."""
        self.checkpoint.load_into(self._shards(wanted), strict=False)

    def check(self, wanted: Sequence[WantedBox]) -> None:
        """The first of them alone; DamagedError."""
        self.checkpoint.check(self._shards(wanted))

    def _shards(self, wanted: Sequence[WantedBox]) -> list[Shard]:
        return [Shard(self._prefix + w.name, self.tensors[w.name].shape, w.box, w.into) for w in wanted]

    def full_tensor(self, name: str) -> Tensor:
        """In memory of its own, as what is read is checked."""
        return self.checkpoint.read(self._prefix + name)
