"""Implements `disttrain ckpt verify`, which reads every byte of checkpoints and reports every fault."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from disttrain.checkpoint import storage_of
from disttrain.cli.ckpt.find import CheckpointStatus, Listing, statuses
from disttrain.cli.ckpt.formatting import size_text


def verify_all(listing: Listing) -> Iterator[dict[str, Any]]:
    """Yield a verdict on each checkpoint after it is read. Skip checkpoints that a run removes meanwhile. Local."""
    for one in statuses(listing):
        verdict = verify_checkpoint(one)
        if verdict["intact"] or storage_of(one.path).taken(one.path):
            yield verdict


def verify_checkpoint(one: CheckpointStatus) -> dict[str, Any]:
    """Return every fault of the manifest, the file sizes and the content. Reads all bytes, one chunk at a time."""
    faults = [*one.faults, *one.content_faults()]
    return {
        "name": one.path.name,
        "path": str(one.path),
        "step": one.step,
        "intact": not faults,
        "faults": faults,
        "strays": one.strays,
        "tensors": len(one.manifest.tensors) if one.manifest else None,
        "bytes": sum(info.size for info in one.manifest.files.values()) if one.manifest else None,
    }


def render_verdict(verdict: Mapping[str, Any]) -> str:
    """Return the lines of one checkpoint. Pure."""
    if verdict["intact"]:
        lines = [f"{verdict['name']}: intact, {verdict['tensors']} tensors, {size_text(verdict['bytes'])} read"]
    else:
        lines = [f"{verdict['name']}: DAMAGED", *(f"  {fault}" for fault in verdict["faults"])]
    return "\n".join([*lines, *(f"  stray file {name}" for name in verdict["strays"])])
