"""Large files bypass the page cache, and reads return what was written, whatever the file system supports."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import subprocess
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from disttrain.checkpoint.storage import durable_files as module
from disttrain.checkpoint.storage.durable_files import Disk

MIB = 2**20
DIRECT = getattr(os, "O_DIRECT", 0)
LARGE = 64 * MIB
"""Told of as the size of every file here, so that all of them are written so."""


class Writes:
    """`os.write` that counts the bytes that bypass the cache, and those that use it."""

    def __init__(self, refused: int = 0, refusal: int = errno.EINVAL) -> None:
        self.direct: list[int] = []
        self.cached: list[int] = []
        self._refused, self._refusal, self._write = refused, refusal, os.write

    def __call__(self, descriptor: int, content: Any) -> int:
        direct = bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & DIRECT)
        if direct and len(self.direct) >= self._refused > 0:
            raise OSError(self._refusal, "as file systems say that want other blocks")
        (self.direct if direct else self.cached).append(len(content))
        return self._write(descriptor, content)


def write(path: Path, pieces: Sequence[bytes]) -> None:
    with Disk().create(path, LARGE) as file:
        for piece in pieces:
            file.write(piece)
        file.sync()


def pieces_of(size: int, seed: int) -> list[bytes]:
    """Random content, split at random positions."""
    chosen = random.Random(seed)
    content = chosen.randbytes(size)
    cuts = sorted([0, size, *(chosen.randrange(size + 1) for _ in range(9))])
    return [content[begin:end] for begin, end in pairwise(cuts)]


@pytest.fixture
def taken(tmp_path: Path) -> None:
    """Skips the test if this file system does not bypass the cache."""
    descriptor = os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT)
    kind, direct = module.file_system(descriptor), module._set_direct(descriptor, True)
    os.close(descriptor)
    if kind not in module._DIRECT_ON or not direct:
        pytest.skip(f"this file system ({kind}) refuses O_DIRECT, or was not measured")


def test_the_reported_file_system_is_the_kernels(tmp_path: Path) -> None:
    for place in (tmp_path, Path("/dev/shm"), Path("/proc")):
        told = subprocess.run(["stat", "-f", "-c", "%T", place], capture_output=True, text=True, check=True).stdout
        descriptor = os.open(place, os.O_RDONLY)
        kind = module.file_system(descriptor)
        os.close(descriptor)
        assert kind in told or (told.strip() == "ext2/ext3" and kind in ("ext2", "ext3", "ext4")), (kind, told)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 8 * MIB - 1, 8 * MIB, 8 * MIB + 1, 24 * MIB + 5000])
def test_reads_back_what_was_written(size: int, tmp_path: Path, taken: None, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = Writes()
    monkeypatch.setattr(os, "write", writes)
    pieces = pieces_of(size, seed=size)
    write(tmp_path / "file", pieces)
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)
    assert sum(writes.direct) == size - size % 4096
    assert sum(writes.cached) == size % 4096


@pytest.mark.parametrize("refusal", [errno.EINVAL, errno.ENOTSUP])
@pytest.mark.parametrize("refused", [1, 2])
def test_a_write_that_the_system_rejects_uses_the_cache(
    refused: int, refusal: int, tmp_path: Path, taken: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = Writes(refused, refusal)
    monkeypatch.setattr(os, "write", writes)
    pieces = pieces_of(20 * MIB + 77, seed=1)
    write(tmp_path / "file", pieces)
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)
    assert sum(writes.direct) == refused * 8 * MIB
    assert sum(writes.cached) == 20 * MIB + 77 - refused * 8 * MIB


def test_a_system_without_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DIRECT", 0)
    writes = Writes()
    monkeypatch.setattr(os, "write", writes)
    pieces = pieces_of(20 * MIB + 77, seed=2)
    write(tmp_path / "file", pieces)
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)
    assert not writes.direct


def test_a_full_disk_is_reported(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DIRECT_ON", {"tmpfs"})
    with pytest.raises(OSError, match="No space left") as caught:
        write(small_disk / "file", pieces_of(20 * MIB, seed=3))
    assert caught.value.errno == errno.ENOSPC


def test_small_files_use_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = Writes()
    monkeypatch.setattr(os, "write", writes)
    with Disk().create(tmp_path / "file", 4096) as file:
        file.write(bytes(4096))
        file.sync()
    assert (writes.direct, writes.cached) == ([], [4096])
