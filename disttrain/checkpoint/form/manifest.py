"""Encodes and decodes the manifest: the content of a checkpoint, the checksums of its files, and a digest of itself.

The file is one JSON object. Its first key is `digest`, the SHA-256 of all bytes after it. Every later format keeps this
envelope, so that a newer format can be distinguished from a damaged file. Pure: bytes in, a checked value out. Anything
inconsistent raises CheckpointError: names, positions, sizes, boxes that do not tile, and paths outside the folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from disttrain.checkpoint.form.boxes import Box, overlap, tiling_fault
from disttrain.checkpoint.form.grid import Grid
from disttrain.checkpoint.form.shards import name_fault
from disttrain.checkpoint.form.tensor_bytes import dtype_name, dtype_of
from disttrain.errors import CheckpointError, UnreadableError, explain

FORMAT = "disttrain-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
_ENVELOPE = re.compile(rb'\{"digest":"sha256:([0-9a-f]{64})",\n')
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,250}\.safetensors")
_CHUNK_BYTES = range(4096, 2**30 + 1, 64)  # a reader holds one chunk in memory
_BIGGEST = 2**63


@dataclass(frozen=True, slots=True)
class StoredBox:
    """A box and the position of its row-major bytes. `start` is None if the file's header gives it."""

    box: Box
    file: str
    start: int | None = None


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A stored tensor: its global shape and the boxes that tile it, as a `grid` or `listed` one by one."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    listed: tuple[StoredBox, ...] = ()
    grid: Grid | None = None

    @property
    def boxes(self) -> tuple[StoredBox, ...]:
        """All boxes."""
        if self.grid is None:
            return self.listed
        return tuple(StoredBox(box, rank_file(rank)) for box, rank in self.grid.all())

    def overlapping(self, wanted: Box) -> list[StoredBox]:
        """Return the boxes that overlap `wanted`. The other boxes of a grid cost nothing."""
        if self.grid is None:
            return [stored for stored in self.listed if overlap(stored.box, wanted)]
        return [StoredBox(box, rank_file(rank)) for box, rank in self.grid.overlapping(wanted)]


def rank_file(rank: int) -> str:
    """Return the name of the file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file's size in bytes, and the CRC-32 of each chunk of `Manifest.chunk_bytes`. The last may be shorter."""

    size: int
    chunks: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`. `document` is a JSON object of the engine."""

    step: int
    chunk_bytes: int
    tensors: Mapping[str, TensorInfo]
    files: Mapping[str, FileInfo]
    document: Mapping[str, Any]
    writer: Mapping[str, Any] = field(default_factory=dict)


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the bytes of `manifest.json`."""
    tensors = {name: _encode_tensor(info) for name, info in sorted(manifest.tensors.items())}
    files = {name: {"size": info.size, "chunks": info.chunks} for name, info in sorted(manifest.files.items())}
    parts = {
        "format": FORMAT,
        "version": VERSION,
        "step": manifest.step,
        "chunk_bytes": manifest.chunk_bytes,
        "writer": dict(manifest.writer),
        "document": checked_document(manifest.document),
    }
    lines = [f"{_json(key)}:{_json(value)}" for key, value in parts.items()]
    rest = (",\n".join([*lines, _by_line("files", files), _by_line("tensors", tensors)]) + "}\n").encode()
    return b'{"digest":"sha256:' + hashlib.sha256(rest).hexdigest().encode() + b'",\n' + rest


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _by_line(key: str, entries: Mapping[str, Any]) -> str:
    """Write one entry per line, so that people can read and compare manifests."""
    return f'"{key}":{{' + ",".join(f"\n{_json(name)}:{_json(entry)}" for name, entry in entries.items()) + "}"


def _encode_tensor(info: TensorInfo) -> dict[str, Any]:
    head = {"shape": info.shape, "dtype": dtype_name(info.dtype)}
    if info.grid is not None:
        return head | {"steps": info.grid.steps, "first": info.grid.first, "strides": info.grid.strides}
    return head | {"boxes": [[one.box.offsets, one.box.sizes, one.file, one.start] for one in info.listed]}


def checked_document(value: Any, path: str = "document") -> Any:
    """Return `value` with tuples as lists. A CheckpointError names values that JSON does not preserve."""
    if value is None or isinstance(value, bool):
        return value
    for plain in (int, float, str):
        if isinstance(value, plain):
            return plain(value)  # a subclass, such as numpy's float64 or a StrEnum, becomes the plain type
    if isinstance(value, list | tuple):
        return [checked_document(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {str(key): checked_document(item, f"{path}.{key}") for key, item in value.items()}
    found = f"{type(value).__name__} at {path}"
    if isinstance(value, Mapping):
        found = f"keys that are not strings at {path}: {[key for key in value if not isinstance(key, str)][:3]}"
    raise CheckpointError(
        explain(
            "Cannot save the document of a checkpoint.",
            f"{found} is not JSON",
            "save tensors as shards and other values as JSON",
        )
    )


def decode_manifest(raw: bytes, *, where: str) -> Manifest:
    """Decode and check a manifest's bytes. `where` names it in errors."""
    content = _open_envelope(raw, where)
    try:
        manifest = _read(content)
    except (_ContentError, KeyError, TypeError, ValueError, OverflowError) as error:
        problem = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise _invalid(where, problem, "do not use it: the program that wrote it made an invalid checkpoint") from None
    return manifest


def _open_envelope(raw: bytes, where: str) -> dict[str, Any]:
    match = _ENVELOPE.match(raw)
    rest = raw[match.end() :] if match else b""
    intact = match is not None and hashlib.sha256(rest).hexdigest().encode() == match.group(1)
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        content = None
    named = isinstance(content, dict) and content.get("format") == FORMAT
    if not intact:
        problem = "its bytes do not match its digest" if match or named else "a file of another program's format"
        fix = "the file is damaged: use another checkpoint" if match or named else "name a folder that disttrain wrote"
        raise _invalid(where, problem, fix)
    if not named:
        raise _invalid(where, "a file of another program's format", "name a folder that disttrain wrote")
    version = content.get("version")
    if version != VERSION or type(version) is not int:
        problem = f"format version {version!r}; this disttrain reads {VERSION}"
        raise UnreadableError(str(_invalid(where, problem, "upgrade disttrain")))
    return content  # type: ignore[no-any-return]


def _invalid(where: str, problem: str, fix: str) -> CheckpointError:
    return CheckpointError(explain(f"Cannot use {where} as a manifest.", problem, fix))


class _ContentError(Exception):
    pass


def _demand(holds: bool, fault: str) -> None:
    if not holds:
        raise _ContentError(fault)


def _number(value: Any, what: str) -> int:
    _demand(type(value) is int and 0 <= value < _BIGGEST, f"{what} is {str(value)[:60]}")
    return value  # type: ignore[no-any-return]


def _numbers(values: Any, what: str) -> tuple[int, ...]:
    _demand(isinstance(values, list), f"{what} is not a list")
    return tuple(_number(value, what) for value in values)


def _mapping(value: Any, what: str) -> dict[str, Any]:
    _demand(isinstance(value, dict), f"{what} is not an object")
    return value  # type: ignore[no-any-return]


def _read(content: dict[str, Any]) -> Manifest:
    chunk_bytes = _number(content["chunk_bytes"], "chunk_bytes")
    _demand(chunk_bytes in _CHUNK_BYTES, f"chunk_bytes is {chunk_bytes}")
    files = {name: _read_file(name, entry, chunk_bytes) for name, entry in _mapping(content["files"], "files").items()}
    read = _TensorReader(files)
    tensors = {name: read(name, item) for name, item in _mapping(content["tensors"], "tensors").items()}
    _reject_shared_bytes(tensors)
    return Manifest(
        step=_number(content["step"], "step"),
        chunk_bytes=chunk_bytes,
        tensors=tensors,
        files=files,
        document=_mapping(content["document"], "document"),
        writer=_mapping(content["writer"], "writer"),
    )


def _read_file(name: str, entry: Any, chunk_bytes: int) -> FileInfo:
    _demand(
        _FILE_NAME.fullmatch(name) is not None, f"a file named {name[:100]!r}, which is not a plain name in this folder"
    )
    size = _number(entry["size"], f"size of {name}")
    chunks = _numbers(entry["chunks"], f"checksums of {name}")
    _demand(len(chunks) == -(-size // chunk_bytes), f"{len(chunks)} checksums for the {size} bytes of {name}")
    return FileInfo(size, chunks)


class _TensorReader:
    """Reads tensor entries and checks them against the files. A pattern that many tensors share is checked once."""

    def __init__(self, files: Mapping[str, FileInfo]) -> None:
        self._files = files
        self._seen: set[tuple[Any, ...]] = set()

    def __call__(self, name: str, entry: Any) -> TensorInfo:
        fault = name_fault(name)
        _demand(fault is None, f"a tensor's name: {fault}")
        dtype = dtype_of(entry["dtype"])
        shape = _numbers(entry["shape"], f"shape of {name}")
        _demand(math.prod(shape) * dtype.itemsize < _BIGGEST, f"{name} has the impossible shape {shape}")
        if "boxes" in entry:
            return TensorInfo(shape, dtype, self._listed(name, entry["boxes"], shape, dtype))
        return TensorInfo(shape, dtype, grid=self._grid(name, entry, shape))

    def _listed(self, name: str, boxes: Any, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[StoredBox, ...]:
        found = []
        for offsets, sizes, file, start in boxes:
            box = Box(_numbers(offsets, f"offsets in {name}"), _numbers(sizes, f"sizes in {name}"))
            stop = _number(start, f"start of {name}") + box.numel * dtype.itemsize
            _demand(file in self._files, f"{name} is stored in {str(file)[:100]!r}, which is not one of the files")
            _demand(
                start % dtype.itemsize == 0 and stop <= self._files[file].size,
                f"{name} is stored at bytes {start} to {stop} of {file}, which has {self._files[file].size}",
            )
            found.append(StoredBox(box, file, start))
        fault = tiling_fault(shape, [stored.box for stored in found])
        _demand(fault is None, f"{name}: {fault}")
        return tuple(found)

    def _grid(self, name: str, entry: Any, shape: tuple[int, ...]) -> Grid:
        steps, strides = (_numbers(entry[key], f"{key} of {name}") for key in ("steps", "strides"))
        first = _number(entry["first"], f"first of {name}")
        regular = len(steps) == len(strides) == len(shape)
        _demand(
            regular and all(0 < step <= size for step, size in zip(steps, shape, strict=True)),
            f"{name} of shape {shape} is cut in steps of {steps} with strides {strides}",
        )
        grid = Grid(shape, steps, first, strides)
        pattern = grid.counts, first, strides
        if pattern not in self._seen:
            count = math.prod(grid.counts)
            _demand(
                count <= len(self._files), f"{name} is stored in {count} files, of which there are {len(self._files)}"
            )
            ranks = grid.ranks()
            _demand(len(set(ranks)) == count, f"{name} has several boxes in one file of a grid")
            lacking = next((rank for rank in ranks if rank_file(rank) not in self._files), None)
            _demand(lacking is None, f"{name} is stored in {rank_file(lacking or 0)}, which is not one of the files")
            self._seen.add(pattern)
        return grid


def _reject_shared_bytes(tensors: Mapping[str, TensorInfo]) -> None:
    spans = sorted(
        (stored.file, stored.start, stored.start + stored.box.numel * info.dtype.itemsize, name)
        for name, info in tensors.items()
        for stored in info.listed
        if stored.start is not None
    )
    for (file, _, stop, name), (other_file, start, _, other) in pairwise(spans):
        _demand(file != other_file or stop <= start, f"{name} and {other} share bytes of {file}")
