"""Reads the weights in a disttrain checkpoint, on a disk or in an object store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from disttrain.checkpoint.form.shards import Shard
from disttrain.checkpoint.formats.weights import WantedBox, WeightInfo
from disttrain.checkpoint.read.reader import Checkpoint
from disttrain.errors import CheckpointError, explain


class NativeWeights:
    """The weights `model/OWNER/...` of a checkpoint. Every chunk that is read is verified."""

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
            problem = f"its models were prepared as {', '.join(owners)}" if owners else "it contains no model"
            raise CheckpointError(
                explain(f"Cannot load the model {owner!r} of {checkpoint.path}.", problem, "name one of them")
            )

    def fill(self, wanted: Sequence[WantedBox]) -> None:
        """Fill the boxes in two passes. Nothing is written before every needed chunk is verified."""
        self.checkpoint.load_into(self._shards(wanted), strict=False)

    def check(self, wanted: Sequence[WantedBox]) -> None:
        """Run only the first pass. Raises DamagedError."""
        self.checkpoint.check(self._shards(wanted))

    def _shards(self, wanted: Sequence[WantedBox]) -> list[Shard]:
        return [Shard(self._prefix + w.name, self.tensors[w.name].shape, w.box, w.into) for w in wanted]

    def full_tensor(self, name: str) -> Tensor:
        """Return a tensor in newly allocated memory, because its bytes are verified as they are read."""
        return self.checkpoint.read(self._prefix + name)
