"""Defines the interface to weights in any format, and matches a model's names with the stored ones.

This module compares names (missing, unexpected, misshapen) and applies filters to them. Each format's reader implements
`Weights`. Nothing here depends on a format. All functions are local: no rank waits for another.
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
    """The global shape and dtype of a stored weight."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class WantedBox:
    """A request to fill `into`, whose shape is `box.sizes`, with a box of the stored weight `name`."""

    name: str
    box: Box
    into: Tensor


class Weights(Protocol):
    """The weights of one model on disk, under the model's names."""

    @property
    def path(self) -> Location: ...

    @property
    def tensors(self) -> Mapping[str, WeightInfo]:
        """The stored weights by name."""
        ...

    def fill(self, wanted: Sequence[WantedBox]) -> None:
        """Read these boxes, with conversion of dtypes. Reads nothing else if the format allows it. Local."""
        ...

    def full_tensor(self, name: str) -> Tensor:
        """Return a complete weight in its stored dtype, as a view of the mapped file if possible. Local."""
        ...


_BATCH_BYTES = 32 * 2**20
"""Bytes read at once. A chunk of a checkpoint contains many small tensors and must not be read again for each."""


def read_weight(weights: Weights, name: str) -> Tensor:
    """Return a complete weight in newly allocated memory. Local."""
    return next(tensor for _, tensor in read_weights(weights, [name]))


def read_weights(weights: Weights, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield complete weights in newly allocated memory. Small weights are read together. Local."""
    batch: list[str] = []
    remaining = _BATCH_BYTES
    for name in names:
        size = bytes_of(weights.tensors[name])
        if batch and size > remaining:
            yield from _read_batch(weights, batch)
            batch, remaining = [], _BATCH_BYTES
        batch.append(name)
        remaining -= size
    yield from _read_batch(weights, batch)


def _read_batch(weights: Weights, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    infos = [(name, weights.tensors[name]) for name in names]
    wanted = [WantedBox(name, full_box(info.shape), torch.empty(info.shape, dtype=info.dtype)) for name, info in infos]
    weights.fill(wanted)
    while wanted:
        one = wanted.pop(0)
        yield one.name, one.into


def bytes_of(info: WeightInfo) -> int:
    """Return the size of a weight in bytes. Pure."""
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
    fix: str = "use the model to which these weights belong",
) -> tuple[Differences, list[WantedBox]]:
    """Match stored weights with the shards named `model/OWNER/NAME`. Reads no tensor. Local.

    Returns the differences and the boxes to pass to `weights.fill`. `rename` maps a stored name to the model's name.
    `only` are glob patterns of the model's names: other weights keep their values and are ignored. `aliases` maps other
    names of tied weights to the name of their shard. Such a name may be stored instead of it or in addition to it.

    Raises CheckpointError for misshapen weights and, if `strict`, for missing or unexpected names. `fix` is the last
    line of the message.
    """
    held: dict[str, list[Shard]] = defaultdict(list)
    for shard in shards:
        held[shard.name.removeprefix(f"model/{owner}/")].append(shard)
    aliases = aliases or {}
    _reject_unused_patterns(only, held)
    stored = _by_model_name(weights, held, aliases, rename)
    chosen = {name for name in (*held, *stored) if not only or any(fnmatchcase(name, pattern) for pattern in only)}
    missing = sorted((chosen & set(held)) - set(stored))
    unexpected = sorted(stored[name] for name in chosen & set(stored) - set(held))
    fitting = sorted(chosen & set(stored) & set(held))
    misshapen = [text for name in fitting if (text := _misfit(name, weights.tensors[stored[name]], held[name][0]))]
    if misshapen or (strict and (missing or unexpected)):
        raise _misfits(weights.path, fix, missing, unexpected, misshapen)
    wanted = [
        WantedBox(stored[name], shard.box, shard.tensor.detach())
        for name in fitting
        for shard in held[name]
        if shard.box.numel
    ]
    return Differences(tuple(missing), tuple(unexpected)), wanted


def _reject_unused_patterns(only: Sequence[str], held: Mapping[str, object]) -> None:
    """Raise CheckpointError for a pattern that matches no name. It is a typing error and would load nothing."""
    for pattern in only:
        if not any(fnmatchcase(name, pattern) for name in held):
            near = get_close_matches(pattern, held, n=3, cutoff=0.3) or list(held)[:3]
            problem = f"no weight of the model matches {pattern!r}; there are {', '.join(near)}"
            raise CheckpointError(explain("Cannot load the weights selected by `only`.", problem, "fix the pattern"))


def _by_model_name(
    weights: Weights, held: Mapping[str, object], aliases: Mapping[str, str], rename: Rename | None
) -> dict[str, str]:
    """Return the stored name for each of the model's names, and the first one for a tied weight with several."""
    found: dict[str, str] = {}
    others: dict[str, str] = {}
    for stored in weights.tensors:
        name = rename(stored) if rename else stored
        target = others if name in aliases and name not in held else found
        if name in target:
            two = f"{target[name]} and {stored} both become {name}"
            raise CheckpointError(explain(f"Cannot load {weights.path} under other names.", two, "fix `rename`"))
        target[name] = stored
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


def _misfits(path: Location, fix: str, *differences: Sequence[str]) -> CheckpointError:
    found = [
        f"{title}: {', '.join(names[:10])}" + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        for title, names in zip(("missing", "unexpected", "misshapen"), differences, strict=True)
        if names
    ]
    return CheckpointError(explain(f"Cannot load the weights in {path} into the model.", "; ".join(found), fix))
