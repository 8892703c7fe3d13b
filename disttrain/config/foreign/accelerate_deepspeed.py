"""accelerate's `deepspeed_config`, and the JSON of DeepSpeed's own that it may name, as keys of this config. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

from disttrain.config.foreign.translation import Translation
from disttrain.config.problems import shown

_FILE = "deepspeed_config.deepspeed_config_file"
_Said = tuple[Any, str]


class Native:
    """DeepSpeed's own JSON: `take` hands out a value and takes it away; `rest` is what has no name of ours."""

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
        """What was not taken, without sections that are empty now."""
        return _without_empty(self._values)


def _without_auto(values: Mapping[str, Any]) -> dict[str, Any]:
    """`auto` is accelerate's word for "not said here"; DeepSpeed does not know it."""
    items = ((key, _without_auto(item) if isinstance(item, Mapping) else item) for key, item in values.items())
    return {key: item for key, item in items if item != "auto"}


def _without_empty(values: Mapping[str, Any]) -> dict[str, Any]:
    items = ((key, _without_empty(item) if isinstance(item, Mapping) else item) for key, item in values.items())
    return {key: item for key, item in items if item != {}}


def translate_deepspeed(found: Translation, native: Native) -> None:
    """Lay stage, offload and what is left of the JSON; compare accumulation, clipping and batches with the config's."""
    stage, key = _said(found, native, "zero_stage", "zero_optimization.stage")
    # Nothing said is accelerate's 2; in a JSON it is DeepSpeed's 0.
    stage = stage if stage is not None else 2 if found.settings.native is None else 0
    if stage in (1, 2, 3):
        found.put("strategy.deepspeed.stage", stage, key)
    else:
        do = "write distributed_type: MULTI_GPU for ddp, or stage 1, 2 or 3"
        found.refuse(key, "which is ZeRO stage 0: it cuts nothing" if stage == 0 else "no stage of ZeRO", do)
    _offload(found, native, "optimizer", "strategy.deepspeed.offload")
    _offload(found, native, "param", "strategy.deepspeed.offload_parameters")
    _accumulation(found, *_said(found, native, "gradient_accumulation_steps", "gradient_accumulation_steps"))
    _clipping(found, *_said(found, native, "gradient_clipping", "gradient_clipping"))
    _batches(found, native)
    native.take("steps_per_print")  # DeepSpeed's own lines: it is told to be silent
    if native.rest():
        found.put("strategy.deepspeed.native", native.rest(), _FILE)


def _said(found: Translation, native: Native, name: str, path: str) -> _Said:
    """A value and the key that says it: accelerate's, or that of the JSON's file. Refused where they differ."""
    key, inner = f"deepspeed_config.{name}", native.take(path)
    value = None if found.said(key) in ("auto", "none") else found.said(key)
    if value is None:
        return (None if inner == "none" else inner), (key if inner is None else _FILE)
    if inner not in (None, value):
        found.refuse(key, f"where {found.said(_FILE)} has {path}: {shown(inner)}", "take one of them out")
    return value, key


def _offload(found: Translation, native: Native, what: str, ours: str) -> None:
    inner = f"zero_optimization.offload_{what}"
    device, key = _said(found, native, f"offload_{what}_device", f"{inner}.device")
    path, path_key = _said(found, native, f"offload_{what}_nvme_path", f"{inner}.nvme_path")
    found.put(ours, device or "none", key)
    if what == "param" and device and found.values.get("strategy.deepspeed.stage", (3, ""))[0] != 3:
        found.refuse(key, "which only stage 3 can do: it alone cuts parameters", "write none, or zero_stage: 3")
    stated = found.config.strategy.deepspeed.nvme_path
    if device != "nvme":
        return
    if path_key == _FILE:
        found.put("strategy.deepspeed.nvme_path", path, path_key)
    elif stated is None:
        do = "set strategy.deepspeed.nvme_path in the config"
        found.refuse(key, "and `accelerate launch` hands no path on to its processes", do)
    elif path not in (None, stated):
        do = "let the two say the same"
        found.refuse(path_key, f"where strategy.deepspeed.nvme_path is {stated!r}", do)


def _accumulation(found: Translation, steps: Any, key: str) -> None:
    """accelerate's accumulation is a number; ours follows from global batch, micro-batch and ranks. Both must agree."""
    if steps is None:
        return
    data, world = found.config.data, found.settings.world_size
    batch, micro = (data.global_batch, data.micro_batch) if data is not None else (None, None)
    do = "take it out: it follows from data.global_batch, data.micro_batch and the number of ranks"
    if not isinstance(batch, int) or not isinstance(micro, int | None):
        found.refuse(key, "and the config's batches are no numbers of samples to compare it with", do)
    elif world is not None:
        tensor = found.values.get("mesh.tensor", (found.config.mesh.tensor, ""))[0]
        ranks = max(1, world // max(1, tensor))
        size = min(micro or ceil(batch / ranks), batch)
        ours = ceil(ceil(batch / size) / ranks)
        if steps != ours:
            why = f"where data.global_batch={batch} in micro-batches of {size} over {ranks} rank(s) takes {ours}"
            found.refuse(key, why, do)


def _clipping(found: Translation, norm: Any, key: str) -> None:
    if norm is None:
        return
    if found.config.optim is None:
        found.refuse(key, "and the config has no section optim", "add optim.clip_norm, or take it out")
    elif isinstance(found.config.optim, tuple):
        if float(norm) != (found.config.clip_norm or 0.0):
            stated = shown(found.config.clip_norm)
            found.refuse(
                key, f"where the list under optim has clip_norm={stated}", "say one number in both, or here none"
            )
    else:
        found.put("optim.clip_norm", float(norm), key, *([None] if norm == 0 else []))


def _batches(found: Translation, native: Native) -> None:
    """Batch sizes of DeepSpeed's own JSON: ours, or refused."""
    data = found.config.data
    for path, ours in (("train_batch_size", "global_batch"), ("train_micro_batch_size_per_gpu", "micro_batch")):
        size = native.take(path)
        stated = getattr(data, ours, None)
        if size is not None and size != stated:
            why = f"with {path}: {shown(size)}, where data.{ours} is {shown(stated)}"
            found.refuse(_FILE, why, 'write "auto" there: the config says it')
