"""Defines the options of each strategy, and names the class that implements it. Imports no torch.

A plug-in's entry point `disttrain.strategies` names a `StrategyEntry`, in a module that imports no torch either.
`disttrain check` therefore needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator

from disttrain.config.problems import UnknownNameError, suggest
from disttrain.config.section import Section

GROUP = "disttrain.strategies"
TRANSLATED = "accelerate"
"""The name that stands for the strategy which `accelerate launch` asks for."""


class StrategyOptions(Section):
    """Base class of options: frozen, without unknown keys."""


class NoneOptions(StrategyOptions):
    """A single process has no options."""


class DDPOptions(StrategyOptions):
    """`bucket_mb` is the size of a reduction. `find_unused` allows parameters that a step does not reach."""

    bucket_mb: float = Field(25.0, gt=0)
    find_unused: bool = True


class TensorOptions(StrategyOptions):
    """How `mesh.tensor` shards layers. `plan` maps patterns of module names to styles; null uses the model's `tp_plan`.
    `sequence` also shards the activations between them along the sequence. `loss` keeps the output of the head sharded
    over the vocabulary."""

    plan: dict[str, str] | None = None
    sequence: bool = False
    loss: bool = False


class FSDPOptions(StrategyOptions):
    """`reshard` frees gathered parameters after the forward; a number reshards them to groups of so many ranks.
    `blocks` lists classes or module patterns to shard one by one. `reduce` says when an accumulation reduces gradients
    over ranks: at the `last` micro-batch, until which complete gradients stay in memory, at `every` one, or `auto`.
    `prefetch_forward` and `prefetch_backward` are how many blocks are gathered ahead; 0 is torch's order. `offload`
    keeps shards and optimizer state in host memory."""

    reshard: bool | int = True
    blocks: tuple[str, ...] | None = None
    reduce: Literal["auto", "every", "last"] = "auto"
    prefetch_forward: int = Field(0, ge=0)
    prefetch_backward: int = Field(0, ge=0)
    offload: bool = False
    tensor: TensorOptions = TensorOptions()

    @field_validator("reshard")
    @classmethod
    def _group(cls, value: Any) -> Any:
        if not isinstance(value, bool) and value < 2:
            raise ValueError("not a group size; write true, false, or a number from 2 that divides mesh.shard")
        return value


class DeepSpeedOptions(StrategyOptions):
    """The ZeRO `stage` and the size of its communication buckets, `bucket_mb`, by default 25 or the size in `native`.
    `offload` is where optimizer state is kept, and `offload_parameters`, at stage 3, where parameters are. `native` is
    DeepSpeed's JSON, as a mapping or a file relative to this config, for settings that have no key here. It may not
    contradict this config."""

    stage: Literal[1, 2, 3] = 2
    bucket_mb: float | None = Field(None, gt=0)
    offload: Literal["none", "cpu", "nvme"] = "none"
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str | None = None
    native: str | dict[str, Any] | None = None

    @field_validator("stage", mode="before")
    @classmethod
    def _no_stage_zero(cls, value: Any) -> Any:
        if value == 0 and not isinstance(value, bool):
            raise ValueError("stage 0 partitions nothing; use strategy.name=ddp, or stage 1, 2 or 3")
        return value


@dataclass(frozen=True)
class StrategyEntry:
    """A strategy's name, its options class, and `package.module:Class` of its implementation."""

    name: str
    options: type[BaseModel]
    implementation: str


BUILT_IN = {
    entry.name: entry
    for entry in (
        StrategyEntry("none", NoneOptions, "disttrain.strategy.none:NoStrategy"),
        StrategyEntry("ddp", DDPOptions, "disttrain.strategy.ddp:DDP"),
        StrategyEntry("fsdp", FSDPOptions, "disttrain.strategy.fsdp.strategy:FSDP"),
        StrategyEntry("deepspeed", DeepSpeedOptions, "disttrain.strategy.deepspeed.strategy:DeepSpeed"),
    )
}


def strategy_entry(name: str) -> StrategyEntry:
    """The entry of a built-in or installed strategy. Raises UnknownNameError with a list of the known names."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    if name == TRANSLATED:
        raise UnknownNameError(
            "Cannot resolve strategy.name=accelerate, which stands for the strategy in accelerate's file.",
            "the file has not been translated",
            "start with `accelerate launch`, or see the translation with `disttrain check CONFIG --accelerate FILE`",
        )
    installed = {point.name: point for point in entry_points(group=GROUP)}
    if name not in installed:
        raise UnknownNameError(
            f"Cannot find the strategy {name!r}.",
            "no built-in or installed strategy has that name",
            f"{suggest(name, [*BUILT_IN, *installed])}; or pip install its package (entry point {GROUP})",
        )
    failed = f"Cannot load the strategy plug-in {name!r} ({installed[name].value})."
    try:
        entry = installed[name].load()
    except (ImportError, AttributeError) as error:
        raise UnknownNameError(failed, f"the plug-in cannot be loaded: {error}", "fix or reinstall it") from None
    if not isinstance(entry, StrategyEntry):
        raise UnknownNameError(failed, f"the plug-in names {entry!r}, not a StrategyEntry", "fix its entry point")
    return entry
