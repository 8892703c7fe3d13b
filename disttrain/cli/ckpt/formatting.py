"""Formats tables, sizes and manifest values for the output of `disttrain ckpt`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from disttrain.checkpoint import Manifest


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], below: Sequence[Sequence[str]] | None = None
) -> list[str]:
    """Return lines of aligned columns. `below` has the lines that follow each row. Pure."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = []
    for row, after in zip([head, *rows], [[], *(below or [[] for _ in rows])], strict=True):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines += ["  ".join(cells).rstrip(), *after]
    return lines


def size_text(size: int) -> str:
    """Return a size in readable form, such as `17 B` or `3.2 MiB`. Pure."""
    value, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{size} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def shape_text(shape: Sequence[int]) -> str:
    """Return a shape such as `13x7`, or `scalar`. Pure."""
    return "x".join(map(str, shape)) or "scalar"


def short_text(value: Any) -> str:
    """Return a value as at most 100 characters. Pure."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def mapping_or_empty(value: Any) -> dict[str, Any]:
    """Return a part of a checkpoint's document, or an empty mapping if another program wrote another type. Pure."""
    return value if isinstance(value, dict) else {}


def writer_fields(manifest: Manifest | None) -> dict[str, Any]:
    """Return the strategy, mesh and number of ranks that wrote a checkpoint. None for values that are not stored."""
    writer = mapping_or_empty(manifest.document.get("writer") if manifest else None)
    ranks = manifest.writer.get("ranks") if manifest else None
    return {"strategy": writer.get("strategy"), "mesh": writer.get("mesh"), "ranks": ranks}


def writer_text(fields: Mapping[str, Any]) -> str:
    """Return the fields of `writer_fields` as text, such as `fsdp, 2 ranks, shard 2`. Pure."""
    sizes = [f"{axis} {size}" for axis, size in mapping_or_empty(fields["mesh"]).items() if size != 1]
    ranks = None if fields["ranks"] is None else f"{fields['ranks']} rank{'' if fields['ranks'] == 1 else 's'}"
    return ", ".join(filter(None, [fields["strategy"], ranks, *sizes])) or "-"
