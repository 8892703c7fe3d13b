"""Simulated worlds for checkpoint tests: ranks are threads, and tensors are sharded as strategies shard them."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import torch
from torch import Tensor

from disttrain.checkpoint import Box, Shard, flat_range_to_boxes, full_shard

TIMEOUT_S = 20.0


class ThreadRanks:
    """Ranks as threads of one process. Every wait ends after TIMEOUT_S."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, slots: list[Any]) -> None:
        self.rank, self.size, self._barrier, self._slots = rank, size, barrier, slots

    def barrier(self) -> None:
        self._barrier.wait(TIMEOUT_S)

    def gather(self, value: Any, /) -> list[Any] | None:
        self._slots[self.rank] = value
        self.barrier()
        found = list(self._slots) if self.rank == 0 else None
        self.barrier()
        return found

    def broadcast(self, value: Any, /) -> Any:
        if self.rank == 0:
            self._slots[0] = value
        self.barrier()
        found = self._slots[0]
        self.barrier()
        return found


@contextmanager
def empty_store() -> Iterator[Any]:
    """fsspec's in-memory store as a mapping from keys to files, empty before and after."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    try:
        yield system.store
    finally:
        system.store.clear()
        system.pseudo_dirs[:] = [""]


def on_ranks(size: int, act: Callable[[ThreadRanks], Any]) -> list[Any]:
    """Returns what `act` returned on each rank, or the exception that it raised there."""
    barrier, slots, results = threading.Barrier(size), [None] * size, [None] * size

    def work(rank: int) -> None:
        try:
            results[rank] = act(ThreadRanks(rank, size, barrier, slots))
        except Exception as error:  # noqa: BLE001 - passed to the test
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S * 2)
    return results


def replicated(tensors: Mapping[str, Tensor], rank: int, size: int) -> list[Shard]:
    """The shards that DDP holds."""
    return [full_shard(name, tensor.clone(), (rank, size)) for name, tensor in tensors.items()]


def cut_along(dim: int) -> Callable[[Mapping[str, Tensor], int, int], list[Shard]]:
    """The shards of FSDP2 (dim 0) and column-wise tensor parallelism (dim 1), by torch.chunk's rule.

    Scalars are replicated.
    """

    def shards(tensors: Mapping[str, Tensor], rank: int, size: int) -> list[Shard]:
        made = []
        for name, tensor in tensors.items():
            if tensor.dim() <= dim:
                made.append(full_shard(name, tensor.clone(), (rank, size)))
                continue
            rows = tensor.shape[dim]
            per = -(-rows // size)
            start, stop = min(rank * per, rows), min((rank + 1) * per, rows)
            offsets = tuple(start if d == dim else 0 for d in range(tensor.dim()))
            sizes = tuple(stop - start if d == dim else n for d, n in enumerate(tensor.shape))
            box = Box(offsets, sizes)
            made.append(Shard(name, tuple(tensor.shape), box, tensor[box.slices()].clone()))
        return made

    return shards


def flat_parts(tensors: Mapping[str, Tensor], rank: int, size: int) -> list[Shard]:
    """The shards of DeepSpeed: each rank holds a flat range of every tensor, as boxes."""
    made = []
    for name, tensor in tensors.items():
        per = -(-tensor.numel() // size)
        start, stop = min(rank * per, tensor.numel()), min((rank + 1) * per, tensor.numel())
        boxes = flat_range_to_boxes(tensor.shape, start, stop) or [Box((0,) * tensor.dim(), (0,) * tensor.dim())]
        for box in boxes:
            if tensor.dim() == 0 and start == stop:
                continue
            made.append(Shard(name, tuple(tensor.shape), box, tensor[box.slices()].clone()))
    return made


def hybrid(tensors: Mapping[str, Tensor], rank: int, size: int) -> list[Shard]:
    """The shards of HSDP on a mesh of two replicas (one replica in an odd world): boxes with several holders."""
    replicas = 2 if size % 2 == 0 else 1
    cut = cut_along(0)(tensors, rank % (size // replicas), size // replicas)
    made = []
    for shard in cut:
        replica = (rank, size) if not shard.shape else (rank // (size // replicas), replicas)
        made.append(Shard(shard.name, shard.shape, shard.box, shard.tensor, replica))
    return made


LAYOUTS: dict[str, Callable[[Mapping[str, Tensor], int, int], list[Shard]]] = {
    "replicated": replicated,
    "rows": cut_along(0),
    "columns": cut_along(1),
    "flat": flat_parts,
    "hybrid": hybrid,
}


def some_tensors() -> dict[str, Tensor]:
    """A small state with difficult dtypes and shapes."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "model/model/embed.weight": draw(13, 7).float(),
        "model/model/conv.weight": draw(5, 3, 2, 2).to(memory_format=torch.channels_last),
        "model/model/bias": draw(3).bfloat16(),
        "model/model/one": draw(1).half(),
        "model/model/mask": draw(4, 5) > 0,
        "model/model/none": draw(0, 3),
        "model/model/strided": draw(1, 3)[:, 1],
        "model/model/wave": torch.complex(draw(2, 3), draw(2, 3)),
        "optim/model/embed.weight:exp_avg": draw(13, 7),
        "optim/model/embed.weight:step": torch.tensor(17.0),
        "objective/model/temperature": torch.tensor(float("nan")),
        "user/average/counts": torch.arange(-9, 9).reshape(3, 6).t(),
        "user/average/unsigned": torch.arange(6).to(torch.uint16).reshape(2, 3),
        "ema/model/embed.weight": draw(13, 7).to(torch.float8_e4m3fn),
    }


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have equal shape, dtype and bits."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    left, right = (torch.empty(t.shape, dtype=t.dtype).copy_(t.detach()).reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(left, right)


def blank(shards: list[Shard]) -> list[Shard]:
    """The same shards over newly allocated memory with other content."""
    return [
        Shard(s.name, s.shape, s.box, torch.zeros_like(s.tensor, memory_format=torch.contiguous_format), s.replica)
        for s in shards
    ]


def seal(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest as an attacker would, with a matching digest."""
    content = json.loads((path / "manifest.json").read_text())
    del content["digest"]
    change(content)
    rest = json.dumps(content).encode()[1:]
    head = b'{"digest":"sha256:' + hashlib.sha256(rest).hexdigest().encode() + b'",\n'
    (path / "manifest.json").write_bytes(head + rest)
