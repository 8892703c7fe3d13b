"""Implements `disttrain ckpt ls`, which lists the checkpoints of a run and everything else in their folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from disttrain.checkpoint import storage_of
from disttrain.cli.ckpt.find import Listing, statuses
from disttrain.cli.ckpt.formatting import size_text, table, writer_fields, writer_text


def list_checkpoints(listing: Listing) -> dict[str, Any]:
    """Return the facts of each checkpoint by its manifest and file sizes, and the other names in the folder. Local."""
    rows = [
        {
            "name": one.path.name,
            "path": str(one.path),
            "step": one.step,
            "when": one.when,
            "bytes": storage_of(one.path).bytes_at(one.path),
            "tensors": len(one.manifest.tensors) if one.manifest else None,
            **writer_fields(one.manifest),
            "intact": not one.faults,
            "faults": list(one.faults),
            "strays": one.strays,
        }
        for one in statuses(listing)
    ]
    others = [
        {"name": other.name, "what": what, "bytes": storage_of(other).bytes_at(other)}
        for other, what in listing.others
        if storage_of(other).taken(other)
    ]
    return {"path": str(listing.path), "checkpoints": rows, "others": others}


def render_list(listed: Mapping[str, Any]) -> str:
    """Return a table of the checkpoints, followed by their faults and the other names in the folder. Pure."""
    head = ("step", "when (UTC)", "size", "tensors", "written by", "intact")
    rows = [
        (
            str(one["step"]),
            (one["when"] or "-").removesuffix("+00:00").replace("T", " "),
            size_text(one["bytes"]),
            str(one["tensors"] if one["tensors"] is not None else "-"),
            writer_text(one),
            "yes" if one["intact"] else "NO",
        )
        for one in listed["checkpoints"]
    ]
    lines = table(head, rows)
    for one in listed["checkpoints"]:
        lines += [f"{one['name']}: {fault}" for fault in one["faults"]]
        lines += [f"{one['name']}: stray file {name}" for name in one["strays"]]
    lines += [f"{other['name']} ({size_text(other['bytes'])}): {other['what']}" for other in listed["others"]]
    return "\n".join(lines)
