"""Weights from any format: what is stored by name, boxes of it read on demand, and how names are brought together.

Owns the comparison of a model's names with those stored (missing, unexpected, misshapen) and the filters on it. One
format's reader is one `Weights`; nothing here knows a format. Local: no rank waits for another.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Protocol

import torch
from torch import Tensor

from disttrain.checkpoint.form.boxes import Box, full_box
from disttrain.checkpoint.form.shards import Shard
from disttrain.checkpoint.read.reader import Differences
from disttrain.checkpoint.storage.location import Location
from disttrain.errors import CheckpointError, explain

Rename = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class WeightInfo:
    """A stored weight's global shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class WantedBox:
    """`into`, of exactly `box.sizes`, is to be filled with that box of the stored weight `name`."""

    name: str
    box: Box
    into: Tensor


class Weights(Protocol):
    """One model's weights on disk, under the model's own names."""

    @property
    def path(self) -> Location: ...

    @property
    def tensors(self) -> Mapping[str, WeightInfo]:
        """What is stored, by name."""
        ...

    def fill(self, wanted: Sequence[WantedBox]) -> None:
        """Read these boxes and, where the format allows, nothing else; dtypes are converted. Local."""
        ...

    def full_tensor(self, name: str) -> Tensor:
        """A whole weight in its stored dtype; a view of the mapped file where the format allows. Local."""
        ...


_BATCH_BYTES = 32 * 2**20
"""What is read at once: a chunk of a checkpoint holds many small tensors, and is not to be read anew for each."""


def read_weight(weights: Weights, name: str) -> Tensor:
    """One whole weight, in memory of its own. Local."""
    return next(tensor for _, tensor in read_weights(weights, [name]))


def read_weights(weights: Weights, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Whole weights in turn, in memory of their own; small ones are read together. Local."""
    batch: list[str] = []
    room = _BATCH_BYTES
    for name in names:
        size = bytes_of(weights.tensors[name])
        if batch and size > room:
            yield from _read_batch(weights, batch)
            batch, room = [], _BATCH_BYTES
        batch.append(name)
        room -= size
    yield from _read_batch(weights, batch)


def _read_batch(weights: Weights, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    infos = [(name, weights.tensors[name]) for name in names]
    wanted = [WantedBox(name, full_box(info.shape), torch.empty(info.shape, dtype=info.dtype)) for name, info in infos]
    weights.fill(wanted)
    while wanted:
        one = wanted.pop(0)
        yield one.name, one.into


def bytes_of(info: WeightInfo) -> int:
    """What a weight takes, in bytes. Pure."""
    return torch.Size(info.shape).numel() * info.dtype.itemsize


def match_weights(
    weights: Weights,
    shards: Sequence[Shard],
    *,
    owner: str,
    aliases: Mapping[str, str] | None = None,
    strict: bool = True,
    only: Sequence[str] = (),
    rename: Rename | None = None,
    do: str = "use the model these weights are of",
) -> tuple[Differences, list[WantedBox]]:
    """What of the stored weights goes into which shards named `model/OWNER/NAME`, for `weights.fill`; reads no tensor.

    `rename` makes the model's name of a stored one. `only` are glob patterns of the model's names: others keep their
    values and are not spoken of. `aliases` are further names of tied weights, to the name that their shard has: such a
    name may be stored instead, or beside it. Local. Raises CheckpointError for what is misshapen and, where `strict`,
    missing or unexpected, with `do` as what to do; else returns what differs.
    """
    held: dict[str, list[Shard]] = defaultdict(list)
    for shard in shards:
        held[shard.name.removeprefix(f"model/{owner}/")].append(shard)
    aliases = aliases or {}
    _refuse_idle_patterns(only, held)
    stored = _by_models_name(weights, held, aliases, rename)
    chosen = {name for name in (*held, *stored) if not only or any(fnmatchcase(name, pattern) for pattern in only)}
    missing = sorted((chosen & set(held)) - set(stored))
    unexpected = sorted(stored[name] for name in chosen & set(stored) - set(held))
    fitting = sorted(chosen & set(stored) & set(held))
    misshapen = [text for name in fitting if (text := _misfit(name, weights.tensors[stored[name]], held[name][0]))]
    if misshapen or (strict and (missing or unexpected)):
        raise _misfits(weights.path, do, missing, unexpected, misshapen)
    wanted = [
        WantedBox(stored[name], shard.box, shard.tensor.detach())
        for name in fitting
        for shard in held[name]
        if shard.box.numel
    ]
    return Differences(tuple(missing), tuple(unexpected)), wanted


def _refuse_idle_patterns(only: Sequence[str], held: Mapping[str, object]) -> None:
    """A pattern that meets no name of the model is a slip of the pen: it would load nothing and say nothing."""
    for pattern in only:
        if not any(fnmatchcase(name, pattern) for name in held):
            near = get_close_matches(pattern, held, n=3, cutoff=0.3) or list(held)[:3]
            found = f"no weight of the model is named like {pattern!r}; there are {', '.join(near)}"
            raise CheckpointError(explain("Weights named by `only` are to be loaded.", found, "mend the pattern"))


def _by_models_name(
    weights: Weights, held: Mapping[str, object], aliases: Mapping[str, str], rename: Rename | None
) -> dict[str, str]:
    """The stored name of each of the model's names; of a tied weight stored under several, its first."""
    found: dict[str, str] = {}
    others: dict[str, str] = {}
    for stored in weights.tensors:
        name = rename(stored) if rename else stored
        places = others if name in aliases and name not in held else found
        if name in places:
            two = f"{places[name]} and {stored} both become {name}"
            raise CheckpointError(explain(f"{weights.path} is to be loaded under other names.", two, "mend `rename`"))
        places[name] = stored
    for name, stored in others.items():
        found.setdefault(aliases[name], stored)
    return found


def _misfit(name: str, info: WeightInfo, shard: Shard) -> str | None:
    if info.shape != shard.shape:
        return f"{name} is {info.shape} there, {shard.shape} here"
    mine = shard.tensor.dtype
    if info.dtype == mine or (info.dtype.is_floating_point and mine.is_floating_point):
        return None
    return f"{name} is {info.dtype} there, {mine} here"


def _misfits(path: Location, do: str, *differences: Sequence[str]) -> CheckpointError:
    found = [
        f"{title}: {', '.join(names[:10])}" + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        for title, names in zip(("missing", "unexpected", "misshapen"), differences, strict=True)
        if names
    ]
    return CheckpointError(explain(f"The weights in {path} do not fit the model.", "; ".join(found), do))
