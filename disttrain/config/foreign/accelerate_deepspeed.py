"""Translates accelerate's `deepspeed_config`, and the DeepSpeed JSON that it may name, into config keys. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

from disttrain.config.foreign.translation import Translation
from disttrain.config.problems import shown

_FILE = "deepspeed_config.deepspeed_config_file"
_Said = tuple[Any, str]


class Native:
    """DeepSpeed's JSON. `take` removes and returns a value; `rest` is what has no key in disttrain's config."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = _without_auto(values)

    def take(self, path: str) -> Any:
        """The value at a dotted path; None where there is none, or where it was `auto`."""
        *around, name = path.split(".")
        place: Any = self._values
        for part in around:
            place = place.get(part) if isinstance(place, dict) else None
        return place.pop(name, None) if isinstance(place, dict) else None

    def rest(self) -> dict[str, Any]:
        """The values that were not taken, without empty sections."""
        return _without_empty(self._values)


def _without_auto(values: Mapping[str, Any]) -> dict[str, Any]:
    """Remove values that are `auto`, which means "not set here" in accelerate. DeepSpeed does not know it."""
    items = ((key, _without_auto(item) if isinstance(item, Mapping) else item) for key, item in values.items())
    return {key: item for key, item in items if item != "auto"}


def _without_empty(values: Mapping[str, Any]) -> dict[str, Any]:
    items = ((key, _without_empty(item) if isinstance(item, Mapping) else item) for key, item in values.items())
    return {key: item for key, item in items if item != {}}


def translate_deepspeed(found: Translation, native: Native) -> None:
    """Translate stage, offload and the rest of the JSON; compare accumulation, clipping and batches with the config."""
    stage, key = _said(found, native, "zero_stage", "zero_optimization.stage")
    # The default of accelerate is 2; that of a DeepSpeed JSON is 0.
    stage = stage if stage is not None else 2 if found.settings.native is None else 0
    if stage in (1, 2, 3):
        found.put("strategy.deepspeed.stage", stage, key)
    else:
        fix = "write distributed_type: MULTI_GPU for ddp, or stage 1, 2 or 3"
        why = "which is ZeRO stage 0 and partitions nothing" if stage == 0 else "which is not a ZeRO stage"
        found.reject(key, why, fix)
    _offload(found, native, "optimizer", "strategy.deepspeed.offload")
    _offload(found, native, "param", "strategy.deepspeed.offload_parameters")
    _accumulation(found, *_said(found, native, "gradient_accumulation_steps", "gradient_accumulation_steps"))
    _clipping(found, *_said(found, native, "gradient_clipping", "gradient_clipping"))
    _batches(found, native)
    native.take("steps_per_print")  # disttrain turns DeepSpeed's own output off
    if native.rest():
        found.put("strategy.deepspeed.native", native.rest(), _FILE)


def _said(found: Translation, native: Native, name: str, path: str) -> _Said:
    """A value and its key: accelerate's key, or the key of the JSON file. Rejected where both are set and differ."""
    key, inner = f"deepspeed_config.{name}", native.take(path)
    value = None if found.said(key) in ("auto", "none") else found.said(key)
    if value is None:
        return (None if inner == "none" else inner), (key if inner is None else _FILE)
    if inner not in (None, value):
        found.reject(key, f"but {found.said(_FILE)} has {path}: {shown(inner)}", "remove one of them")
    return value, key


def _offload(found: Translation, native: Native, what: str, ours: str) -> None:
    inner = f"zero_optimization.offload_{what}"
    device, key = _said(found, native, f"offload_{what}_device", f"{inner}.device")
    path, path_key = _said(found, native, f"offload_{what}_nvme_path", f"{inner}.nvme_path")
    found.put(ours, device or "none", key)
    if what == "param" and device and found.values.get("strategy.deepspeed.stage", (3, ""))[0] != 3:
        found.reject(key, "but only stage 3 partitions parameters", "write none, or zero_stage: 3")
    stated = found.config.strategy.deepspeed.nvme_path
    if device != "nvme":
        return
    if path_key == _FILE:
        found.put("strategy.deepspeed.nvme_path", path, path_key)
    elif stated is None:
        fix = "set strategy.deepspeed.nvme_path in the config"
        found.reject(key, "but `accelerate launch` passes no path to its processes", fix)
    elif path not in (None, stated):
        found.reject(path_key, f"but strategy.deepspeed.nvme_path is {stated!r}", "make both equal")


def _accumulation(found: Translation, steps: Any, key: str) -> None:
    """Compare accelerate's number of accumulation steps with what global batch, micro-batch and ranks result in."""
    if steps is None:
        return
    data, world = found.config.data, found.settings.world_size
    batch, micro = (data.global_batch, data.micro_batch) if data is not None else (None, None)
    fix = "remove it: it follows from data.global_batch, data.micro_batch and the number of ranks"
    if not isinstance(batch, int) or not isinstance(micro, int | None):
        found.reject(key, "but the config's batch sizes are not numbers of samples to compare it with", fix)
    elif world is not None:
        tensor = found.values.get("mesh.tensor", (found.config.mesh.tensor, ""))[0]
        ranks = max(1, world // max(1, tensor))
        size = min(micro or ceil(batch / ranks), batch)
        ours = ceil(ceil(batch / size) / ranks)
        if steps != ours:
            why = f"but data.global_batch={batch} in micro-batches of {size} over {ranks} rank(s) takes {ours}"
            found.reject(key, why, fix)


def _clipping(found: Translation, norm: Any, key: str) -> None:
    if norm is None:
        return
    if found.config.optim is None:
        found.reject(key, "but the config has no section optim", "add optim.clip_norm, or remove it")
    elif isinstance(found.config.optim, tuple):
        if float(norm) != (found.config.clip_norm or 0.0):
            stated = shown(found.config.clip_norm)
            found.reject(key, f"but the list under optim has clip_norm={stated}", "make both equal, or remove it here")
    else:
        found.put("optim.clip_norm", float(norm), key, *([None] if norm == 0 else []))


def _batches(found: Translation, native: Native) -> None:
    """Compare the batch sizes in DeepSpeed's JSON with the config's."""
    data = found.config.data
    for path, ours in (("train_batch_size", "global_batch"), ("train_micro_batch_size_per_gpu", "micro_batch")):
        size = native.take(path)
        stated = getattr(data, ours, None)
        if size is not None and size != stated:
            why = f"with {path}: {shown(size)}, but data.{ours} is {shown(stated)}"
            found.reject(_FILE, why, 'write "auto" there: the config decides')
