"""Reads DeepSpeed checkpoints of ZeRO stages 1, 2 and 3: float32 master weights and optimizer state in flat partitions.

Each rank's `*_optim_states.pt` holds one flat partition per parameter group, of the master weights and of each kind of
optimizer state. Stages 1 and 2 concatenate the parameters of a group and cut the result. Each file states where its
parameters are in the partition (`param_slice_mappings`). Stage 3 cuts every parameter into equal, padded ranges and
concatenates them in each rank's flat tensors. (Layout: deepspeed 0.19, runtime/zero/stage_1_and_2.py, stage3.py and
utils/zero_to_fp32.py.)

This module does not import deepspeed. A restricted loader reads the files. In addition to tensors and plain values, it
knows the names in ALLOWED. Model parallelism, pipeline parallelism, experts and other layouts are rejected.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disttrain.checkpoint.form.boxes import flat_range_to_boxes
from disttrain.checkpoint.form.shards import Shard, full_shard
from disttrain.checkpoint.formats.foreign_state import ForeignState, optimizer_shard
from disttrain.checkpoint.formats.restricted_pickle import load_torch_file, reject_corrupt_zip, stand_in_class
from disttrain.errors import CheckpointError, explain

KIND = "a DeepSpeed checkpoint"

ALLOWED: dict[str, Any] = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
    **{
        f"deepspeed.{where}.{name}": stand_in_class(name)
        for where, name in (
            ("utils.tensor_fragment", "fragment_address"),
            ("runtime.fp16.loss_scaler", "LossScaler"),
            ("runtime.fp16.loss_scaler", "DynamicLossScaler"),
        )
    },
}
"""Names that a DeepSpeed file may use beyond tensors and plain values. Each becomes a number or plain fields."""

_OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_TAG = re.compile(r"[^/\0]{1,250}")


def looks_like(names: Sequence[str]) -> bool:
    """Return whether a folder with these names is a DeepSpeed checkpoint, or contains checkpoints by tag. Pure."""
    return "latest" in names or any(_OPTIMIZER_FILE.fullmatch(name) or _MODEL_FILE.fullmatch(name) for name in names)


def read_deepspeed(path: Path, owner: str) -> ForeignState:
    """Read the state of the checkpoint in `path`, or of the newest one that its `latest` names. Local.

    Raises CheckpointError.
    """
    folder = _tagged(path)
    try:
        return _read(folder, owner)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, OSError, RuntimeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise _unreadable(
            folder, problem, "the file is damaged or has an unknown version (0.19 is known): save the checkpoint again"
        ) from error


@dataclass(frozen=True)
class _FlatSlice:
    """Where a part of a flat parameter is stored.

    Elements `start` to `start + count` of the parameter begin at element `offset` of flat tensor `group` of `rank`.
    """

    rank: int
    group: int
    offset: int
    start: int
    count: int


def _read(folder: Path, owner: str) -> ForeignState:
    models, optimizers = _files(folder)
    for file in (*models, *optimizers):
        reject_corrupt_zip(file)
    first = load_torch_file(models[0], ALLOWED)
    held = [load_torch_file(file, ALLOWED)["optimizer_state_dict"] for file in optimizers]
    stage = int(held[0]["zero_stage"])
    _reject_other_counts(folder, held, len(optimizers))
    shapes: list[dict[str, torch.Size]] = [dict(group) for group in first["param_shapes"]]
    if stage == 3:
        masters = [list(one["fp32_flat_groups"]) for one in held]
        ranges = _equal_ranges(folder, shapes, masters)
        bases = [one["optimizer_state_dict"] for one in held]
    else:
        masters = [list(one["single_partition_of_fp32_groups"]) for one in held]
        ranges = _sliced_ranges(folder, shapes, [one["param_slice_mappings"] for one in held])
        bases = [one["base_optimizer_state"] for one in held]
    if not all(isinstance(base, Mapping) for base in bases):
        fix = "load it with DeepSpeed and save it again with elastic_checkpoint false"
        raise _unreadable(folder, "optimizer state of an elastic_checkpoint", fix)
    states = [[_state_of(base, group) for group in range(len(masters[0]))] for base in bases]
    shape_of = {name: tuple(shape) for group in shapes for name, shape in group.items()}
    shards: list[Shard] = []
    for name, own in ranges.items():
        shards += _cut(f"model/{owner}/{name}", shape_of[name], own, masters)
        shards += _optimizer_state(f"optim/{owner}/{name}", shape_of[name], own, states)
    rest, ties, left_out = _untrained(folder, owner, models, first, stage, set(ranges))
    state = ForeignState(
        folder,
        KIND,
        (*shards, *rest),
        int(first.get("global_steps") or 0),
        int(first.get("global_samples") or 0),
        ties,
        (*left_out, *(f"{key} of the run" for key in ("lr_scheduler", "data_sampler") if first.get(key) is not None)),
    )
    state.reject_incomplete()
    return state


def _tagged(path: Path) -> Path:
    latest = path / "latest"
    if not latest.is_file():
        return path
    tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    if not _TAG.fullmatch(tag) or tag in (".", "..") or not (path / tag).is_dir():
        raise _unreadable(
            path, f"`latest` names {tag[:100]!r}, which is not a folder in it", "name the folder of one step"
        )
    return path / tag


def _files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the files of the model's state and of each rank's optimizer state, in rank order."""
    models: dict[int, Path] = {}
    optimizers: dict[int, Path] = {}
    for file in sorted(folder.iterdir()):
        if re.match(r"layer_\d+|expert_|zero$", file.name):
            problem = f"{file.name}: pipeline stages, experts or a universal checkpoint"
            raise _unreadable(folder, problem, "gather the weights with DeepSpeed's tool, then convert them")
        for pattern, into in ((_MODEL_FILE, models), (_OPTIMIZER_FILE, optimizers)):
            match = pattern.fullmatch(file.name)
            if match and int(match[2]):
                raise _unreadable(
                    folder, f"{file.name}: model parallelism, whose parts depend on the model", "merge the parts first"
                )
            if match:
                into[int(match[1] or 0)] = file
    if not models or not optimizers:
        problem = f"{len(models)} file(s) of the model's state, {len(optimizers)} of the optimizer's"
        raise _unreadable(folder, problem, "use a complete checkpoint of ZeRO stage 1, 2 or 3")
    if sorted(optimizers) != list(range(len(optimizers))):
        raise _unreadable(
            folder, f"optimizer state of ranks {', '.join(map(str, sorted(optimizers)))} only", "use all files"
        )
    return [models[rank] for rank in sorted(models)], [optimizers[rank] for rank in sorted(optimizers)]


def _reject_other_counts(folder: Path, held: Sequence[Mapping[str, Any]], files: int) -> None:
    counts = held[0]["partition_count"]
    for count in counts if isinstance(counts, list) else [counts]:
        if count != files:
            problem = f"{files} files of optimizer state, written by {count} ranks"
            raise _unreadable(
                folder,
                problem,
                "use all files of one save; partitions over fewer ranks than the world are not supported",
            )


def _sliced_ranges(
    folder: Path, shapes: Sequence[Mapping[str, torch.Size]], mappings: Sequence[Sequence[Mapping[str, Any]]]
) -> dict[str, list[_FlatSlice]]:
    """Stages 1 and 2: each rank's file lists its slices.

    A parameter continues where the slice of the previous rank ended.
    """
    ranges: dict[str, list[_FlatSlice]] = {name: [] for group in shapes for name in group}
    for rank, groups in enumerate(mappings):
        for group, slices in enumerate(groups):
            for name, piece in slices.items():
                start = sum(one.count for one in ranges[name])
                ranges[name].append(_FlatSlice(rank, group, int(piece.start), start, int(piece.numel)))
    for group_shapes in shapes:
        for name, shape in group_shapes.items():
            held = sum(one.count for one in ranges[name])
            if held != shape.numel():
                raise _unreadable(
                    folder, f"{held} of the {shape.numel()} elements of {name}", "use all files of one save"
                )
    return ranges


def _equal_ranges(
    folder: Path, shapes: Sequence[Mapping[str, torch.Size]], masters: Sequence[Sequence[Tensor]]
) -> dict[str, list[_FlatSlice]]:
    """Stage 3: every parameter has as many equal parts as ranks, the last one padded, in the order of the groups."""
    ranges: dict[str, list[_FlatSlice]] = {}
    ranks, group, offset = len(masters), 0, 0
    for name, shape in ((name, shape) for own in shapes for name, shape in own.items()):
        part = -(-shape.numel() // ranks)
        while offset == masters[0][group].numel() and part:
            group, offset = group + 1, 0
        if offset + part > masters[0][group].numel():
            raise _unreadable(
                folder, f"{name} does not end where its flat partition does", "write it with deepspeed 0.19"
            )
        ranges[name] = [
            _FlatSlice(rank, group, offset, start, min(part, shape.numel() - start))
            for rank in range(ranks)
            if (start := rank * part) < shape.numel()
        ]
        offset += part
    return ranges


def _cut(
    full: str, shape: tuple[int, ...], ranges: Sequence[_FlatSlice], flats: Sequence[Sequence[Tensor | None]]
) -> Iterator[Shard]:
    """Yield views of the flat tensors `flats[rank][group]`, as boxes. A tensor without elements is yielded itself."""
    if not ranges:
        yield full_shard(full, torch.empty(shape))
    for one in ranges:
        flat = flats[one.rank][one.group]
        if flat is None:
            raise ValueError(f"rank {one.rank} has no {full}")
        held, at = flat.narrow(0, one.offset, one.count), 0
        for box in flat_range_to_boxes(shape, one.start, one.start + one.count):
            yield Shard(full, shape, box, held.narrow(0, at, box.numel).view(box.sizes))
            at += box.numel


def _optimizer_state(
    full: str, shape: tuple[int, ...], ranges: Sequence[_FlatSlice], states: Sequence[Sequence[Mapping[str, Any]]]
) -> Iterator[Shard]:
    """Yield optimizer state as shards. `states[rank][group]` is the state of one flat partition.

    State with the length of the flat master weights, or padded beyond it, is cut as they are. 0-d state is the same on
    all ranks.
    """
    if not ranges:
        return
    for key, value in states[ranges[0].rank][ranges[0].group].items():
        if isinstance(value, Tensor) and value.dim() == 1:
            flats = [[one.get(key) for one in groups] for groups in states]
            yield from _cut(f"{full}:{key}", shape, ranges, flats)
        elif isinstance(value, Tensor) and value.dim():
            raise ValueError(f"{full}:{key} has shape {tuple(value.shape)}, which is not the shape of a flat partition")
        elif isinstance(value, Tensor | bool | int | float):
            number = "" if isinstance(value, Tensor) or key == "step" else ":number"
            yield optimizer_shard(f"{full}:{key}{number}", value)
        elif value is not None:
            raise ValueError(f"{full}:{key} is a {type(value).__name__}")


def _state_of(base: Mapping[str, Any], group: int) -> dict[str, Any]:
    """Return the base optimizer's state of one flat partition.

    Fused optimizers store `step` with the settings of the group.
    """
    found = dict(base["state"].get(group) or {})
    end = 0
    for settings in base["param_groups"]:
        end += len(settings["params"])
        if group < end:
            if "step" in settings and found and "step" not in found:
                found["step"] = settings["step"]
            return found
    return found


def _untrained(
    folder: Path, owner: str, models: Sequence[Path], first: Mapping[str, Any], stage: int, trained: set[str]
) -> tuple[list[Shard], dict[str, str], list[str]]:
    """Return frozen parameters and buffers, the names of tied weights, and descriptions of the content left out."""
    shards: list[Shard] = []
    ties: dict[str, str] = {str(other): str(name) for other, name in (first.get("shared_params") or {}).items()}
    frozen: Mapping[str, torch.Size] = (first.get("frozen_param_shapes") or {}) if stage == 3 else {}
    if frozen:
        parts = [load_torch_file(file, ALLOWED)["frozen_param_fragments"] for file in models]
        for name, shape in frozen.items():
            part = parts[0][name].numel()
            ranges = [
                _FlatSlice(rank, 0, 0, start, min(part, shape.numel() - start))
                for rank in range(len(parts))
                if (start := rank * part) < shape.numel()
            ]
            flats = [[own[name].reshape(-1)] for own in parts]
            shards += _cut(f"model/{owner}/{name}", tuple(shape), ranges, flats)
    buffers, lost = set(first["buffer_names"]), []
    for name, tensor in first["module"].items():
        if name in trained or name in frozen or name in ties or not isinstance(tensor, Tensor):
            continue
        if stage == 3 and name not in buffers:
            lost.append(f"{name}, another name of a tied weight (stage 3 does not store which)")
            continue
        shards.append(full_shard(f"model/{owner}/{name}", tensor.detach()))
    return shards, ties, lost


def _unreadable(path: Path, problem: str, fix: str) -> CheckpointError:
    return CheckpointError(explain(f"Cannot read {path} as {KIND}.", problem, fix))
