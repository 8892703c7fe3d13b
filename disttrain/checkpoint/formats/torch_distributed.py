"""A torch.distributed.checkpoint folder: `.metadata`, which is a pickle, and `*.distcp` files of torch.save records.

Both are read by restricted loaders that know the names listed here and no others; each chunk is mapped where it lies.
Weights are looked for under the keys that torch's recipes use, optimizer state by parameter names, as `get_state_dict`
gives it. Refuses compressed chunks and files outside the folder.
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

_HOME = "torch.distributed.checkpoint"
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
        f"{_HOME}.metadata.{name}": stand_in_class(name)
        for name in ("Metadata", "MetadataIndex", "ChunkStorageMetadata", "TensorProperties", "StorageMeta")
    },
    f"{_HOME}.metadata.TensorStorageMetadata": _Tensor,
    f"{_HOME}.metadata.BytesStorageMetadata": _Bytes,
    f"{_HOME}.metadata._MEM_FORMAT_ENCODING": _encoded,
    f"{_HOME}.filesystem._StorageInfo": stand_in_class("_StorageInfo"),
    "torch.Size": torch.Size,
    "torch.serialization._get_layout": _layout,
    "pathlib.PosixPath": _joined,
    "pathlib.WindowsPath": _joined,
    "pathlib._local.PosixPath": _joined,
    "collections.OrderedDict": dict,
    **DTYPES,
}
"""All that a `.metadata` may name; each but the sizes and dtypes is a record or a function that gives back its text."""


@dataclass(frozen=True)
class _FileSpan:
    file: str
    start: int
    length: int


def read_torch_distributed(path: Path, owner: str) -> ForeignState:
    """The folder's state under the names of `owner`. Local; raises CheckpointError for what it cannot carry rightly."""
    try:
        folder = _Folder(path, read_pickle(path / METADATA, ALLOWED))
        return _StateReader(folder, owner).read()
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, OSError, RuntimeError) as error:
        found = f"{type(error).__name__}: {error}"
        raise _refusal(path, found, "it is damaged, or of a version not known here: load and save it anew") from error


class _Folder:
    """The metadata taken apart, and the files mapped."""

    def __init__(self, path: Path, metadata: Any) -> None:
        self.path = path
        self.entries: Mapping[str, Any] = metadata.fields["state_dict_metadata"]
        self.keys: Mapping[str, tuple[Any, ...]] = metadata.fields.get("planner_data") or {}
        self._maps: dict[str, memoryview] = {}
        self._places: dict[tuple[str, tuple[int, ...] | None], _FileSpan] = {}
        for index, info in metadata.fields["storage_data"].items():
            if info.fields.get("transform_descriptors"):
                found = f"{index.fqn} transformed by {', '.join(map(str, info.transform_descriptors))}"
                raise _refusal(path, found, "save it without extensions (compression)")
            offset = index.fields.get("offset")
            place = _FileSpan(str(info.relative_path), int(info.offset), int(info.length))
            self._places[index.fqn, tuple(offset) if offset is not None else None] = place

    def tensors(self) -> Iterator[tuple[str, Any]]:
        for name, entry in self.entries.items():
            if isinstance(entry, _Tensor):
                yield name, entry

    def chunks(self, name: str) -> Iterator[tuple[Box, Tensor]]:
        """Each chunk's box, and its data mapped where it lies."""
        for chunk in self.entries[name].chunks:
            box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
            place = self._places.get((name, box.offsets))
            if place is None:
                raise _refusal(self.path, f"no place for {name}{box}", "use a whole one")
            tensor = mapped_tensor(self.path / place.file, self._window(place))
            if tuple(tensor.shape) != box.sizes:
                raise _refusal(self.path, f"{name}{box} has shape {tuple(tensor.shape)}", "use a whole one")
            yield box, tensor

    def value(self, name: str) -> Any:
        """An entry that is no tensor. CheckpointError for one that is no plain value."""
        place = self._places[name, None]
        return load_torch(self.path / place.file, io.BytesIO(self._window(place)))

    def _window(self, place: _FileSpan) -> memoryview:
        if place.file not in self._maps:
            file = self.path / place.file
            if not _FILE.fullmatch(place.file) or file.is_symlink() or not file.is_file():
                raise _refusal(self.path, f"a file {place.file[:100]!r}: no plain file of this folder", "do not use it")
            with file.open("rb") as opened:
                # Copy on write, because torch wants memory that it may write to; nothing writes.
                self._maps[place.file] = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY))
        whole = self._maps[place.file]
        if not 0 <= place.start <= place.start + place.length <= len(whole):
            found = f"{place.file} has {len(whole)} bytes, and {place.length} from {place.start} on are wanted"
            raise _refusal(self.path, found, "it was cut short: use a whole one")
        return whole[place.start : place.start + place.length]


@dataclass
class _StateReader:
    """Sorts a folder's entries into weights, optimizer state and the rest."""

    folder: _Folder
    owner: str

    def read(self) -> ForeignState:
        weights, state, rest = self._sorted()
        if not weights:
            found = f"{len(self.folder.entries)} entries, such as {', '.join(list(self.folder.entries)[:3])}"
            do = f"save the model's state dict at the top, or under one of {', '.join(_MODEL_KEYS)}"
            raise _refusal(self.folder.path, found, do)
        weights = _without_ddp(weights)
        state = {_undotted(name, weights): entry for name, entry in state.items()}
        unknown = sorted(name for name in state if name not in weights)
        if unknown:
            found = f"optimizer state of {', '.join(unknown[:3])}, which names no parameter"
            do = "save get_state_dict(model, optimizer), whose state has the parameters' names, or the weights alone"
            raise _refusal(self.folder.path, found, do)
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
        """Names of weights, and of optimizer state by parameter and key, to the folder's entries; and the rest."""
        weights: dict[str, str] = {}
        state: dict[str, dict[str, str]] = defaultdict(dict)
        top: dict[str, str] = {}
        rest: list[str] = []
        for fqn, entry in self.folder.entries.items():
            path = tuple(map(str, self.folder.keys.get(fqn, (fqn,))))
            is_tensor = isinstance(entry, _Tensor)
            known = next((place for place in (0, 1) if place < len(path) - 1 and path[place] in _KNOWN), None)
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
        if not weights:  # a state dict saved as it is, without a key above it
            weights, top = top, {}
        return weights, state, _told([*rest, *top.values()])

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
            raise _refusal(self.folder.path, f"{fqn} is a {type(value).__name__}", "keep tensors and numbers in it")
        yield optimizer_shard(full if full.endswith(":step") else f"{full}:number", value)

    def _ties(self, weights: Mapping[str, str], state: Mapping[str, Any]) -> dict[str, str]:
        """A weight without optimizer state that equals one with it bit for bit is another name of it: torch stores a
        tied weight under every name, its optimizer state under one."""
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
    """Of many pairs nearly all differ in their first row: the rest of it is not read."""
    return torch.equal(one[:1], other[:1]) and torch.equal(one, other) if one.dim() else torch.equal(one, other)


_KNOWN = (*_MODEL_KEYS, *_OPTIMIZER_KEYS)


def _told(rest: list[str]) -> list[str]:
    """What is not carried, in words: settings as one."""
    settings = [fqn for fqn in rest if ".param_groups." in fqn]
    others = [f"{fqn}, which is neither a weight nor optimizer state" for fqn in sorted(set(rest) - set(settings))]
    return [*others, *(["the settings of the parameter groups"] if settings else [])]


def _without_ddp(weights: dict[str, str]) -> dict[str, str]:
    if all(name.startswith("module.") for name in weights):
        return {name.removeprefix("module."): fqn for name, fqn in weights.items()}
    return weights


def _undotted(name: str, weights: Mapping[str, str]) -> str:
    """The parameter's name in the weights: DDP's own optimizer state may carry `module.` still."""
    return name.removeprefix("module.") if name not in weights else name


def _refusal(path: Path, found: str, do: str) -> CheckpointError:
    return CheckpointError(explain(f"{path} is to be read as {KIND}.", found, do))
