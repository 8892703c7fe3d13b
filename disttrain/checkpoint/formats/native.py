"""disttrain's own checkpoints as weights, and which of a run's checkpoints a path means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from disttrain.checkpoint.folder import newest_whole
from disttrain.checkpoint.formats.weights import Wanted, WeightInfo
from disttrain.checkpoint.reader import Checkpoint
from disttrain.checkpoint.shards import Shard, SoleRank
from disttrain.errors import CheckpointError, explain


def open_newest(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`, or the newest whole one of the run whose folder `path` is. Local.

    Raises CheckpointError where there is none, with what was found.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(
            explain(f"{path} is to be loaded.", "no such folder", "name a run's folder or a checkpoint")
        )
    root = path / "checkpoints"
    if not root.is_dir():
        return Checkpoint.open(path)
    found, rejected = newest_whole(root, SoleRank())
    if found is None:
        reasons = "; ".join(f"{one.name}: {reason}" for one, reason in rejected) or "no committed checkpoint"
        raise CheckpointError(explain(f"{path} is to be loaded.", reasons, "train it first, or name another run"))
    return found


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

    def fill(self, wanted: Sequence[Wanted]) -> None:
        """Two passes: nothing is written before every chunk needed was read and checked."""
        shards = [Shard(self._prefix + w.name, self.tensors[w.name].shape, w.box, w.into) for w in wanted]
        self.checkpoint.load_into(shards, strict=False)

    def whole(self, name: str) -> Tensor:
        """In memory of its own, as what is read is checked."""
        return self.checkpoint.read(self._prefix + name)
