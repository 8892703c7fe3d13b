"""Reads and writes files of torch.save.

Reading uses torch's restricted unpickler (`weights_only`) and maps the file if its form allows it. A file whose pickle
needs anything but tensors and plain values is rejected with the name that it needs. Writing stores a state dict of
plain tensors in torch's zip form, without holding the state in memory. The pickle comes first, then the bytes of each
storage at offsets that can be mapped.
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
"""Keys under which training scripts save the model's state."""

_PIECE_BYTES = 16 * 2**20


class TorchWeights:
    """The weights in a state dict, or in a mapping with a state dict under one of its keys.

    The keys are `state_dict`, `model_state_dict`, `model` and `module`. The prefix `module.`, which DDP adds to every
    name, is removed. If tensors share their memory (ties), every name is kept.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found = without_ddp(_state_dict(path, load_torch_file(path)))
        self.tensors: dict[str, WeightInfo] = {
            name: WeightInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self._found.items()
        }

    def fill(self, wanted: Sequence[WantedBox]) -> None:
        """Copy boxes from mapped memory."""
        with torch.no_grad():
            for one in wanted:
                one.into.copy_(self._found[one.name][one.box.slices()])

    def full_tensor(self, name: str) -> Tensor:
        """Return a view of the mapped file."""
        return self._found[name]

    def ties(self) -> dict[str, str]:
        """Return the other names of tensors that share all memory with an earlier tensor, with its name."""
        first: dict[tuple[Any, ...], str] = {}
        further = {}
        for name, tensor in self._found.items():
            memory = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if tensor.numel() and memory in first:
                further[name] = first[memory]
            first.setdefault(memory, name)
        return further


def without_ddp(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under the model's names, without DDP's prefix."""
    if all(name.startswith("module.") for name in found):
        return {name.removeprefix("module."): tensor for name, tensor in found.items()}
    return dict(found)


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        for candidate in (content, *(content[key] for key in _INNER if isinstance(content.get(key), Mapping))):
            found = {str(name): value for name, value in candidate.items() if isinstance(value, Tensor)}
            if found:
                return {name: _plain(path, name, tensor) for name, tensor in found.items()}
    keys = (
        f"a mapping with {', '.join(map(str, list(content)[:5]))}" if isinstance(content, Mapping) else "not a mapping"
    )
    fix = f"save model.state_dict(), or a mapping that contains it under one of {', '.join(_INNER)}"
    raise CheckpointError(explain(f"Cannot read {path} as a model's weights.", keys, fix))


def _plain(path: Path, name: str, tensor: Tensor) -> Tensor:
    if tensor.layout is not torch.strided or tensor.is_quantized:
        fix = "save it as a dense tensor, for example with tensor.to_dense() or dequantize()"
        raise CheckpointError(explain(f"Cannot read {name} in {path}.", f"it is a {tensor.layout} tensor", fix))
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
"""Dtypes with a storage class. Newer dtypes are stored untyped, with the dtype as a separate value."""


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    info: WeightInfo

    @property
    def numel(self) -> int:
        return torch.Size(self.info.shape).numel()


@dataclass(frozen=True, slots=True)
class _DeferredTensor:
    """Pickled as a contiguous tensor whose storage is written elsewhere in the file."""

    storage: _Storage


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        typed = _STORAGES.get(value.info.dtype)
        size = value.numel if typed else value.numel * value.info.dtype.itemsize
        return ("storage", typed or torch.UntypedStorage, value.key, "cpu", size)

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, _DeferredTensor):
            return NotImplemented
        info = value.storage.info
        strides = torch.empty(info.shape, device="meta").stride()
        call: tuple[Any, ...] = (value.storage, 0, tuple(info.shape), tuple(strides), False, OrderedDict())
        rebuild = torch.empty(0, dtype=info.dtype, device="cpu").__reduce_ex__(2)[0]  # type: ignore[no-untyped-call]
        return rebuild, (call if info.dtype in _STORAGES else (*call, info.dtype))


def write_torch(weights: Weights, path: Path, aliases: Mapping[str, str]) -> None:
    """Write a new, synced file with a state dict, which `torch.load(path, weights_only=True)` reads.

    `aliases` are other names, each of a stored tensor whose memory they share. One tensor at a time is in memory.
    Local. Raises OSError.
    """
    storages = {name: _Storage(str(index), info) for index, (name, info) in enumerate(weights.tensors.items())}
    state = OrderedDict((name, _DeferredTensor(storage)) for name, storage in storages.items())
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
    """Write a stored entry whose content begins at a multiple of ALIGNMENT, because mapped data must be aligned."""
    entry = zipfile.ZipInfo(f"archive/{name}")
    entry.file_size = size
    # The local header takes 30 bytes, the name, 20 bytes of zipfile for 64-bit sizes, and 4 bytes before the padding.
    used = file.tell() + 30 + len(entry.filename) + 20 + 4
    entry.extra = struct.pack("<HH", 0x4246, -used % ALIGNMENT) + b"\0" * (-used % ALIGNMENT)
    with archive.open(entry, "w", force_zip64=True) as record:
        for piece in pieces:
            record.write(piece)
