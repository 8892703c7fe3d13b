"""`disttrain ckpt ls`, `inspect` and `verify`: what is found as one JSON object, and that object as text."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from disttrain.checkpoint import Manifest, TensorInfo, storage_of
from disttrain.cli.ckpt.survey import Listing, Survey, surveys
from disttrain.errors import ConfigError, explain

_RANK = re.compile(r"rank-(\d+)\.safetensors")


# ---------------------------------------------------------------------- ls


def describe_all(listing: Listing) -> dict[str, Any]:
    """Every checkpoint by manifest and sizes, and what else lies beside them. Local."""
    rows = [
        {
            "name": one.path.name,
            "path": str(one.path),
            "step": one.step,
            "when": one.when,
            "bytes": storage_of(one.path).bytes_at(one.path),
            "tensors": len(one.manifest.tensors) if one.manifest else None,
            **_writer(one.manifest),
            "whole": not one.faults,
            "faults": list(one.faults),
            "strays": one.strays,
        }
        for one in surveys(listing)
    ]
    others = [
        {"name": one.name, "what": what, "bytes": storage_of(one).bytes_at(one)}
        for one, what in listing.others
        if storage_of(one).taken(one)
    ]
    return {"path": str(listing.path), "checkpoints": rows, "others": others}


def render_list(found: Mapping[str, Any]) -> str:
    """A table, and below it what keeps one from being whole, and what is none. Pure."""
    head = ("step", "when (UTC)", "size", "tensors", "written by", "whole")
    rows = [
        (
            str(one["step"]),
            (one["when"] or "-").removesuffix("+00:00").replace("T", " "),
            size_text(one["bytes"]),
            str(one["tensors"] if one["tensors"] is not None else "-"),
            _writer_text(one),
            "yes" if one["whole"] else "NO",
        )
        for one in found["checkpoints"]
    ]
    lines = table(head, rows)
    for one in found["checkpoints"]:
        lines += [f"{one['name']}: {fault}" for fault in one["faults"]]
        lines += [f"{one['name']}: stray file {name}" for name in one["strays"]]
    lines += [f"{one['name']} ({size_text(one['bytes'])}): {one['what']}" for one in found["others"]]
    return "\n".join(lines)


# ---------------------------------------------------------------------- inspect


def inspect_checkpoint(one: Survey, pattern: str | None) -> dict[str, Any]:
    """All that the manifest says but for the config; of the tensors, those whose name fits the pattern. Local."""
    manifest = one.required()
    document = manifest.document
    tensors = {name: _tensor(manifest.tensors[name]) for name in named(manifest.tensors, pattern)}
    return {
        "path": str(one.path),
        "step": manifest.step,
        "when": one.when,
        **_writer(manifest),
        "torch": manifest.writer.get("torch"),
        "whole": not one.faults,
        "faults": list(one.faults),
        "strays": one.strays,
        "files": {name: info.size for name, info in manifest.files.items()},
        "progress": _object(document.get("progress")),
        "optim": _object(document.get("optim")),
        "user": _object(document.get("user")),
        "evaluation": _object(document.get("evaluation")),
        "left_out": sorted(_object(document.get("base"))),
        "tensors": tensors,
        "tensors_in_all": len(manifest.tensors),
        "bytes": sum(tensor["bytes"] for tensor in tensors.values()),
    }


def named(names: Collection[str], pattern: str | None) -> list[str]:
    """Those that fit a pattern in the shell's manner; all without one. ConfigError if none fits. Pure."""
    found = [name for name in names if pattern is None or fnmatchcase(name, pattern)]
    if pattern is not None and not found:
        do = "write it as the shell does, in quotes: --name '*.bias'; ckpt inspect shows all names"
        raise ConfigError(explain(f"--name {pattern} is to pick tensors.", f"none of {len(names)} names fits", do))
    return found


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


def render_inspection(found: Mapping[str, Any], *, boxes: bool) -> str:
    """Where the run stood, then a line a tensor; with `boxes` a line for each box below it. Pure."""
    lines = [f"{found['path']}: step {found['step']}, saved {found['when']} by {_writer_text(found)}"]
    lines += [f"torch {found['torch']}"] if found["torch"] else []
    lines += [f"not whole: {fault}" for fault in found["faults"]]
    lines += [f"stray file {name}" for name in found["strays"]]
    for key, value in found["progress"].items():
        lines.append(f"{key}: {_short(value)}")
    lines += [line for name, one in found["optim"].items() for line in _optimizer_lines(name, one)]
    lines += [f"state of {name}" for name in found["user"]]
    lines += [f"{name}: {_short(value)}" for name, value in found["evaluation"].items()]
    if found["left_out"]:
        lines.append(f"{len(found['left_out'])} frozen tensors are not in it, only their checksums")
    lines.append("")
    lines += table(
        ("tensor", "shape", "dtype", "size", "boxes", "in"),
        [_tensor_row(name, one) for name, one in found["tensors"].items()],
        below=[_box_lines(one) if boxes else [] for one in found["tensors"].values()],
    )
    shown, every = len(found["tensors"]), found["tensors_in_all"]
    counted = f"{shown} tensors" if shown == every else f"{shown} of {every} tensors"
    return "\n".join([*lines, "", f"{counted}, {size_text(found['bytes'])}"])


def _optimizer_lines(name: str, value: Any) -> Iterator[str]:
    one = _object(value)
    groups = one.get("groups") or []
    kind = one.get("optimizer")
    told = ", ".join(kind) if isinstance(kind, list) else kind or "no optimizer"
    yield f"{name}: {told}, {one.get('updates')} updates"
    for number, group in enumerate(groups):
        settings = ", ".join(f"{key} {_short(value)}" for key, value in group.items() if key != "members")
        yield f"  group {number}: {len(group.get('members') or ())} tensors; {settings}"


def _tensor_row(name: str, one: Mapping[str, Any]) -> tuple[str, ...]:
    shape = "x".join(map(str, one["shape"])) or "scalar"
    return (name, shape, one["dtype"], size_text(one["bytes"]), str(len(one["boxes"])), _holders(one["boxes"]))


def _box_lines(one: Mapping[str, Any]) -> list[str]:
    lines = []
    for box in one["boxes"]:
        spans = zip(box["offsets"], box["sizes"], strict=True)
        place = ",".join(f"{offset}:{offset + size}" for offset, size in spans)
        lines.append(f"    [{place}] {size_text(box['bytes'])} in {box['file']}")
    return lines


# ---------------------------------------------------------------------- verify


def verify_all(listing: Listing) -> Iterator[dict[str, Any]]:
    """A verdict on each checkpoint as it is read; none on those that a run removes meanwhile. Local."""
    for one in surveys(listing):
        found = verify_checkpoint(one)
        if found["whole"] or storage_of(one.path).taken(one.path):
            yield found


def verify_checkpoint(one: Survey) -> dict[str, Any]:
    """One checkpoint with every fault of manifest, sizes and content. Reads all its bytes, a chunk at a time."""
    faults = [*one.faults, *one.content_faults()]
    return {
        "name": one.path.name,
        "path": str(one.path),
        "step": one.step,
        "whole": not faults,
        "faults": faults,
        "strays": one.strays,
        "tensors": len(one.manifest.tensors) if one.manifest else None,
        "bytes": sum(info.size for info in one.manifest.files.values()) if one.manifest else None,
    }


def render_verdict(found: Mapping[str, Any]) -> str:
    """One checkpoint's lines. Pure."""
    if found["whole"]:
        lines = [f"{found['name']}: whole, {found['tensors']} tensors, {size_text(found['bytes'])} read"]
    else:
        lines = [f"{found['name']}: DAMAGED", *(f"  {fault}" for fault in found["faults"])]
    return "\n".join([*lines, *(f"  stray file {name}" for name in found["strays"])])


# ---------------------------------------------------------------------- text


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], below: Sequence[Sequence[str]] | None = None
) -> list[str]:
    """Lines of aligned columns; `below` are lines to follow each row. Pure."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = []
    for row, after in zip([head, *rows], [[], *(below or [[] for _ in rows])], strict=True):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines += ["  ".join(cells).rstrip(), *after]
    return lines


def size_text(size: int) -> str:
    """Bytes for people: `17 B`, `3.2 MiB`. Pure."""
    value, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{size} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def _writer(manifest: Manifest | None) -> dict[str, Any]:
    """Who wrote it; None where it does not say."""
    written = _object(manifest.document.get("writer") if manifest else None)
    ranks = manifest.writer.get("ranks") if manifest else None
    return {"strategy": written.get("strategy"), "mesh": written.get("mesh"), "ranks": ranks}


def _object(value: Any) -> dict[str, Any]:
    """A part of the document, which any engine may have written; empty where it is of another kind than ours."""
    return value if isinstance(value, dict) else {}


def _writer_text(one: Mapping[str, Any]) -> str:
    sizes = [f"{axis} {size}" for axis, size in _object(one["mesh"]).items() if size != 1]
    ranks = None if one["ranks"] is None else f"{one['ranks']} rank{'' if one['ranks'] == 1 else 's'}"
    return ", ".join(filter(None, [one["strategy"], ranks, *sizes])) or "-"


def _holders(boxes: Sequence[Mapping[str, Any]]) -> str:
    """In whose files they lie: `rank 3`, `ranks 0-3, 7`; the files' names where these say no rank."""
    ranks = sorted({box["rank"] for box in boxes if box["rank"] is not None})
    names = sorted({box["file"] for box in boxes if box["rank"] is None})
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    told = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return ", ".join([*([f"rank{'s' if len(ranks) > 1 else ''} {told}"] if ranks else []), *names]) or "-"


def _short(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
