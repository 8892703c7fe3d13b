"""Reads the user's native DeepSpeed JSON (`strategy.deepspeed.native`), and compares it with the config.

The config decides. A value of the JSON may be equal, or Hugging Face's "auto". A value that contradicts the config is
rejected by name, and so is a key that DeepSpeed would ignore. A file becomes a mapping in the resolved config, so that
a run's folder is complete. Clipping is always `optim.clip_norm`; DeepSpeed alone clips at 1.0 by default.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from disttrain.config.files.yaml_lines import KeyPath
from disttrain.config.foreign.deepspeed_keys import ELSEWHERE, FIXED, REMOVED, SECTIONS, known_at
from disttrain.config.problems import dotted, shown, suggest
from disttrain.config.rules import BrokenRule

PLACE = ("strategy", "deepspeed", "native")
CLIP_DEFAULT = 1.0
"""DeepSpeed 0.19's clipping norm where its JSON states none (GRADIENT_CLIPPING_DEFAULT)."""


def read_native(value: Any, folder: Path) -> tuple[Any, list[BrokenRule]]:
    """Read `strategy.deepspeed.native`: a mapping, or the path of a JSON file. Local; reads the disk.

    A path is relative to `folder`, or else to the working directory. Returns the mapping, or the unchanged value and
    the reason why it cannot be read.
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
        fix = "write its path relative to this config's folder, or the mapping itself"
        return value, [(PLACE, f"{value!r} cannot be read: {error.strerror}", fix)]
    except ValueError as error:
        return value, [(PLACE, f"{path} is not JSON: {error}", "correct the file; JSON has no comments")]
    if twice:
        return value, [(PLACE, f"{path} has {', '.join(sorted(twice))} twice", "keep one of them")]
    if not isinstance(found, dict):
        return value, [(PLACE, f"{path} contains {shown(found)}, not an object", "write DeepSpeed's JSON object")]
    return found, []


def unknown_keys(native: Mapping[str, Any]) -> Iterator[BrokenRule]:
    """Keys that DeepSpeed does not know or has removed, or that have another place in this config. Pure."""
    yield from _unknown_in(native, ())


def _unknown_in(section: Mapping[str, Any], path: KeyPath) -> Iterator[BrokenRule]:
    known = known_at(dotted(path))
    for key, value in section.items():
        here = (*path, key)
        name = dotted(here)
        if name in REMOVED:
            yield (*PLACE, *here), f"DeepSpeed 0.19 has removed {name!r}", "remove the key"
        elif key not in known:
            yield (*PLACE, *here), f"DeepSpeed does not know {name!r} and would ignore it", suggest(key, known)
        elif not path and key in ELSEWHERE:
            if not _is_off(value):
                yield (*PLACE, *here), f"{name!r} is not passed to DeepSpeed", ELSEWHERE[key]
        elif name in SECTIONS and isinstance(value, Mapping):
            yield from _unknown_in(value, here)
        elif name in SECTIONS and value is not None and value != "auto":
            yield (*PLACE, *here), f"{name} = {shown(value)}", f"write an object of {', '.join(SECTIONS[name])}"


def _is_off(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and value.get("enabled") in (False, "auto"))


def contradictions(native: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[BrokenRule]:
    """Every value of the JSON that contradicts this config's `values`. Pure."""
    for path, key, ours, fix in _claims(values):
        found = _at(native, path)
        if not _leaves_open(found) and not _equal(found, ours):
            yield (*PLACE, *path), f"{dotted(path)} = {shown(found)}, but {key} is {shown(ours)}", fix
    for name, ours in FIXED.items():
        found = _at(native, tuple(name.split(".")))
        if not _leaves_open(found) and not _equal(found, ours):
            why = f"{name} = {shown(found)} is incompatible with exact gradients or with checkpoints of any layout"
            yield (*PLACE, *name.split(".")), why, f"remove it, or write {json.dumps(ours)}"
    yield from _accumulation(native, values)
    yield from _precisions(native, values)
    yield from _optimizer(native, values)


def _claims(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str, Any, str]]:
    """Pairs of a JSON key and a config key that must agree: JSON path, config key, its value, and the fix."""
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
            f"set {key}, and remove it from the JSON",
        )
    bucket = _at(values, ("strategy", "deepspeed", "bucket_mb"))
    if isinstance(bucket, int | float):
        for name in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"):
            elements = int(bucket * 2**20 / 4) // 2 * 2
            fix = "remove it from the JSON, or strategy.deepspeed.bucket_mb from this config"
            key = f"strategy.deepspeed.bucket_mb={bucket} in elements"
            yield ("zero_optimization", name), key, elements, fix


def _wide(values: Mapping[str, Any], key: str) -> str:
    """`precision.master` or `precision.reduce`, or the schema's default for it."""
    wide = "fp64" if _at(values, ("precision", "compute")) == "fp64" else "fp32"
    return str(_at(values, ("precision", key)) or wide)


def _accumulation(native: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[BrokenRule]:
    """Compare DeepSpeed's accumulation steps with the batch sizes; the number of ranks is known only at launch."""
    rounds = _at(native, ("gradient_accumulation_steps",))
    total, part = _at(values, ("data", "global_batch")), _at(values, ("data", "micro_batch"))
    if _leaves_open(rounds):
        return
    at = (*PLACE, "gradient_accumulation_steps")
    fix = "remove it from the JSON: it is data.global_batch divided by the ranks and data.micro_batch"
    if not (isinstance(total, int) and isinstance(part, int) and isinstance(rounds, int) and rounds > 0):
        yield at, f"{shown(rounds)}, which does not follow from data.global_batch and data.micro_batch", fix
    elif total % (part * rounds):
        problem = f"{rounds}, but data.global_batch={total} is not a multiple of {rounds} x data.micro_batch={part}"
        yield at, problem, fix


def ranks_of(native: Mapping[str, Any] | None) -> int | None:
    """The number of data-parallel ranks that the JSON's batch sizes are for, or None without all three sizes. Pure."""
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    total, part, rounds = ((native or {}).get(name) for name in names)
    if isinstance(total, int) and isinstance(part, int) and isinstance(rounds, int) and part * rounds > 0:
        return total // (part * rounds)
    return None


def _precisions(native: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[BrokenRule]:
    compute = _at(values, ("precision", "compute")) or "fp32"
    for name in ("bf16", "fp16"):
        found = _at(native, (name, "enabled"))
        if not _leaves_open(found) and bool(found) != (compute == name):
            fix = f"set precision.compute={name if found else 'fp32'}, or remove it from the JSON"
            yield (*PLACE, name, "enabled"), f"{name}.enabled = {shown(found)}, but precision.compute is {compute}", fix
    autocast, dtype = _at(native, ("torch_autocast", "enabled")), _at(native, ("torch_autocast", "dtype"))
    if autocast is True and compute not in str(dtype).replace("bfloat16", "bf16").replace("float16", "fp16"):
        found = f"torch_autocast to {shown(dtype)}, but precision.compute is {compute}"
        yield (*PLACE, "torch_autocast", "dtype"), found, "set precision.compute, or remove the section from the JSON"
    pure = _at(native, ("bf16", "bf16_master_weights_and_grads"))
    master = _wide(values, "master")
    if not _leaves_open(pure) and bool(pure) != (master == "bf16"):
        found = f"bf16.bf16_master_weights_and_grads = {shown(pure)}, but precision.master is {master}"
        fix = "set precision.master, or remove it from the JSON"
        yield (*PLACE, "bf16", "bf16_master_weights_and_grads"), found, fix
    scaling = _at(native, ("fp16",))
    if compute == "fp16" and isinstance(scaling, Mapping):
        for key, found in scaling.items():
            if key != "enabled" and key in SECTIONS["fp16"] and not _leaves_open(found) and (key, found) != _DYNAMIC:
                fix = "remove it from the JSON: the loss scale is dynamic, and the same in every strategy"
                yield (*PLACE, "fp16", key), f"fp16.{key} = {shown(found)}", fix


_DYNAMIC = ("loss_scale", 0)


def _optimizer(native: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[BrokenRule]:
    optimizer, scheduler = native.get("optimizer"), native.get("scheduler")
    if isinstance(scheduler, Mapping) and not _leaves_open(scheduler.get("type")):
        found = f"scheduler {shown(scheduler.get('type'))}, but this config has the schedule"
        yield (*PLACE, "scheduler"), found, "write the section schedule, and remove scheduler from the JSON"
    optim = values.get("optim")
    if not isinstance(optimizer, Mapping) or not isinstance(optim, Mapping):
        return
    kind, target = optimizer.get("type"), str(optim.get("target"))
    params = optimizer.get("params")
    given = params if isinstance(params, Mapping) else {}
    if not _leaves_open(kind) and _class_meant(kind, given) != target.replace(":", ".").split(".")[-1].casefold():
        found = f"optimizer.type = {shown(kind)}, but optim.target is {target}"
        yield (*PLACE, "optimizer", "type"), found, "set optim.target, or remove optimizer from the JSON"
    args = optim.get("args")
    for key, value in given.items():
        ours = args.get(key) if isinstance(args, Mapping) else None
        if key not in ("adam_w_mode", "torch_adam") and not _leaves_open(value) and not _equal(value, ours):
            found = f"optimizer.params.{key} = {shown(value)}, but optim.args.{key} is {shown(ours)}"
            fix = f"set optim.args.{key}={shown(value)}, or remove it from the JSON"
            yield (*PLACE, "optimizer", "params", key), found, fix


def _class_meant(kind: Any, params: Mapping[str, Any]) -> str:
    """The optimizer class, in lower case, that DeepSpeed uses for a type.

    DeepSpeed's Adam is AdamW unless `adam_w_mode` is false (runtime/config.py, ADAM_W_MODE_DEFAULT).
    """
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
    """Whether DeepSpeed alone would clip at `CLIP_DEFAULT`, because the JSON states no clipping. Pure."""
    return native is not None and _leaves_open(native.get("gradient_clipping"))
