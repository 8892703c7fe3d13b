"""Checks the rules that involve several keys. Pure.

The values may not be valid yet, so that one problem does not hide another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from disttrain.config.files.yaml_lines import KeyPath
from disttrain.config.problems import shown

BrokenRule = tuple[KeyPath, str, str]
"""The key, the problem and the fix."""

_LENGTHS = ("steps", "epochs", "tokens")
_RESERVED_AXES = ("pipeline", "context", "expert")
_MASTERS = {"fp64": ("fp64",), "fp32": ("fp32",), "bf16": ("fp32", "bf16"), "fp16": ("fp32",)}
"""Allowed precision.master under each precision.compute. fp16 parameters would lose small updates."""
_REDUCTIONS = {"fp64": ("fp64",), "fp32": ("fp32", "bf16"), "bf16": ("fp32", "bf16"), "fp16": ("fp32",)}
"""Allowed precision.reduce. bf16 has the range of fp32. fp16 has not, and scaled gradients use all of it."""


def broken_rules(values: Mapping[str, Any]) -> Iterator[BrokenRule]:
    """Every rule that `values` break."""
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


def _optimizers(optim: Any) -> Iterator[BrokenRule]:
    """A list of optimizers is stepped as one, and so has one clipping."""
    if isinstance(optim, Mapping) and "match" in optim:
        fix = "write a list of optimizers: optim: [{match: ..., target: ...}, ...]"
        yield ("optim", "match"), f"{shown(optim['match'])} for a single optimizer, which takes every parameter", fix
    if not isinstance(optim, list):
        return
    if not optim:
        yield ("optim",), "an empty list", "write one optimizer, or a list of several, each with match and target"
    given = [(at, one["clip_norm"]) for at, one in enumerate(optim) if isinstance(one, Mapping) and "clip_norm" in one]
    given = [(at, value) for at, value in given if value is not None]
    for at, value in given[1:]:
        if value != given[0][1]:
            problem = f"{shown(value)}, but {shown(given[0][1])} in item {given[0][0]}"
            yield ("optim", at, "clip_norm"), problem, "state it once: clipping uses the norm over all parameters"


def _length(run: Mapping[str, Any], *, trains: bool) -> Iterator[BrokenRule]:
    given = [name for name in _LENGTHS if run.get(name) is not None]
    if len(given) > 1:
        names = " and ".join(f"run.{name}" for name in given)
        others = " ".join(f"run.{name}=null" for name in given[:-1])
        yield ("run", given[-1]), f"{names} each set the length of the run", f"keep one; on the command line: {others}"
    if not given and trains:
        yield ("run", "steps"), "none of run.steps, run.epochs, run.tokens", "set the run's length: run.steps=1000"


def _batches(data: Mapping[str, Any]) -> Iterator[BrokenRule]:
    total, part = data.get("global_batch"), data.get("micro_batch")
    if isinstance(total, Mapping) and isinstance(part, Mapping):
        total, part = total.get("tokens"), part.get("tokens")
    if isinstance(total, int) and isinstance(part, int) and part > total > 0:
        problem = f"{part}, more than data.global_batch, which is {total}"
        yield ("data", "micro_batch"), problem, f"make it at most {total}, or increase data.global_batch"


def _evaluation(eval_: Mapping[str, Any]) -> Iterator[BrokenRule]:
    sets = eval_.get("sets")
    for key in ("every", "micro_batch"):
        if eval_.get(key) is not None and not sets:
            problem = f"{shown(eval_[key])}, but there are no eval.sets to evaluate"
            yield ("eval", key), problem, "add sets: {held_out: {target: ...}}, or remove the key"
    for name in sets if isinstance(sets, Mapping) else ():
        if "/" in str(name) or not name:
            problem = f"the set name {name!r} is empty or contains a slash: metrics are named eval/SET/NAME"
            yield ("eval", "sets", name), problem, "rename the set"


def _mesh(mesh: Mapping[str, Any]) -> Iterator[BrokenRule]:
    for axis in _RESERVED_AXES:
        if axis in mesh:
            yield ("mesh", axis), f"{shown(mesh[axis])}: this axis is reserved for a later release", "remove the key"


def _precision(precision: Mapping[str, Any], strategy: Mapping[str, Any]) -> Iterator[BrokenRule]:
    if strategy.get("name") == "deepspeed" and precision.get("compute") == "fp64":
        fix = "use precision.compute=fp32, or strategy none, ddp or fsdp"
        yield ("precision", "compute"), "fp64, which strategy deepspeed does not support", fix


def _zero(precision: Mapping[str, Any], strategy: Mapping[str, Any]) -> Iterator[BrokenRule]:
    options = _section(strategy, "deepspeed")
    if strategy.get("name") != "deepspeed":
        return
    path, stage = ("strategy", "deepspeed"), options.get("stage", 2)
    parameters, state = options.get("offload_parameters", "none"), options.get("offload", "none")
    if parameters != "none" and stage != 3:
        problem = f"{shown(parameters)} at stage {shown(stage)}, where every rank holds complete parameters"
        yield (*path, "offload_parameters"), problem, "set strategy.deepspeed.stage=3, or offload_parameters=none"
    if state == "nvme" and stage != 3:
        problem = f"nvme at stage {shown(stage)}, where DeepSpeed would silently use the host's memory"
        yield (*path, "offload"), problem, "set strategy.deepspeed.stage=3, or offload=cpu"
    if "nvme" in (state, parameters) and not options.get("nvme_path"):
        yield (*path, "nvme_path"), "nothing, but an offload to nvme needs a path", "name a folder on a local NVMe disk"
    if precision.get("master") == "bf16" and state != "none":
        problem = f"{shown(state)} under precision.master=bf16, for which DeepSpeed requires its own optimizer"
        yield (*path, "offload"), problem, "set precision.master=fp32, or strategy.deepspeed.offload=none"


def _types(precision: Mapping[str, Any]) -> Iterator[BrokenRule]:
    compute = precision.get("compute", "fp32")
    for key, table in (("master", _MASTERS), ("reduce", _REDUCTIONS)):
        value, allowed = precision.get(key), table.get(compute, ()) if isinstance(compute, str) else ()
        if value is not None and allowed and value not in allowed:
            yield (
                ("precision", key),
                f"{shown(value)} under precision.compute={compute}",
                f"use {' or '.join(f'precision.{key}={one}' for one in allowed)}, or leave it out",
            )


def _memory(memory: Mapping[str, Any]) -> Iterator[BrokenRule]:
    recompute, compiles = memory.get("recompute"), memory.get("compile") is True
    if recompute == "budget" and not compiles:
        problem = "budget without memory.compile: the compiler decides what to recompute for a budget"
        yield ("memory", "recompute"), problem, "set memory.compile=true, or memory.recompute=selective"
    if recompute == "selective" and compiles:
        problem = "selective, which chooses by operation, with memory.compile=true, which replaces the operations"
        yield ("memory", "recompute"), problem, "set memory.recompute=budget, or memory.compile=false"
