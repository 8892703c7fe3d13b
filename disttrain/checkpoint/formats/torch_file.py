"""One file of torch.save: read without running anything in it, mapped where its form allows; written tensor by tensor.

Reading is torch's own restricted unpickler (`weights_only`). Writing makes a state dict of plain tensors in torch's zip
form without holding the state: the pickle first, then each storage's bytes, at offsets that can be mapped.
Refuses a file whose pickle wants anything but tensors and plain values, naming what it wants.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from disttrain.checkpoint.form.tensor_bytes import ALIGNMENT, tensor_bytes
from disttrain.checkpoint.formats.restricted_pickle import load_torch_file
from disttrain.checkpoint.formats.weights import WantedBox, WeightInfo, Weights, bytes_of, read_weights
from disttrain.errors import CheckpointError, explain

_INNER = ("state_dict", "model_state_dict", "model", "module")
"""Under which keys training scripts keep the model's state beside others."""

_PIECE_BYTES = 16 * 2**20


class TorchWeights:
    """A state dict, or a mapping with one under `state_dict`, `model_state_dict`, `model` or `module`.

    `module.` before every name, as DDP's own state dict has it, is taken off. Of tensors that are one in memory (ties)
    every name is kept.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found = without_ddp(_state_dict(path, load_torch_file(path)))
        self.tensors: dict[str, WeightInfo] = {
            name: WeightInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self._found.items()
        }

    def fill(self, wanted: Sequence[WantedBox]) -> None:
        """From mapped memory."""
        with torch.no_grad():
            for one in wanted:
                one.into.copy_(self._found[one.name][one.box.slices()])

    def full_tensor(self, name: str) -> Tensor:
        """A view of the mapped file."""
        return self._found[name]

    def ties(self) -> dict[str, str]:
        """Further names of tensors that share all their memory with an earlier one, to its name."""
        first: dict[tuple[Any, ...], str] = {}
        further = {}
        for name, tensor in self._found.items():
            place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if tensor.numel() and place in first:
                further[name] = first[place]
            first.setdefault(place, name)
        return further


def without_ddp(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same under the model's own names."""
    if all(name.startswith("module.") for name in found):
        return {name.removeprefix("module."): tensor for name, tensor in found.items()}
    return dict(found)


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        for place in (content, *(content[key] for key in _INNER if isinstance(content.get(key), Mapping))):
            found = {str(name): value for name, value in place.items() if isinstance(value, Tensor)}
            if found:
                return {name: _plain(path, name, tensor) for name, tensor in found.items()}
    keys = f"a mapping with {', '.join(map(str, list(content)[:5]))}" if isinstance(content, Mapping) else "no mapping"
    do = f"save model.state_dict(), or a mapping that has it under one of {', '.join(_INNER)}"
    raise CheckpointError(explain(f"{path} is to be read as a model's weights.", keys, do))


def _plain(path: Path, name: str, tensor: Tensor) -> Tensor:
    if tensor.layout is not torch.strided or tensor.is_quantized:
        do = "save it dense, such as by tensor.to_dense() or dequantize()"
        raise CheckpointError(explain(f"{name} in {path} is to be read.", f"a {tensor.layout} tensor", do))
    return tensor.detach().resolve_conj().resolve_neg()


# ---------------------------------------------------------------------- writing

_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.complex64: torch.ComplexFloatStorage,
    torch.complex128: torch.ComplexDoubleStorage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}
"""Types that have a storage class of their own; the newer ones are stored untyped, with their dtype beside them."""


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    info: WeightInfo

    @property
    def numel(self) -> int:
        return torch.Size(self.info.shape).numel()


@dataclass(frozen=True, slots=True)
class _Promise:
    """Pickled as a contiguous tensor whose storage lies elsewhere in the file."""

    storage: _Storage


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        typed = _STORAGES.get(value.info.dtype)
        size = value.numel if typed else value.numel * value.info.dtype.itemsize
        return ("storage", typed or torch.UntypedStorage, value.key, "cpu", size)

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, _Promise):
            return NotImplemented
        info = value.storage.info
        strides = torch.empty(info.shape, device="meta").stride()
        call: tuple[Any, ...] = (value.storage, 0, tuple(info.shape), tuple(strides), False, OrderedDict())
        if info.dtype in _STORAGES:
            return torch._utils._rebuild_tensor_v2, call
        return torch._utils._rebuild_tensor_v3, (*call, info.dtype)


def write_torch(weights: Weights, path: Path, aliases: Mapping[str, str]) -> None:
    """A new file of torch.save's form with a state dict, synced; `torch.load(path, weights_only=True)` reads it.

    `aliases` are further names, to a stored one whose memory they share. Holds one tensor. Local; raises OSError.
    """
    storages = {name: _Storage(str(place), info) for place, (name, info) in enumerate(weights.tensors.items())}
    state = OrderedDict((name, _Promise(storage)) for name, storage in storages.items())
    for alias, name in aliases.items():
        if name in state:
            state[alias] = state[name]
    pickled = io.BytesIO()
    _Pickler(pickled, protocol=2).dump(state)
    with path.open("xb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            _write_record(file, archive, "data.pkl", [pickled.getvalue()], pickled.tell())
            _write_record(file, archive, "byteorder", [b"little"], 6)
            for name, tensor in read_weights(weights, list(storages)):
                storage = storages[name]
                pieces = tensor_bytes(tensor, _PIECE_BYTES) if storage.numel else ()
                _write_record(file, archive, f"data/{storage.key}", pieces, bytes_of(storage.info))
            _write_record(file, archive, "version", [b"3\n"], 2)
        file.flush()
        os.fsync(file.fileno())


def _write_record(file: BinaryIO, archive: zipfile.ZipFile, name: str, pieces: Any, size: int) -> None:
    """One stored entry whose content begins at a multiple of ALIGNMENT: what is mapped is to be aligned."""
    entry = zipfile.ZipInfo(f"archive/{name}")
    entry.file_size = size
    # The local header is 30 bytes, the name, zipfile's 20 for sizes of 64 bits, and 4 before our padding.
    used = file.tell() + 30 + len(entry.filename) + 20 + 4
    entry.extra = struct.pack("<HH", 0x4246, -used % ALIGNMENT) + b"\0" * (-used % ALIGNMENT)
    with archive.open(entry, "w", force_zip64=True) as record:
        for piece in pieces:
            record.write(piece)
