"""Reads torch.distributed.checkpoint folders: the pickle `.metadata`, and `*.distcp` files of tensors from torch.save.

Restricted loaders read both and know only the names listed here. Each chunk is mapped at its position in the file.
Weights are searched under the keys that torch's recipes use. Optimizer state is read by parameter names, as
`get_state_dict` stores it. Compressed chunks and files outside the folder are rejected.
"""

from __future__ import annotations

import io
import mmap
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disttrain.checkpoint.form.boxes import Box
from disttrain.checkpoint.form.shards import Shard
from disttrain.checkpoint.formats.foreign_state import ForeignState, optimizer_shard
from disttrain.checkpoint.formats.mapped_tensor import DTYPES, mapped_tensor
from disttrain.checkpoint.formats.restricted_pickle import load_torch, read_pickle, stand_in_class
from disttrain.errors import CheckpointError, explain

METADATA = ".metadata"
KIND = "a torch distributed checkpoint"

_MODEL_KEYS = ("model", "module", "state_dict", "model_state_dict")
_OPTIMIZER_KEYS = ("optim", "optimizer", "optimizers", "optim_state", "optimizer_state_dict")
_FILE = re.compile(r"[A-Za-z0-9_.-]{1,250}\.distcp")

_PACKAGE = "torch.distributed.checkpoint"
_Tensor = stand_in_class("TensorStorageMetadata")
_Bytes = stand_in_class("BytesStorageMetadata")


def _joined(*parts: str) -> str:
    return "/".join(parts)


def _encoded(value: int) -> int:
    return value


def _layout(name: str) -> str:
    return name


ALLOWED: dict[str, Any] = {
    **{
        f"{_PACKAGE}.metadata.{name}": stand_in_class(name)
        for name in ("Metadata", "MetadataIndex", "ChunkStorageMetadata", "TensorProperties", "StorageMeta")
    },
    f"{_PACKAGE}.metadata.TensorStorageMetadata": _Tensor,
    f"{_PACKAGE}.metadata.BytesStorageMetadata": _Bytes,
    f"{_PACKAGE}.metadata._MEM_FORMAT_ENCODING": _encoded,
    f"{_PACKAGE}.filesystem._StorageInfo": stand_in_class("_StorageInfo"),
    "torch.Size": torch.Size,
    "torch.serialization._get_layout": _layout,
    "pathlib.PosixPath": _joined,
    "pathlib.WindowsPath": _joined,
    "pathlib._local.PosixPath": _joined,
    "collections.OrderedDict": dict,
    **DTYPES,
}
"""Names that `.metadata` may use. Except for sizes and dtypes, each becomes plain fields or the text passed to it."""


@dataclass(frozen=True)
class _FileSpan:
    file: str
    start: int
    length: int


def read_torch_distributed(path: Path, owner: str) -> ForeignState:
    """Read the folder's state under the names of `owner`. Local.

    Raises CheckpointError for content that it cannot convert correctly.
    """
    try:
        folder = _Folder(path, read_pickle(path / METADATA, ALLOWED))
        return _StateReader(folder, owner).read()
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, OSError, RuntimeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise _unreadable(
            path, problem, "the folder is damaged or has an unknown version: load it with torch and save it again"
        ) from error


class _Folder:
    """The decoded metadata and the mapped files of a folder."""

    def __init__(self, path: Path, metadata: Any) -> None:
        self.path = path
        self.entries: Mapping[str, Any] = metadata.fields["state_dict_metadata"]
        self.keys: Mapping[str, tuple[Any, ...]] = metadata.fields.get("planner_data") or {}
        self._maps: dict[str, memoryview] = {}
        self._spans: dict[tuple[str, tuple[int, ...] | None], _FileSpan] = {}
        for index, info in metadata.fields["storage_data"].items():
            if info.fields.get("transform_descriptors"):
                problem = f"{index.fqn} transformed by {', '.join(map(str, info.transform_descriptors))}"
                raise _unreadable(path, problem, "save it without extensions (compression)")
            offset = index.fields.get("offset")
            span = _FileSpan(str(info.relative_path), int(info.offset), int(info.length))
            self._spans[index.fqn, tuple(offset) if offset is not None else None] = span

    def tensors(self) -> Iterator[tuple[str, Any]]:
        for name, entry in self.entries.items():
            if isinstance(entry, _Tensor):
                yield name, entry

    def chunks(self, name: str) -> Iterator[tuple[Box, Tensor]]:
        """Yield the box of each chunk with its data, mapped at its position in the file."""
        for chunk in self.entries[name].chunks:
            box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
            span = self._spans.get((name, box.offsets))
            if span is None:
                raise _unreadable(self.path, f"no position for {name}{box}", "use a complete folder")
            tensor = mapped_tensor(self.path / span.file, self._window(span))
            if tuple(tensor.shape) != box.sizes:
                raise _unreadable(self.path, f"{name}{box} has shape {tuple(tensor.shape)}", "use an intact folder")
            yield box, tensor

    def value(self, name: str) -> Any:
        """Return an entry that is not a tensor. Raises CheckpointError unless it is a plain value."""
        span = self._spans[name, None]
        return load_torch(self.path / span.file, io.BytesIO(self._window(span)))

    def _window(self, span: _FileSpan) -> memoryview:
        if span.file not in self._maps:
            file = self.path / span.file
            if not _FILE.fullmatch(span.file) or file.is_symlink() or not file.is_file():
                raise _unreadable(self.path, f"{span.file[:100]!r} is not a plain file in this folder", "do not use it")
            with file.open("rb") as opened:
                # Copy on write, because torch needs writable memory. Nothing writes to it.
                self._maps[span.file] = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY))
        content = self._maps[span.file]
        if not 0 <= span.start <= span.start + span.length <= len(content):
            problem = f"{span.file} has {len(content)} bytes, and {span.length} bytes from {span.start} on are needed"
            raise _unreadable(self.path, problem, "the file is incomplete: use a complete folder")
        return content[span.start : span.start + span.length]


@dataclass
class _StateReader:
    """Sorts the entries of a folder into weights, optimizer state and everything else."""

    folder: _Folder
    owner: str

    def read(self) -> ForeignState:
        weights, state, rest = self._sorted()
        if not weights:
            problem = f"{len(self.folder.entries)} entries, such as {', '.join(list(self.folder.entries)[:3])}"
            fix = f"save the model's state dict at the top, or under one of {', '.join(_MODEL_KEYS)}"
            raise _unreadable(self.folder.path, problem, fix)
        weights = _without_ddp(weights)
        state = {_undotted(name, weights): entry for name, entry in state.items()}
        unknown = sorted(name for name in state if name not in weights)
        if unknown:
            problem = f"optimizer state of {', '.join(unknown[:3])}, which names no parameter"
            fix = "save get_state_dict(model, optimizer), which stores state by parameter names, or the weights alone"
            raise _unreadable(self.folder.path, problem, fix)
        ties = self._ties(weights, state)
        shards = [
            Shard(f"model/{self.owner}/{name}", shape, box, tensor)
            for name, fqn in weights.items()
            if name not in ties
            for shape, box, tensor in self._boxes(fqn)
        ]
        steps = 0
        for name, entry in state.items():
            for key, fqn in entry.items():
                full = f"optim/{self.owner}/{name}:{key}"
                own = list(self._optimizer_shards(full, fqn))
                steps = max(steps, *(int(one.tensor) for one in own if key == "step")) if key == "step" else steps
                shards += own
        state_of = ForeignState(self.folder.path, KIND, tuple(shards), steps, 0, ties, tuple(rest))
        state_of.reject_incomplete()
        return state_of

    def _sorted(self) -> tuple[dict[str, str], dict[str, dict[str, str]], list[str]]:
        """Return the entries of weights by name, those of optimizer state by parameter and key, and the rest."""
        weights: dict[str, str] = {}
        state: dict[str, dict[str, str]] = defaultdict(dict)
        top: dict[str, str] = {}
        rest: list[str] = []
        for fqn, entry in self.folder.entries.items():
            path = tuple(map(str, self.folder.keys.get(fqn, (fqn,))))
            is_tensor = isinstance(entry, _Tensor)
            known = next((depth for depth in (0, 1) if depth < len(path) - 1 and path[depth] in _KNOWN), None)
            if known is None:
                if is_tensor and len(path) == 1:
                    top[path[0]] = fqn
                else:
                    rest.append(fqn)
                continue
            inner = ".".join(path[known + 1 :])
            if path[known] in _MODEL_KEYS:
                if is_tensor:
                    weights[inner] = fqn
                else:
                    rest.append(fqn)
                continue
            found = re.fullmatch(r"(?:0\.)?state\.(.+)\.([^.]+)", inner)
            if found:
                state[found[1]][found[2]] = fqn
            else:
                rest.append(fqn)
        if not weights:  # a state dict that was saved without a key above it
            weights, top = top, {}
        return weights, state, _describe_rest([*rest, *top.values()])

    def _boxes(self, fqn: str) -> Iterator[tuple[tuple[int, ...], Box, Tensor]]:
        shape = tuple(self.folder.entries[fqn].size)
        for box, tensor in self.folder.chunks(fqn):
            yield shape, box, tensor

    def _optimizer_shards(self, full: str, fqn: str) -> Iterator[Shard]:
        if isinstance(self.folder.entries[fqn], _Tensor):
            for shape, box, tensor in self._boxes(fqn):
                yield Shard(full, shape, box, tensor)
            return
        value = self.folder.value(fqn)
        if not isinstance(value, bool | int | float):
            raise _unreadable(
                self.folder.path, f"{fqn} is a {type(value).__name__}", "store only tensors and numbers in it"
            )
        yield optimizer_shard(full if full.endswith(":step") else f"{full}:number", value)

    def _ties(self, weights: Mapping[str, str], state: Mapping[str, Any]) -> dict[str, str]:
        """Return the other names of tied weights.

        torch stores a tied weight under every name, but its optimizer state under one. A weight without optimizer state
        that equals a weight with it bit for bit is therefore another name of that weight.
        """
        ties: dict[str, str] = {}
        for name, fqn in weights.items():
            if name in state or not state:
                continue
            for trained in state:
                if trained in weights and self._same(fqn, weights[trained]):
                    ties[name] = trained
        return ties

    def _same(self, one: str, other: str) -> bool:
        if tuple(self.folder.entries[one].size) != tuple(self.folder.entries[other].size):
            return False
        pairs = zip(self.folder.chunks(one), self.folder.chunks(other), strict=False)
        return all(a == b and x.dtype == y.dtype and _equal(x, y) for (a, x), (b, y) in pairs)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Compare two tensors. Most pairs differ in their first row, and then the rest is not read."""
    return torch.equal(one[:1], other[:1]) and torch.equal(one, other) if one.dim() else torch.equal(one, other)


_KNOWN = (*_MODEL_KEYS, *_OPTIMIZER_KEYS)


def _describe_rest(rest: list[str]) -> list[str]:
    """Describe the entries that are left out. All settings count as one."""
    settings = [fqn for fqn in rest if ".param_groups." in fqn]
    others = [f"{fqn}, which is neither a weight nor optimizer state" for fqn in sorted(set(rest) - set(settings))]
    return [*others, *(["the settings of the parameter groups"] if settings else [])]


def _without_ddp(weights: dict[str, str]) -> dict[str, str]:
    if all(name.startswith("module.") for name in weights):
        return {name.removeprefix("module."): fqn for name, fqn in weights.items()}
    return weights


def _undotted(name: str, weights: Mapping[str, str]) -> str:
    """Return a parameter's name among the weights. DDP's optimizer state may still have the prefix `module.`."""
    return name.removeprefix("module.") if name not in weights else name


def _unreadable(path: Path, problem: str, fix: str) -> CheckpointError:
    return CheckpointError(explain(f"Cannot read {path} as {KIND}.", problem, fix))
