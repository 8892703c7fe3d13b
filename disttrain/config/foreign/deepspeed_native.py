"""The user's native DeepSpeed JSON (`strategy.deepspeed.native`) against this config: one of them decides, never both.

It lies under our config. Equal values and Hugging Face's "auto" pass; a value that contradicts ours is refused by
name, and so is a key that DeepSpeed would ignore. A file is read here and stands as a mapping in the resolved config,
so that a run's folder is whole. Clipping is always `optim.clip_norm`; left out of a JSON, DeepSpeed alone clips at 1.0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from disttrain.config.files.yaml_lines import KeyPath
from disttrain.config.foreign.deepspeed_keys import ELSEWHERE, FIXED, REMOVED, SECTIONS, known_at
from disttrain.config.problems import dotted, shown, suggest
from disttrain.config.rules import Broken

PLACE = ("strategy", "deepspeed", "native")
CLIP_DEFAULT = 1.0
"""What DeepSpeed 0.19 clips at where its JSON does not say (GRADIENT_CLIPPING_DEFAULT)."""


def read_native(value: Any, folder: Path) -> tuple[Any, list[Broken]]:
    """`strategy.deepspeed.native` as a mapping: a path's JSON, found from `folder`, then the working directory.

    Returns what was given where it cannot be read, and why not. Reads the disk.
    """
    if not isinstance(value, str):
        return value, []
    path = folder / value if (folder / value).exists() else Path(value)
    twice: list[str] = []

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice.extend(name for name in set(names) if names.count(name) > 1)
        return dict(pairs)

    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=mapping)
    except OSError as error:
        do = "write its path from this config's folder, or the mapping itself"
        return value, [(PLACE, f"{value!r}, which cannot be read: {error.strerror}", do)]
    except ValueError as error:
        return value, [(PLACE, f"{path}, which is no JSON: {error}", "mend the file; plain JSON has no comments")]
    if twice:
        return value, [(PLACE, f"{path}, which gives {', '.join(sorted(twice))} twice", "keep one of them")]
    if not isinstance(found, dict):
        return value, [(PLACE, f"{path}, which holds {shown(found)}, no object", "write DeepSpeed's JSON object")]
    return found, []


def unknown_keys(native: Mapping[str, Any]) -> Iterator[Broken]:
    """Keys that DeepSpeed does not know, has removed, or that stand elsewhere in this config. Pure."""
    yield from _unknown_in(native, ())


def _unknown_in(section: Mapping[str, Any], path: KeyPath) -> Iterator[Broken]:
    known = known_at(dotted(path))
    for key, value in section.items():
        here = (*path, key)
        name = dotted(here)
        if name in REMOVED:
            yield (*PLACE, *here), f"{name!r}, which DeepSpeed 0.19 has removed", "take the key out"
        elif key not in known:
            yield (*PLACE, *here), f"{name!r}, which DeepSpeed does not know and would ignore", suggest(key, known)
        elif not path and key in ELSEWHERE:
            if not _is_off(value):
                yield (*PLACE, *here), f"{name!r}, which is not handed on to DeepSpeed", ELSEWHERE[key]
        elif name in SECTIONS and isinstance(value, Mapping):
            yield from _unknown_in(value, here)
        elif name in SECTIONS and value is not None and value != "auto":
            yield (*PLACE, *here), f"{name} = {shown(value)}", f"write an object of {', '.join(SECTIONS[name])}"


def _is_off(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and value.get("enabled") in (False, "auto"))


def contradictions(native: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[Broken]:
    """Every value of the JSON that says something else than this config's `values`. Pure."""
    for path, key, ours, do in _claims(values):
        found = _at(native, path)
        if not _leaves_open(found) and not _equal(found, ours):
            yield (*PLACE, *path), f"{dotted(path)} = {shown(found)}, but {key} is {shown(ours)}", do
    for name, ours in FIXED.items():
        found = _at(native, tuple(name.split(".")))
        if not _leaves_open(found) and not _equal(found, ours):
            why = f"{name} = {shown(found)}, on which exact gradients or checkpoints of any layout cannot rest"
            yield (*PLACE, *name.split(".")), why, f"take it out, or write {json.dumps(ours)}"
    yield from _accumulation(native, values)
    yield from _precisions(native, values)
    yield from _optimizer(native, values)


def _claims(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str, Any, str]]:
    """(place in the JSON, key of ours, our value, what to do about another)."""

    for name, key, default in (
        ("gradient_clipping", "optim.clip_norm", 0.0),
        ("train_batch_size", "data.global_batch", None),
        ("train_micro_batch_size_per_gpu", "data.micro_batch", None),
        ("zero_optimization.stage", "strategy.deepspeed.stage", 2),
        ("zero_optimization.offload_optimizer.device", "strategy.deepspeed.offload", "none"),
        ("zero_optimization.offload_param.device", "strategy.deepspeed.offload_parameters", "none"),
        ("zero_optimization.offload_optimizer.nvme_path", "strategy.deepspeed.nvme_path", None),
        ("zero_optimization.offload_param.nvme_path", "strategy.deepspeed.nvme_path", None),
        ("communication_data_type", "precision.reduce", _wide(values, "reduce")),
        ("data_types.grad_accum_dtype", "precision.master", _wide(values, "master")),
        ("data_types.param_dtype", "precision.master", _wide(values, "master")),
    ):
        ours = _at(values, tuple(key.split(".")))
        yield (
            tuple(name.split(".")),
            key,
            default if ours is None else ours,
            f"let {key} say it, and take it out of the JSON",
        )
    bucket = _at(values, ("strategy", "deepspeed", "bucket_mb"))
    if isinstance(bucket, int | float):
        for name in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"):
            elements = int(bucket * 2**20 / 4) // 2 * 2
            do = "take it out of the JSON, or strategy.deepspeed.bucket_mb out of this config"
            key = f"strategy.deepspeed.bucket_mb={bucket} in elements"
            yield ("zero_optimization", name), key, elements, do


def _wide(values: Mapping[str, Any], key: str) -> str:
    """What the schema states where `precision.master` or `precision.reduce` is left out."""
    wide = "fp64" if _at(values, ("precision", "compute")) == "fp64" else "fp32"
    return str(_at(values, ("precision", key)) or wide)


def _accumulation(native: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[Broken]:
    """DeepSpeed's accumulation is what global and micro-batch leave; ranks multiply it, and are known at the launch."""
    rounds = _at(native, ("gradient_accumulation_steps",))
    whole, part = _at(values, ("data", "global_batch")), _at(values, ("data", "micro_batch"))
    if _leaves_open(rounds):
        return
    at = (*PLACE, "gradient_accumulation_steps")
    do = "take it out of the JSON: it is data.global_batch over ranks and data.micro_batch"
    if not (isinstance(whole, int) and isinstance(part, int) and isinstance(rounds, int) and rounds > 0):
        yield at, f"{shown(rounds)}, which data.global_batch and data.micro_batch do not say", do
    elif whole % (part * rounds):
        found = f"{rounds}, but data.global_batch={whole} is no multiple of {rounds} x data.micro_batch={part}"
        yield at, found, do


def ranks_of(native: Mapping[str, Any] | None) -> int | None:
    """How many data-parallel ranks the JSON's batch sizes are for, where it gives all three. Pure."""
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    whole, part, rounds = ((native or {}).get(name) for name in names)
    if isinstance(whole, int) and isinstance(part, int) and isinstance(rounds, int) and part * rounds > 0:
        return whole // (part * rounds)
    return None


def _precisions(native: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[Broken]:
    compute = _at(values, ("precision", "compute")) or "fp32"
    for name in ("bf16", "fp16"):
        found = _at(native, (name, "enabled"))
        if not _leaves_open(found) and bool(found) != (compute == name):
            do = f"set precision.compute={name if found else 'fp32'}, or take it out of the JSON"
            yield (*PLACE, name, "enabled"), f"{name}.enabled = {shown(found)}, but precision.compute is {compute}", do
    autocast, dtype = _at(native, ("torch_autocast", "enabled")), _at(native, ("torch_autocast", "dtype"))
    if autocast is True and compute not in str(dtype).replace("bfloat16", "bf16").replace("float16", "fp16"):
        found = f"torch_autocast to {shown(dtype)}, but precision.compute is {compute}"
        yield (*PLACE, "torch_autocast", "dtype"), found, "set precision.compute, or take the section out of the JSON"
    pure = _at(native, ("bf16", "bf16_master_weights_and_grads"))
    master = _wide(values, "master")
    if not _leaves_open(pure) and bool(pure) != (master == "bf16"):
        found = f"bf16.bf16_master_weights_and_grads = {shown(pure)}, but precision.master is {master}"
        do = "set precision.master, or take it out of the JSON"
        yield (*PLACE, "bf16", "bf16_master_weights_and_grads"), found, do
    scaling = _at(native, ("fp16",))
    if compute == "fp16" and isinstance(scaling, Mapping):
        for key, found in scaling.items():
            if key != "enabled" and key in SECTIONS["fp16"] and not _leaves_open(found) and (key, found) != _DYNAMIC:
                do = "take it out of the JSON: the loss scale is dynamic, and the same in every strategy"
                yield (*PLACE, "fp16", key), f"fp16.{key} = {shown(found)}", do


_DYNAMIC = ("loss_scale", 0)


def _optimizer(native: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[Broken]:
    optimizer, scheduler = native.get("optimizer"), native.get("scheduler")
    if isinstance(scheduler, Mapping) and not _leaves_open(scheduler.get("type")):
        found = f"scheduler {shown(scheduler.get('type'))}; the schedule is this config's"
        yield (*PLACE, "scheduler"), found, "write the section schedule, and take scheduler out of the JSON"
    optim = values.get("optim")
    if not isinstance(optimizer, Mapping) or not isinstance(optim, Mapping):
        return
    kind, target = optimizer.get("type"), str(optim.get("target"))
    params = optimizer.get("params")
    given = params if isinstance(params, Mapping) else {}
    if not _leaves_open(kind) and _class_meant(kind, given) != target.replace(":", ".").split(".")[-1].casefold():
        found = f"optimizer.type = {shown(kind)}, but optim.target is {target}"
        yield (*PLACE, "optimizer", "type"), found, "set optim.target, or take optimizer out of the JSON"
    args = optim.get("args")
    for key, value in given.items():
        ours = args.get(key) if isinstance(args, Mapping) else None
        if key not in ("adam_w_mode", "torch_adam") and not _leaves_open(value) and not _equal(value, ours):
            found = f"optimizer.params.{key} = {shown(value)}, but optim.args.{key} is {shown(ours)}"
            do = f"set optim.args.{key}={shown(value)}, or take it out of the JSON"
            yield (*PLACE, "optimizer", "params", key), found, do


def _class_meant(kind: Any, params: Mapping[str, Any]) -> str:
    """DeepSpeed's Adam is AdamW unless `adam_w_mode` is false (runtime/config.py, ADAM_W_MODE_DEFAULT)."""
    name = str(kind).casefold()
    return "adamw" if name == "adam" and params.get("adam_w_mode", True) else name


def _at(values: Any, path: KeyPath) -> Any:
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _leaves_open(value: Any) -> bool:
    return value is None or value == "auto"


def _equal(found: Any, ours: Any) -> bool:
    if isinstance(found, bool) or isinstance(ours, bool):
        return found is ours
    if isinstance(ours, Path):
        ours = str(ours)
    return bool(found == ours)


def clip_left_out(native: Mapping[str, Any] | None) -> bool:
    """Whether DeepSpeed alone would clip at `CLIP_DEFAULT` because its JSON does not say. Pure."""
    return native is not None and _leaves_open(native.get("gradient_clipping"))
