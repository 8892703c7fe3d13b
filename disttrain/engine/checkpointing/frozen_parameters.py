"""The base of a checkpoint that holds trainable parameters alone: what the frozen ones are, by checksum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from disttrain.checkpoint import Box, Checkpoint, Shard, combine_fingerprints, fingerprint
from disttrain.errors import CheckpointError, explain
from disttrain.runtime import Group


def base_of(checkpoint: Checkpoint) -> Mapping[str, str]:
    """The tensors that a checkpoint left out, each with its fingerprint in hexadecimal; none in a whole one. Local."""
    found: Mapping[str, str] = checkpoint.document.get("base", {})
    return found


def refuse_other_base(checkpoint: Checkpoint, left_out: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raise CheckpointError where these are not the frozen parameters that the checkpoint left out. Local."""
    differing = sorted(name for name, stored in left_out.items() if found.get(name) != stored)
    if differing:
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise CheckpointError(
            explain(
                f"{checkpoint.path} holds the trainable parameters alone, for frozen ones of known checksums.",
                f"other values or none in {', '.join(differing[:5])}{more}",
                "start from the base that it was trained on (model.weights), with the same parameters frozen",
            )
        )


def hexadecimal(number: int) -> str:
    """A fingerprint as it is kept."""
    return f"{number:016x}"


class Base:
    """Fingerprints of frozen parameters, taken again only where torch has seen one change."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, Box], tuple[int, int]] = {}

    def fingerprints(self, shards: Sequence[Shard], group: Group) -> dict[str, str]:
        """Each tensor's, in hexadecimal, the same however it is cut. Collective."""
        mine: dict[str, int] = {}
        for shard in shards:
            if shard.replica[0] == 0 and shard.box.numel:
                mine[shard.name] = combine_fingerprints((mine.get(shard.name, 0), self._own(shard)))
        found: dict[str, list[int]] = {}
        for part in group.gather_all(mine):
            for name, number in part.items():
                found.setdefault(name, []).append(number)
        return {name: hexadecimal(combine_fingerprints(numbers)) for name, numbers in sorted(found.items())}

    def _own(self, shard: Shard) -> int:
        key, version = (shard.name, shard.box), shard.tensor._version
        known = self._known.get(key)
        if known is None or known[0] != version:
            known = self._known[key] = version, fingerprint(shard)
        return known[1]
