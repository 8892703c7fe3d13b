"""What several keys must be together. Pure; over values that may not be valid yet, so that no fault hides another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from disttrain.config.files.yaml_lines import KeyPath
from disttrain.config.problems import shown

Broken = tuple[KeyPath, str, str]

_LENGTHS = ("steps", "epochs", "tokens")
_RESERVED_AXES = ("pipeline", "context", "expert")
_MASTERS = {"fp64": ("fp64",), "fp32": ("fp32",), "bf16": ("fp32", "bf16"), "fp16": ("fp32",)}
"""Under each precision.compute: what holds parameters and optimizer state. fp16 ones would lose small updates."""
_REDUCTIONS = {"fp64": ("fp64",), "fp32": ("fp32", "bf16"), "bf16": ("fp32", "bf16"), "fp16": ("fp32",)}
"""And in what gradients are added up over ranks. bf16 has fp32's range; fp16 has not: scaled gradients fill it."""


def broken_rules(values: Mapping[str, Any]) -> Iterator[Broken]:
    """(path, what was found, what to do) of every rule that `values` break."""
    yield from _length(_section(values, "run"), trains=values.get("data") is not None)
    yield from _batches(_section(values, "data"))
    yield from _evaluation(_section(values, "eval"))
    yield from _mesh(_section(values, "mesh"))
    yield from _precision(_section(values, "precision"), _section(values, "strategy"))
    yield from _optimizers(values.get("optim"))
    yield from _zero(_section(values, "precision"), _section(values, "strategy"))
    yield from _types(_section(values, "precision"))
    yield from _memory(_section(values, "memory"))


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = values.get(name)
    return found if isinstance(found, Mapping) else {}


def _optimizers(optim: Any) -> Iterator[Broken]:
    """A list of optimizers takes one step, and so has one clipping."""
    if isinstance(optim, Mapping) and "match" in optim:
        do = "write a list, an optimizer each: optim: [{match: ..., target: ...}, ...]"
        yield ("optim", "match"), f"{shown(optim['match'])}, and one optimizer, which takes every parameter", do
    if not isinstance(optim, list):
        return
    if not optim:
        yield ("optim",), "an empty list", "write one optimizer, or several with match and target each"
    said = [(at, one["clip_norm"]) for at, one in enumerate(optim) if isinstance(one, Mapping) and "clip_norm" in one]
    said = [(at, value) for at, value in said if value is not None]
    for at, value in said[1:]:
        if value != said[0][1]:
            found = f"{shown(value)}, and {shown(said[0][1])} in the item {said[0][0]}"
            yield ("optim", at, "clip_norm"), found, "say it once: clipping is by the norm over all parameters"


def _length(run: Mapping[str, Any], *, trains: bool) -> Iterator[Broken]:
    given = [name for name in _LENGTHS if run.get(name) is not None]
    if len(given) > 1:
        names = " and ".join(f"run.{name}" for name in given)
        others = " ".join(f"run.{name}=null" for name in given[:-1])
        yield ("run", given[-1]), f"{names}, which all say how long to train", f"keep one; from outside: {others}"
    if not given and trains:
        yield ("run", "steps"), "none of run.steps, run.epochs, run.tokens", "say how long to train: run.steps=1000"


def _batches(data: Mapping[str, Any]) -> Iterator[Broken]:
    whole, part = data.get("global_batch"), data.get("micro_batch")
    if isinstance(whole, Mapping) and isinstance(part, Mapping):
        whole, part = whole.get("tokens"), part.get("tokens")
    if isinstance(whole, int) and isinstance(part, int) and part > whole > 0:
        found = f"{part}, more than data.global_batch, which is {whole}"
        yield ("data", "micro_batch"), found, f"make it at most {whole}, or global_batch larger"


def _evaluation(eval_: Mapping[str, Any]) -> Iterator[Broken]:
    sets = eval_.get("sets")
    for key in ("every", "micro_batch"):
        if eval_.get(key) is not None and not sets:
            found = f"{shown(eval_[key])}, and no eval.sets to evaluate"
            yield ("eval", key), found, "add sets: {held_out: {target: ...}}, or take the key out"
    for name in sets if isinstance(sets, Mapping) else ():
        if "/" in str(name) or not name:
            found = f"the set's name {name!r}, which cannot hold a slash or be empty: metrics are eval/SET/NAME"
            yield ("eval", "sets", name), found, "rename it"


def _mesh(mesh: Mapping[str, Any]) -> Iterator[Broken]:
    for axis in _RESERVED_AXES:
        if axis in mesh:
            yield ("mesh", axis), f"{shown(mesh[axis])}: an axis reserved for a later release", "take the key out"


def _precision(precision: Mapping[str, Any], strategy: Mapping[str, Any]) -> Iterator[Broken]:
    if strategy.get("name") == "deepspeed" and precision.get("compute") == "fp64":
        do = "use precision.compute=fp32, or strategy none, ddp or fsdp"
        yield ("precision", "compute"), "fp64, which deepspeed cannot keep", do


def _zero(precision: Mapping[str, Any], strategy: Mapping[str, Any]) -> Iterator[Broken]:
    options = _section(strategy, "deepspeed")
    if strategy.get("name") != "deepspeed":
        return
    place, stage = ("strategy", "deepspeed"), options.get("stage", 2)
    parameters, state = options.get("offload_parameters", "none"), options.get("offload", "none")
    if parameters != "none" and stage != 3:
        found = f"{shown(parameters)} at stage {shown(stage)}, where every rank computes with whole parameters"
        yield (*place, "offload_parameters"), found, "set strategy.deepspeed.stage=3, or offload_parameters=none"
    if state == "nvme" and stage != 3:
        found = f"nvme at stage {shown(stage)}, where DeepSpeed would take the host's memory without a word"
        yield (*place, "offload"), found, "set strategy.deepspeed.stage=3, or offload=cpu"
    if "nvme" in (state, parameters) and not options.get("nvme_path"):
        yield (*place, "nvme_path"), "nothing, and an offload to nvme", "name a folder on a local NVMe disk"
    if precision.get("master") == "bf16" and state != "none":
        found = f"{shown(state)} under precision.master=bf16, for which DeepSpeed wants an optimizer of its own"
        yield (*place, "offload"), found, "set precision.master=fp32, or strategy.deepspeed.offload=none"


def _types(precision: Mapping[str, Any]) -> Iterator[Broken]:
    compute = precision.get("compute", "fp32")
    for key, table in (("master", _MASTERS), ("reduce", _REDUCTIONS)):
        found, known = precision.get(key), table.get(compute, ()) if isinstance(compute, str) else ()
        if found is not None and known and found not in known:
            yield (
                ("precision", key),
                f"{shown(found)} under precision.compute={compute}",
                f"use {' or '.join(f'precision.{key}={one}' for one in known)}, or leave it out",
            )


def _memory(memory: Mapping[str, Any]) -> Iterator[Broken]:
    recompute, compiles = memory.get("recompute"), memory.get("compile") is True
    if recompute == "budget" and not compiles:
        found = "budget, and no memory.compile: it is the compiler that decides what fits a budget"
        yield ("memory", "recompute"), found, "set memory.compile=true, or memory.recompute=selective"
    if recompute == "selective" and compiles:
        found = "selective, which chooses by operation, and memory.compile=true: the compiler leaves no operations"
        yield ("memory", "recompute"), found, "set memory.recompute=budget, or memory.compile=false"
