"""Fingerprints the frozen parameters that a checkpoint with trainable parameters alone leaves out.

Loading compares the fingerprints, so that trained parameters are never combined with other frozen parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from disttrain.checkpoint import Box, Checkpoint, Shard, combine_fingerprints, fingerprint
from disttrain.errors import CheckpointError, explain
from disttrain.runtime import Group
from disttrain.torch_internals import version_of


def left_out_tensors(checkpoint: Checkpoint) -> Mapping[str, str]:
    """Return the hexadecimal fingerprint of each tensor that a checkpoint left out; empty for a complete one. Pure."""
    found: Mapping[str, str] = checkpoint.document.get("base", {})
    return found


def reject_other_frozen_parameters(
    checkpoint: Checkpoint, left_out: Mapping[str, str], found: Mapping[str, str]
) -> None:
    """Raise CheckpointError where `found` differs from the frozen parameters that the checkpoint left out. Pure."""
    differing = sorted(name for name, stored in left_out.items() if found.get(name) != stored)
    if differing:
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise CheckpointError(
            explain(
                f"{checkpoint.path} holds trainable parameters alone and needs the frozen parameters it was trained "
                "with.",
                f"other values or none in {', '.join(differing[:5])}{more}",
                "start from the weights it was trained on (model.weights), with the same parameters frozen",
            )
        )


def to_hexadecimal(number: int) -> str:
    """Return a fingerprint as a checkpoint stores it. Pure."""
    return f"{number:016x}"


class FrozenFingerprints:
    """Fingerprints of frozen parameters, computed again only where torch has seen a parameter change."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, Box], tuple[int | None, int]] = {}

    def compute(self, shards: Sequence[Shard], group: Group) -> dict[str, str]:
        """Return each tensor's fingerprint in hexadecimal, equal for any sharding. Collective."""
        mine: dict[str, int] = {}
        for shard in shards:
            if shard.replica[0] == 0 and shard.box.numel:
                mine[shard.name] = combine_fingerprints((mine.get(shard.name, 0), self._of_shard(shard)))
        found: dict[str, list[int]] = {}
        for part in group.gather_all(mine):
            for name, number in part.items():
                found.setdefault(name, []).append(number)
        return {name: to_hexadecimal(combine_fingerprints(numbers)) for name, numbers in sorted(found.items())}

    def _of_shard(self, shard: Shard) -> int:
        key, version = (shard.name, shard.box), version_of(shard.tensor)
        known = self._known.get(key)
        if known is None or version is None or known[0] != version:
            known = self._known[key] = version, fingerprint(shard)
        return known[1]
