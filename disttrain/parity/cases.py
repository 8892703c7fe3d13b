"""What `parity` compares: the cases (strategy, world size, micro-batch) of one config, chosen or asked for. Pure.

Owns the short spelling of strategies (`deepspeed:3`) and the default set: every installed strategy at every world size,
and one micro-batch that does not divide the global batch. Refuses an own case that fits no world size.
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
class Case:
    """One run to compare. `overrides` come after the user's own; `micro_batch` and `global_batch` are in samples;
    `parts` is how many parts of the data its mesh has.

    `refused` tells why the config itself cannot be honoured: such a case is not run.
    """

    name: str
    overrides: tuple[str, ...]
    world_size: int
    micro_batch: int
    parts: int = 1
    refused: str | None = None

    @property
    def title(self) -> str:
        """The case in a few words."""
        return f"{self.name}, {self.world_size} process{'es' if self.world_size > 1 else ''}"


@dataclass(frozen=True)
class Asked:
    """What the command line asks for; nothing named means the default set."""

    strategies: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    world_sizes: tuple[int, ...] = (1, 2)
    micro_batches: tuple[int, ...] = ()


Load = Callable[[Sequence[str]], Config]
"""The user's config under further overrides. Raises ConfigError."""


def strategy_overrides(spelling: str) -> tuple[str, ...]:
    """`fsdp` or `deepspeed:3` as overrides. Raises ConfigError for a number that is no stage's."""
    name, _, stage = spelling.partition(":")
    if not stage:
        return (f"strategy.name={name}",)
    if name != "deepspeed":
        asked = f"--strategies {spelling} names a strategy."
        do = 'write the name alone; options of other strategies go into --case "strategy.name=NAME key=value"'
        raise ConfigError(explain(asked, f"a number after {name!r}, which has no stages", do))
    return ("strategy.name=deepspeed", f"strategy.deepspeed.stage={stage}")


def installed_strategies() -> tuple[str, ...]:
    """The spellings of what can run here in a world of several. Looks for packages, imports none."""
    deepspeed = ("deepspeed:1", "deepspeed:2", "deepspeed:3") if find_spec("deepspeed") else ()
    return ("ddp", "fsdp", *deepspeed, *sorted(point.name for point in entry_points(group=GROUP)))


def uneven_micro_batch(global_batch: int, micro_batch: int) -> int | None:
    """Another micro-batch, near two thirds of this one, that leaves a smaller last one where there is such; else None.

    Micro-batches of one size hide averages of averages. A last one of a single sample is avoided, which batch norm
    refuses; so is a micro-batch that takes more memory, by two samples at most.
    """
    others = [size for size in range(1, min(global_batch, micro_batch + 2) + 1) if size != micro_batch]
    uneven = [size for size in others if global_batch % size]

    def distance(size: int) -> tuple[bool, bool, int, int]:
        return global_batch % size == 1, size > micro_batch, abs(3 * size - 2 * micro_batch), size

    return min(uneven or others, key=distance, default=None)


def plan_cases(load: Load, asked: Asked, *, global_batch: int, micro_batch: int | None) -> list[Case]:
    """The cases, those of the smallest world first. `micro_batch` is the config's own, None where it is left out.

    Raises ConfigError for an own case that cannot be read or fits none of the world sizes.
    """
    own = load([])
    given = [(text, tuple(shlex.split(text)), True) for text in asked.cases]
    if asked.strategies or not asked.cases:
        named = asked.strategies or installed_strategies()
        given = [(name, strategy_overrides(name), bool(asked.strategies)) for name in named] + given
    found: list[Case] = []
    for size in sorted(set(asked.world_sizes)):
        for name, overrides, explicit in given:
            # In a world of one strategies have nothing to cut: the default set tries the config's own alone.
            if explicit or size > 1 or overrides[0] == f"strategy.name={own.strategy.name}":
                found += _sized(load, name, overrides, size, global_batch, asked.micro_batches or (None,), explicit)
    for name, _, explicit in given:
        if explicit and not any(case.name == name for case in found):
            sizes = ", ".join(map(str, sorted(set(asked.world_sizes))))
            asked_for = f"The case {name!r} is to run in a world of {sizes} process(es)."
            raise ConfigError(explain(asked_for, "a mesh that fits none of them", "see mesh.*, or add --world-sizes"))
    if asked.strategies or asked.cases:
        return found
    alone = own.strategy.name != "none" and 1 in asked.world_sizes
    none = ("strategy.name=none",)
    first = _sized(load, "none", none, 1, global_batch, asked.micro_batches or (None,), False) if alone else []
    return [*first, *found, *_uneven(load, own, found, global_batch, micro_batch or global_batch, asked)]


def _uneven(
    load: Load, own: Config, found: Sequence[Case], global_batch: int, micro_batch: int, asked: Asked
) -> list[Case]:
    """In the largest world of several the config's own strategy, or the first, at an uneven micro-batch."""
    size, uneven = max(asked.world_sizes), uneven_micro_batch(global_batch, micro_batch)
    here = [case for case in found if case.world_size == size and not case.refused]
    if size == 1 or not here or uneven is None or asked.micro_batches:
        return []
    chosen = next((case for case in here if case.overrides[0] == f"strategy.name={own.strategy.name}"), here[0])
    return _sized(load, chosen.name, chosen.overrides, size, global_batch, (uneven,), False)


def _sized(
    load: Load,
    name: str,
    overrides: tuple[str, ...],
    world_size: int,
    global_batch: int,
    micro_batches: Sequence[int | None],
    explicit: bool,
) -> list[Case]:
    """One case for each micro-batch, none where the mesh does not fit the world."""
    found = []
    for micro_batch in micro_batches:
        given = overrides if micro_batch is None else (*overrides, f"data.micro_batch={micro_batch}")
        try:
            config = load(given)
        except ConfigError as error:
            if explicit:
                raise
            found.append(Case(name, given, world_size, micro_batch or 0, refused=str(error)))
            continue
        mesh = config.mesh
        try:
            parts = plan_mesh(world_size, replicate=mesh.replicate, shard=mesh.shard, tensor=mesh.tensor).data_parallel
        except ConfigError:
            continue
        size = config.data.micro_batch if config.data is not None and isinstance(config.data.micro_batch, int) else None
        found.append(Case(name, given, world_size, min(size or -(-global_batch // parts), global_batch), parts))
    return found
