"""The base of a checkpoint that holds trainable parameters alone: what the frozen ones are, by checksum."""

from __future__ import annotations

from collections.abc import Sequence

from disttrain.checkpoint import Box, Shard, add_up, fingerprint
from disttrain.runtime import Group


class Base:
    """Fingerprints of frozen parameters, taken again only where torch has seen one change."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, Box], tuple[int, int]] = {}

    def fingerprints(self, shards: Sequence[Shard], group: Group) -> dict[str, str]:
        """Each tensor's, in hexadecimal, the same however it is cut. Collective."""
        mine: dict[str, int] = {}
        for shard in shards:
            if shard.replica[0] == 0 and shard.box.numel:
                mine[shard.name] = add_up((mine.get(shard.name, 0), self._own(shard)))
        found: dict[str, list[int]] = {}
        for part in group.gather_all(mine):
            for name, number in part.items():
                found.setdefault(name, []).append(number)
        return {name: f"{add_up(numbers):016x}" for name, numbers in sorted(found.items())}

    def _own(self, shard: Shard) -> int:
        key, version = (shard.name, shard.box), shard.tensor._version
        known = self._known.get(key)
        if known is None or known[0] != version:
            known = self._known[key] = version, fingerprint(shard)
        return known[1]
