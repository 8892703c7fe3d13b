"""Plans which variants of a config `parity` compares: strategy, world size and micro-batch. Pure.

Defines the short spelling of strategies (`deepspeed:3`) and the default set: every installed strategy at every world
size, and one micro-batch that does not divide the global batch. Rejects a requested variant that fits no world size.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec

from disttrain.config import Config
from disttrain.config.strategy_options import GROUP
from disttrain.errors import ConfigError, explain
from disttrain.runtime import plan_mesh


@dataclass(frozen=True)
class Variant:
    """One run to compare. `overrides` follow the user's overrides, and `micro_batch` is in samples.

    `parts` is the number of data-parallel ranks of its mesh. `rejected` says why the config is invalid; such a variant
    is not run.
    """

    name: str
    overrides: tuple[str, ...]
    world_size: int
    micro_batch: int
    parts: int = 1
    rejected: str | None = None

    @property
    def title(self) -> str:
        """The variant in a few words."""
        return f"{self.name}, {self.world_size} process{'es' if self.world_size > 1 else ''}"


@dataclass(frozen=True)
class Asked:
    """The variants that the command line requests. Without any, the default set is planned."""

    strategies: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    world_sizes: tuple[int, ...] = (1, 2)
    micro_batches: tuple[int, ...] = ()


Load = Callable[[Sequence[str]], Config]
"""Loads the user's config under further overrides. Raises ConfigError."""


def strategy_overrides(spelling: str) -> tuple[str, ...]:
    """Translates `fsdp` or `deepspeed:3` into overrides. Raises ConfigError for a stage of another strategy."""
    name, _, stage = spelling.partition(":")
    if not stage:
        return (f"strategy.name={name}",)
    if name != "deepspeed":
        failed = f"Cannot read --strategies {spelling}."
        fix = 'write the name only, and give other options by --case "strategy.name=NAME key=value"'
        raise ConfigError(explain(failed, f"{name!r} has no stages", fix))
    return ("strategy.name=deepspeed", f"strategy.deepspeed.stage={stage}")


def installed_strategies() -> tuple[str, ...]:
    """Returns the spelling of each strategy that can run here on several ranks. Imports no strategy."""
    deepspeed = ("deepspeed:1", "deepspeed:2", "deepspeed:3") if find_spec("deepspeed") else ()
    return ("ddp", "fsdp", *deepspeed, *sorted(point.name for point in entry_points(group=GROUP)))


def uneven_micro_batch(global_batch: int, micro_batch: int) -> int | None:
    """Returns another micro-batch size, near two thirds of this one, or None if there is none.

    Micro-batches of equal size hide averages of averages, so a size with a smaller last micro-batch is preferred. A
    last micro-batch of one sample is avoided, because batch norm rejects it. The size grows by two samples at most.
    """
    others = [size for size in range(1, min(global_batch, micro_batch + 2) + 1) if size != micro_batch]
    uneven = [size for size in others if global_batch % size]

    def distance(size: int) -> tuple[bool, bool, int, int]:
        return global_batch % size == 1, size > micro_batch, abs(3 * size - 2 * micro_batch), size

    return min(uneven or others, key=distance, default=None)


def plan_variants(load: Load, asked: Asked, *, global_batch: int, micro_batch: int | None) -> list[Variant]:
    """Returns the variants, smallest world first. `micro_batch` is the config's value, or None if it has none.

    Raises ConfigError for a requested variant that cannot be read or fits none of the world sizes.
    """
    own = load([])
    given = [(text, tuple(shlex.split(text)), True) for text in asked.cases]
    if asked.strategies or not asked.cases:
        named = asked.strategies or installed_strategies()
        given = [(name, strategy_overrides(name), bool(asked.strategies)) for name in named] + given
    found: list[Variant] = []
    for size in sorted(set(asked.world_sizes)):
        for name, overrides, explicit in given:
            # On one rank strategies have nothing to shard, so the default set tries the config's strategy only.
            if explicit or size > 1 or overrides[0] == f"strategy.name={own.strategy.name}":
                found += _sized(load, name, overrides, size, global_batch, asked.micro_batches or (None,), explicit)
    for name, _, explicit in given:
        if explicit and not any(variant.name == name for variant in found):
            sizes = ", ".join(map(str, sorted(set(asked.world_sizes))))
            failed = f"Cannot run the case {name!r} on {sizes} process(es)."
            problem = "its mesh fits none of these world sizes"
            raise ConfigError(explain(failed, problem, "change mesh.*, or add a size to --world-sizes"))
    if asked.strategies or asked.cases:
        return found
    alone = own.strategy.name != "none" and 1 in asked.world_sizes
    none = ("strategy.name=none",)
    first = _sized(load, "none", none, 1, global_batch, asked.micro_batches or (None,), False) if alone else []
    return [*first, *found, *_uneven(load, own, found, global_batch, micro_batch or global_batch, asked)]


def _uneven(
    load: Load, own: Config, found: Sequence[Variant], global_batch: int, micro_batch: int, asked: Asked
) -> list[Variant]:
    """Plans the config's strategy, or the first one, at an uneven micro-batch in the largest world."""
    size, uneven = max(asked.world_sizes), uneven_micro_batch(global_batch, micro_batch)
    here = [variant for variant in found if variant.world_size == size and not variant.rejected]
    if size == 1 or not here or uneven is None or asked.micro_batches:
        return []
    chosen = next((one for one in here if one.overrides[0] == f"strategy.name={own.strategy.name}"), here[0])
    return _sized(load, chosen.name, chosen.overrides, size, global_batch, (uneven,), False)


def _sized(
    load: Load,
    name: str,
    overrides: tuple[str, ...],
    world_size: int,
    global_batch: int,
    micro_batches: Sequence[int | None],
    explicit: bool,
) -> list[Variant]:
    """Returns one variant for each micro-batch, or none if the mesh does not fit the world size."""
    found = []
    for micro_batch in micro_batches:
        given = overrides if micro_batch is None else (*overrides, f"data.micro_batch={micro_batch}")
        try:
            config = load(given)
        except ConfigError as error:
            if explicit:
                raise
            found.append(Variant(name, given, world_size, micro_batch or 0, rejected=str(error)))
            continue
        mesh = config.mesh
        try:
            parts = plan_mesh(world_size, replicate=mesh.replicate, shard=mesh.shard, tensor=mesh.tensor).data_parallel
        except ConfigError:
            continue
        size = config.data.micro_batch if config.data is not None and isinstance(config.data.micro_batch, int) else None
        found.append(Variant(name, given, world_size, min(size or -(-global_batch // parts), global_batch), parts))
    return found
