"""Reads Hugging Face folders and safetensors files by slices, and writes them one tensor at a time.

A folder contains `model.safetensors`, or `model-0000k-of-0000n.safetensors` with `model.safetensors.index.json`. It may
contain `pytorch_model.bin` (in the form of torch.save) instead. An index that names files outside its folder is
rejected.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from disttrain.checkpoint.form.boxes import full_box
from disttrain.checkpoint.form.tensor_bytes import Entry, plan_file, tensor_bytes
from disttrain.checkpoint.formats.torch_file import TorchWeights
from disttrain.checkpoint.formats.weights import WantedBox, WeightInfo, Weights, bytes_of, read_weights
from disttrain.checkpoint.storage.durable_files import Disk
from disttrain.errors import CheckpointError, explain

SHARD_BYTES = 5 * 10**9
"""The largest size of a folder's files, unless one tensor is larger. It was Hugging Face's default for a long time."""

_ONE_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TORCH_FILE, _TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,250}")
_PIECE_BYTES = 16 * 2**20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class SafetensorsWeights:
    """Weights in one or more safetensors files. Reads only the rows and columns of the requested boxes."""

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        self.path = path
        self._file_of: dict[str, Path] = {}
        # Files stay open, because opening a file reads and checks its complete header.
        self._opened = {file: _open(file) for file in files}
        self.tensors: dict[str, WeightInfo] = {}
        for file, opened in self._opened.items():
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                if name in self.tensors:
                    two = f"{name} in {self._file_of[name].name} and in {file.name}"
                    raise _unreadable(path, two, "name a folder that contains one model")
                part = opened.get_slice(name)
                self.tensors[name] = WeightInfo(tuple(part.get_shape()), _dtype(file, name, part.get_dtype()))
                self._file_of[name] = file

    def fill(self, wanted: Sequence[WantedBox]) -> None:
        """Copy boxes from the mapped files. The files are not read completely."""
        with torch.no_grad():
            for one in wanted:
                if one.box == full_box(self.tensors[one.name].shape):
                    one.into.copy_(self.full_tensor(one.name))
                else:
                    opened = self._opened[self._file_of[one.name]]
                    one.into.copy_(opened.get_slice(one.name)[one.box.slices()])

    def full_tensor(self, name: str) -> torch.Tensor:
        """Return a view of the mapped file."""
        found: torch.Tensor = self._opened[self._file_of[name]].get_tensor(name)
        return found


class SeveralFiles:
    """Weights in several files, each of which is a `Weights`."""

    def __init__(self, path: Path, parts: Sequence[Weights]) -> None:
        self.path, self._parts = path, parts
        self.tensors = {name: info for part in parts for name, info in part.tensors.items()}

    def fill(self, wanted: Sequence[WantedBox]) -> None:
        """Fill the boxes file by file."""
        for part in self._parts:
            part.fill([one for one in wanted if one.name in part.tensors])

    def full_tensor(self, name: str) -> torch.Tensor:
        """Return the tensor from the file that contains it."""
        return next(part for part in self._parts if name in part.tensors).full_tensor(name)


def open_folder(path: Path) -> Weights:
    """Open the weights of a Hugging Face folder. Local. Raises CheckpointError if a file in its index is missing."""
    if (path / _INDEX).exists():
        return SafetensorsWeights(path, _indexed(path, _INDEX))
    if (path / _ONE_FILE).exists():
        return SafetensorsWeights(path, [path / _ONE_FILE])
    if (path / _TORCH_INDEX).exists():
        return SeveralFiles(path, [TorchWeights(file) for file in _indexed(path, _TORCH_INDEX)])
    if (path / _TORCH_FILE).exists():
        return TorchWeights(path / _TORCH_FILE)
    return SafetensorsWeights(path, _alone(path))


def _alone(path: Path) -> list[Path]:
    """Return the model files with other names. `rank-*.safetensors` are parts of a disttrain checkpoint."""
    return sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("rank-"))


def is_folder(path: Path) -> bool:
    """Return whether `open_folder` can read a folder, by its names. Local."""
    known = (_INDEX, _ONE_FILE, _TORCH_INDEX, _TORCH_FILE)
    return any((path / name).is_file() for name in known) or len(_alone(path)) == 1


def _indexed(path: Path, index: str) -> list[Path]:
    try:
        names = json.loads((path / index).read_text(encoding="utf-8"))["weight_map"].values()
        files = sorted({str(name) for name in names})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(path / index, f"{type(error).__name__}: {error}", "download it again") from error
    outside = [name for name in files if not _PLAIN_NAME.fullmatch(name)]
    if outside:
        raise _unreadable(path / index, f"a file {outside[0][:100]!r} outside the folder", "do not use it")
    absent = [name for name in files if not (path / name).is_file()]
    if absent:
        raise _unreadable(path, f"no {', '.join(absent[:5])}, which {index} names", "download the missing files")
    return [path / name for name in files]


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise _unreadable(
            file, f"{type(error).__name__}: {error}", "it is damaged or incomplete: download it again"
        ) from error


def _dtype(file: Path, name: str, stored: str) -> torch.dtype:
    if stored not in _DTYPES:
        raise _unreadable(file, f"{name} of type {stored}", f"store it as one of {', '.join(_DTYPES)}")
    return _DTYPES[stored]


def _unreadable(path: Path, problem: str, fix: str) -> CheckpointError:
    return CheckpointError(explain(f"Cannot read {path} as safetensors.", problem, fix))


def write_safetensors(weights: Weights, names: Sequence[str], path: Path, disk: Disk) -> None:
    """Write a new, synced file with these weights. One tensor at a time is in memory. Local. Raises OSError."""
    for name in names:
        if weights.tensors[name].dtype is torch.complex128:
            fix = "use --to torch, which supports it"
            raise CheckpointError(
                explain(f"Cannot write {name} as safetensors.", "safetensors has no type complex128", fix)
            )
    stored = [(name, weights.tensors[name]) for name in names]
    entries = [Entry(name, info.shape, info.dtype, full_box(info.shape)) for name, info in stored]
    head, placed = plan_file(entries, {"format": "pt"})
    with disk.create(path, placed[-1].stop if placed else 0) as file:
        file.write(head)
        for _, tensor in read_weights(weights, [entry.name for entry in placed]):
            for piece in tensor_bytes(tensor, _PIECE_BYTES):
                file.write(piece)
        file.sync()


def write_folder(
    weights: Weights, folder: Path, disk: Disk, *, extra: Mapping[str, str], shard_bytes: int = SHARD_BYTES
) -> None:
    """Fill a new folder that `from_pretrained` can read. Local.

    `extra` are texts by file name, such as config.json.
    """
    shards = list(_split(weights, shard_bytes))
    texts = dict(extra)
    if len(shards) == 1:
        write_safetensors(weights, shards[0], folder / _ONE_FILE, disk)
    else:
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_safetensors(weights, names, folder / file, disk)
            weight_map |= dict.fromkeys(names, file)
        total = sum(bytes_of(weights.tensors[name]) for name in weights.tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        texts[_INDEX] = json.dumps(index, indent=2) + "\n"
    for name, text in texts.items():
        with disk.create(folder / name) as written:
            written.write(text.encode())
            written.sync()
    disk.sync_folder(folder)


def _split(weights: Weights, shard_bytes: int) -> Iterator[list[str]]:
    """Yield the names in order, as many as fit into one file, and at least one."""
    names: list[str] = []
    remaining = shard_bytes
    for name, info in weights.tensors.items():
        size = bytes_of(info)
        if names and size > remaining:
            yield names
            names, remaining = [], shard_bytes
        names.append(name)
        remaining -= size
    yield names
