"""The options of each strategy, typed, and where its implementation is: torch-free, so that `check` needs no torch.

A plug-in's entry point `disttrain.strategies` names a `StrategyEntry` in a module that imports no torch.
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
"""A name for one of the others: that which `accelerate launch` asks for."""


class StrategyOptions(Section):
    """Base of options classes: frozen, unknown keys refused."""


class NoneOptions(StrategyOptions):
    """One process has nothing to choose."""


class DDPOptions(StrategyOptions):
    """`bucket_mb` is the size of a reduction; `find_unused` copes with parameters that a step does not reach."""

    bucket_mb: float = Field(25.0, gt=0)
    find_unused: bool = True


class TensorOptions(StrategyOptions):
    """How `mesh.tensor` cuts layers: `plan` maps patterns of module names to styles (null: the model's own `tp_plan`).
    `sequence` also cuts what lies between along time; `loss` leaves the head's output cut over the vocabulary."""

    plan: dict[str, str] | None = None
    sequence: bool = False
    loss: bool = False


class FSDPOptions(StrategyOptions):
    """`reshard` frees whole parameters after forward (a number: down to groups of so many ranks). `blocks` names
    classes or module patterns to shard one by one. `reduce` says when an accumulation adds gradients up over ranks: at
    its `last` micro-batch (whole gradients stay in memory meanwhile), at `every`, or `auto`. `prefetch_*` is how many
    blocks are gathered ahead (0: torch's order). `offload` keeps shards and optimizer state in host memory."""

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
            raise ValueError("no group of ranks; write true, false, or a number of at least 2 that divides mesh.shard")
        return value


class DeepSpeedOptions(StrategyOptions):
    """ZeRO `stage`, the size of its communication buckets (left out: 25, or what `native` says), and where optimizer
    state (`offload`) and at stage 3 the parameters (`offload_parameters`) are kept. `native` is DeepSpeed's own JSON, a
    file (from this config's folder) or a mapping, for what has no name here; it may contradict nothing that has."""

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
            raise ValueError("a stage that cuts nothing; use strategy.name=ddp, or stage 1, 2 or 3")
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
    """The strategy of that name, built in or installed. Raises ConfigError that lists the known ones."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    if name == TRANSLATED:
        raise UnknownNameError(
            "strategy.name=accelerate stands for what accelerate's own file says.",
            "no translation of it yet, so no strategy",
            "let an Engine take it from `accelerate launch`; `disttrain check CONFIG --accelerate FILE` shows it",
        )
    installed = {point.name: point for point in entry_points(group=GROUP)}
    if name not in installed:
        raise UnknownNameError(
            f"strategy.name={name!r} is to name a strategy.",
            "no built-in or installed strategy of that name",
            f"{suggest(name, [*BUILT_IN, *installed])}; pip install the package that brings it (entry point {GROUP})",
        )
    asked = f"The plug-in {name!r} ({installed[name].value}) is to name a StrategyEntry."
    try:
        entry = installed[name].load()
    except (ImportError, AttributeError) as error:
        raise UnknownNameError(asked, f"a plug-in that cannot be loaded: {error}", "mend or reinstall it") from None
    if not isinstance(entry, StrategyEntry):
        raise UnknownNameError(asked, f"a plug-in that names {entry!r}", "mend the plug-in's entry point")
    return entry
