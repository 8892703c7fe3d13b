"""Which whole parameters DeepSpeed's ZeRO 3 holds as a backward goes on: its prefetcher, played by the rules of
deepspeed/runtime/zero/partitioned_param_coordinator.py (0.19). Pure; counts elements. Enters: `memory_formula`.

At each module it gathers what the module lacks, then some of what the recorded order of uses has next: until that is a
bucket, or all is at the bound; the tensor that reaches it is still taken, and what is there already is passed over and
kept. Several tensors are gathered into one flat buffer, from which all are copied when the first is used, and which
lives until the last is; one tensor alone has its own buffer from the start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PERSISTENT = 10_000
"""Up to so many elements a parameter is whole always, by our strategy's setting."""


@dataclass
class _Gather:
    names: set[str]
    size: int
    flat: bool
    waited: bool = False


@dataclass(frozen=True)
class Whole:
    """Elements whole, or on their way, as a use begins; and those of the last two gathers that nobody waited for."""

    held: int
    on_their_way: int


def play(uses: Sequence[str], sizes: Mapping[str, int], *, bucket: int, bound: int) -> list[Whole]:
    """What is held at each of a step's `uses` of a parameter, in order."""
    own: set[str] = set()  # whole in memory of their own
    there: set[str] = set()  # whole, or on their way
    gathers: list[_Gather] = []
    until: dict[str, int] = {}  # the last use that the prefetcher has looked at
    found: list[Whole] = []
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
        found.append(Whole(sum(sizes[one] for one in own) + flats, sum(going[-2:])))
        if until[name] <= place and not small:
            own.discard(name)
            there.discard(name)
    return found
