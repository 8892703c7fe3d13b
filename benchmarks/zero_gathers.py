"""Simulates which gathered parameters DeepSpeed's ZeRO 3 holds during a backward, for `memory_formula`.

Follows the prefetcher in deepspeed/runtime/zero/partitioned_param_coordinator.py (0.19). Pure; counts elements.

At each module the prefetcher gathers the parameters that the module lacks, then parameters ahead in the recorded order
of uses, until they fill a bucket or all gathered parameters reach the bound. The tensor that reaches the limit is still
gathered, and tensors that are already gathered are skipped and kept. Several tensors are gathered into one flat buffer.
All are copied out of it when the first is used, and the buffer lives until the last is used. A single tensor has its
own buffer from the start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PERSISTENT = 10_000
"""Parameters of up to this many elements always stay gathered, as our strategy configures it."""


@dataclass
class _Gather:
    names: set[str]
    size: int
    flat: bool
    waited: bool = False


@dataclass(frozen=True)
class Gathered:
    """Elements gathered or being gathered when a use begins, and those of the last two gathers still in flight."""

    held: int
    in_flight: int


def play(uses: Sequence[str], sizes: Mapping[str, int], *, bucket: int, bound: int) -> list[Gathered]:
    """Returns what is held at each use of a parameter in a step, in the order of `uses`."""
    own: set[str] = set()  # gathered, in their own memory
    there: set[str] = set()  # gathered, or being gathered
    gathers: list[_Gather] = []
    until: dict[str, int] = {}  # the last use that the prefetcher has considered
    found: list[Gathered] = []
    upcoming = 0

    def gather(names: list[str]) -> None:
        flat = len(names) > 1
        gathers.append(_Gather(set(names), sum(sizes[name] for name in names), flat))
        there.update(names)
        if not flat:
            own.update(names)

    for place, name in enumerate(uses):
        small = sizes[name] <= PERSISTENT
        if name not in there and not small:
            gather([name])
        for one in gathers:
            if name in one.names:
                if one.flat and not one.waited:
                    own.update(one.names)
                one.waited = True
                one.names.discard(name)
        gathers = [one for one in gathers if one.names]
        if upcoming <= place:
            until[name], upcoming = place, place + 1
        room = min(bucket, bound - sum(sizes[one] for one in there))
        ahead: list[str] = []
        while upcoming < len(uses) and sum(sizes[one] for one in ahead) < room:
            following = uses[upcoming]
            until[following] = upcoming
            if following not in there and following not in ahead and sizes[following] > PERSISTENT:
                ahead.append(following)
            upcoming += 1
        if ahead:
            gather(ahead)
        flats = sum(one.size for one in gathers if one.flat)
        going = [one.size for one in gathers if not one.waited]
        found.append(Gathered(sum(sizes[one] for one in own) + flats, sum(going[-2:])))
        if until[name] <= place and not small:
            own.discard(name)
            there.discard(name)
    return found
