"""Implements `disttrain ckpt inspect`, which shows the progress, optimizers and tensors of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from disttrain.checkpoint import TensorInfo
from disttrain.cli.ckpt.find import CheckpointStatus, select_names
from disttrain.cli.ckpt.formatting import (
    mapping_or_empty,
    shape_text,
    short_text,
    size_text,
    table,
    writer_fields,
    writer_text,
)

_RANK = re.compile(r"rank-(\d+)\.safetensors")


def inspect_checkpoint(one: CheckpointStatus, pattern: str | None) -> dict[str, Any]:
    """Return the contents of the manifest without the config, with the tensors whose names match `pattern`. Local.

    Raises CheckpointError without a usable manifest, and ConfigError if no name matches.
    """
    manifest = one.required()
    document = manifest.document
    tensors = {name: _tensor(manifest.tensors[name]) for name in select_names(manifest.tensors, pattern)}
    return {
        "path": str(one.path),
        "step": manifest.step,
        "when": one.when,
        **writer_fields(manifest),
        "torch": manifest.writer.get("torch"),
        "intact": not one.faults,
        "faults": list(one.faults),
        "strays": one.strays,
        "files": {name: info.size for name, info in manifest.files.items()},
        "progress": mapping_or_empty(document.get("progress")),
        "optim": mapping_or_empty(document.get("optim")),
        "user": mapping_or_empty(document.get("user")),
        "evaluation": mapping_or_empty(document.get("evaluation")),
        "left_out": sorted(mapping_or_empty(document.get("base"))),
        "tensors": tensors,
        "tensors_in_all": len(manifest.tensors),
        "bytes": sum(tensor["bytes"] for tensor in tensors.values()),
    }


def _tensor(info: TensorInfo) -> dict[str, Any]:
    item = info.dtype.itemsize
    boxes = [
        {
            "offsets": list(stored.box.offsets),
            "sizes": list(stored.box.sizes),
            "file": stored.file,
            "rank": int(match.group(1)) if (match := _RANK.fullmatch(stored.file)) else None,
            "bytes": stored.box.numel * item,
        }
        for stored in info.boxes
    ]
    dtype = str(info.dtype).removeprefix("torch.")
    return {"shape": list(info.shape), "dtype": dtype, "bytes": sum(box["bytes"] for box in boxes), "boxes": boxes}


def render_inspection(inspected: Mapping[str, Any], *, boxes: bool) -> str:
    """Return the progress of the run and a line per tensor. `boxes` adds a line per box. Pure."""
    lines = [f"{inspected['path']}: step {inspected['step']}, saved {inspected['when']} by {writer_text(inspected)}"]
    lines += [f"torch {inspected['torch']}"] if inspected["torch"] else []
    lines += [f"damaged: {fault}" for fault in inspected["faults"]]
    lines += [f"stray file {name}" for name in inspected["strays"]]
    for key, value in inspected["progress"].items():
        lines.append(f"{key}: {short_text(value)}")
    lines += [line for name, one in inspected["optim"].items() for line in _optimizer_lines(name, one)]
    lines += [f"state of {name}" for name in inspected["user"]]
    lines += [f"{name}: {short_text(value)}" for name, value in inspected["evaluation"].items()]
    if inspected["left_out"]:
        lines.append(f"{len(inspected['left_out'])} frozen tensors are not stored, only their checksums")
    lines.append("")
    lines += table(
        ("tensor", "shape", "dtype", "size", "boxes", "stored by"),
        [_tensor_row(name, one) for name, one in inspected["tensors"].items()],
        below=[_box_lines(one) if boxes else [] for one in inspected["tensors"].values()],
    )
    shown, every = len(inspected["tensors"]), inspected["tensors_in_all"]
    counted = f"{shown} tensors" if shown == every else f"{shown} of {every} tensors"
    return "\n".join([*lines, "", f"{counted}, {size_text(inspected['bytes'])}"])


def _optimizer_lines(name: str, value: Any) -> Iterator[str]:
    one = mapping_or_empty(value)
    groups = one.get("groups") or []
    kind = one.get("optimizer")
    kinds = ", ".join(kind) if isinstance(kind, list) else kind or "no optimizer"
    yield f"{name}: {kinds}, {one.get('updates')} updates"
    for number, group in enumerate(groups):
        settings = ", ".join(f"{key} {short_text(value)}" for key, value in group.items() if key != "members")
        yield f"  group {number}: {len(group.get('members') or ())} tensors; {settings}"


def _tensor_row(name: str, one: Mapping[str, Any]) -> tuple[str, ...]:
    size, boxes = size_text(one["bytes"]), one["boxes"]
    return (name, shape_text(one["shape"]), one["dtype"], size, str(len(boxes)), _ranks_text(boxes))


def _box_lines(one: Mapping[str, Any]) -> list[str]:
    lines = []
    for box in one["boxes"]:
        spans = zip(box["offsets"], box["sizes"], strict=True)
        ranges = ",".join(f"{offset}:{offset + size}" for offset, size in spans)
        lines.append(f"    [{ranges}] {size_text(box['bytes'])} in {box['file']}")
    return lines


def _ranks_text(boxes: Sequence[Mapping[str, Any]]) -> str:
    """Return the ranks whose files store the boxes, such as `rank 3` or `ranks 0-3, 7`.

    A file whose name has no rank is listed by its name.
    """
    ranks = sorted({box["rank"] for box in boxes if box["rank"] is not None})
    names = sorted({box["file"] for box in boxes if box["rank"] is None})
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    shown = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return ", ".join([*([f"rank{'s' if len(ranks) > 1 else ''} {shown}"] if ranks else []), *names]) or "-"
