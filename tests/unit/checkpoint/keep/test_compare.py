"""Comparing checkpoints: every difference and its position, against plain float64 arithmetic, in bounded memory."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_world import LAYOUTS, on_ranks, some_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from disttrain.checkpoint import Checkpoint, save_checkpoint
from disttrain.checkpoint.keep.compare import BATCH_BYTES, Comparison, StoredTensorDifference, compare_tensors
from disttrain.checkpoint.storage.chunk_reader import ChunkReader
from disttrain.checkpoint.write.save import CHUNK_BYTES
from disttrain.errors import CheckpointError


def saved(
    root: Path, tensors: Mapping[str, Tensor], layout: str = "replicated", ranks: int = 1, chunk_bytes: int = 4096
) -> Checkpoint:
    act = lambda own: save_checkpoint(  # noqa: E731
        root, 1, LAYOUTS[layout](tensors, own.rank, ranks), {}, own, chunk_bytes=chunk_bytes
    )
    found = on_ranks(ranks, act)[0]
    assert isinstance(found, Path), found
    return Checkpoint.open(found)


def compared(tmp_path: Path, a: Tensor, b: Tensor) -> StoredTensorDifference | None:
    """Compares one tensor with another of its shape and dtype."""
    left, right = saved(tmp_path / "a", {"user/u/t": a}), saved(tmp_path / "b", {"user/u/t": b})
    found = compare_tensors(left, right)
    assert found.same == (not found.differences)
    return found.differences[0] if found.differences else None


@pytest.mark.parametrize("batch_bytes", [8, 1000, 2**26])
def test_other_boxes_and_worlds_are_no_difference(tmp_path: Path, batch_bytes: int) -> None:
    worlds = [("replicated", 1), ("rows", 3), ("columns", 2), ("flat", 4), ("hybrid", 4)]
    stored = [saved(tmp_path / layout, some_tensors(), layout, ranks) for layout, ranks in worlds]
    for a, b in zip(stored, [*stored[1:], stored[0]], strict=True):
        found = compare_tensors(a, b, batch_bytes=batch_bytes)
        assert (found.same, found.equal) == (True, len(some_tensors())), "a NaN in both is equal too"


@settings(max_examples=30)
@given(data=st.data())
def test_the_largest_difference_and_its_place_are_those_of_a_plain_comparison(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int32]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    a = (torch.randn(shape, generator=generator) * 100).to(dtype)
    b = torch.where(torch.rand(shape, generator=generator) < 0.3, torch.randn(shape, generator=generator) * 9, a)
    b = b.to(dtype)
    folder = tmp_path_factory.mktemp("pair")
    layouts = st.tuples(st.sampled_from(sorted(LAYOUTS)), st.integers(1, 4))
    stored = [saved(folder / side, {"model/m/w": tensor}, *data.draw(layouts)) for side, tensor in (("a", a), ("b", b))]
    found = compare_tensors(*stored, batch_bytes=data.draw(st.sampled_from([8, 500, 2**20])))

    wide_a, wide_b = a.double(), b.double()
    plain = (wide_a - wide_b).abs()
    relative = plain / torch.maximum(wide_a.abs(), wide_b.abs()).clamp(min=1e-300)
    if torch.equal(a, b):
        assert found.same
        return
    (one,) = found.differences
    assert one.differing == int((plain > 0).sum())
    assert one.absolute is not None and one.relative is not None
    assert one.absolute.value == plain.max() == plain[one.absolute.at]
    assert (one.absolute.a, one.absolute.b) == (a[one.absolute.at].item(), b[one.absolute.at].item())
    assert one.relative.value == relative.max() == relative[one.relative.at]


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("a", "b", "differing", "nans", "absolute", "relative"),
    [
        ([1.0, NAN], [1.0, NAN], 0, 0, None, None),
        ([1.0, NAN, 3.0], [1.0, 2.0, 3.0], 1, 1, None, None),
        ([1.0, 2.0, 8.0], [NAN, 2.0, 4.0], 2, 1, (4.0, (2,)), (0.5, (2,))),
        ([INF, -INF], [INF, -INF], 0, 0, None, None),
        ([INF, 1.0], [-INF, 2.0], 2, 0, (INF, (0,)), (INF, (0,))),
        ([0.0, 1.0], [-0.0, 1.0], 1, 0, (0.0, (0,)), (0.0, (0,))),  # other bits, the same number
        ([0.0, 5.0], [1e-30, 5.5], 2, 0, (0.5, (1,)), (1.0, (0,))),
    ],
)
def test_values_that_are_no_finite_numbers(
    tmp_path: Path, a: list[float], b: list[float], differing: int, nans: int, absolute: Any, relative: Any
) -> None:
    one = compared(tmp_path, torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
    if not differing:
        assert one is None
        return
    assert one is not None
    assert (one.differing, one.nans) == (differing, nans)
    assert (one.absolute and (one.absolute.value, one.absolute.at)) == absolute
    assert (one.relative and (one.relative.value, one.relative.at)) == relative
    if nans:
        (at,) = [place for place in range(len(a)) if math.isnan(a[place]) != math.isnan(b[place])]
        assert one.nan is not None and one.nan.at == (at,)
        assert str((one.nan.a, one.nan.b)) == str((a[at], b[at]))


def test_nans_of_other_bits_are_equal(tmp_path: Path) -> None:
    a, b = (torch.tensor([bits], dtype=torch.int32).view(torch.float32) for bits in (0x7FC00000, 0x7FC00001))
    assert a.isnan() and b.isnan()
    assert compared(tmp_path, a, b) is None


@pytest.mark.parametrize(
    ("dtype", "a", "b", "distance"),
    [
        (torch.int64, 2**60, 2**60 + 1, 1),
        (torch.int64, -(2**63), 2**63 - 1, 2**64 - 1),
        (torch.uint64, 2**64 - 1, 2**64 - 4, 3),
        (torch.uint8, 0, 255, 255),
        (torch.int8, -128, 127, 255),
        (torch.uint16, 65535, 0, 65535),
        (torch.bool, False, True, 1),
        (torch.float8_e4m3fn, 1.0, 448.0, 447.0),
        (torch.float8_e5m2fnuz, -2.0, 0.5, 2.5),
        (torch.complex64, 3 + 4j, 0j, 5.0),
        (torch.complex128, 1 + 1j, 1 - 2j, 3.0),
    ],
)
def test_every_dtype_is_compared_without_rounding(
    tmp_path: Path, dtype: torch.dtype, a: complex, b: complex, distance: float
) -> None:
    left, right = (
        (torch.tensor([value]).to(dtype) for value in (a, b))
        if dtype.itemsize == 1
        else (torch.tensor([value], dtype=dtype) for value in (a, b))
    )
    one = compared(tmp_path, left, right)
    assert one is not None and one.absolute is not None
    assert (one.absolute.value, one.absolute.a, one.absolute.b) == (distance, a, b)


def test_names_misfits_and_the_order_of_differences(tmp_path: Path) -> None:
    same, ones = torch.arange(4.0), torch.ones(2, 3)
    a = {"model/m/same": same, "model/m/gone": ones, "model/m/turned": ones, "model/m/half": ones}
    b = {"model/m/same": same, "optim/m/new": ones, "model/m/turned": ones.t(), "model/m/half": ones.half()}
    for name, by in (("little", 0.001), ("much", 7.0), ("nan", NAN), ("some", 0.5)):
        a[f"ema/m/{name}"], b[f"ema/m/{name}"] = ones, ones + by
    left, right = saved(tmp_path / "a", a), saved(tmp_path / "b", b, "rows", 2)
    found = compare_tensors(left, right)
    assert (found.only_a, found.only_b, found.equal) == (("model/m/gone",), ("optim/m/new",), 1)
    assert [(one.name, one.a, one.b) for one in found.misfits] == [
        ("model/m/half", ((2, 3), torch.float32), ((2, 3), torch.float16)),
        ("model/m/turned", ((2, 3), torch.float32), ((3, 2), torch.float32)),
    ]
    assert [one.name for one in found.differences] == ["ema/m/nan", "ema/m/much", "ema/m/some", "ema/m/little"]
    assert not found.same
    model_only = compare_tensors(left, right, wanted=lambda name: name == "model/m/same")
    assert model_only == Comparison((), (), (), (), 1)


def test_damage_is_an_error_and_no_difference(tmp_path: Path) -> None:
    a, b = (saved(tmp_path / side, {"model/m/w": torch.ones(3000)}) for side in "ab")
    file = b.path / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors, bytes 8192 to \d+: checksum"):
        compare_tensors(a, b)


def test_every_chunk_is_read_as_often_as_one_load_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once to check it before use, once to copy. Pieces end at chunk boundaries."""
    tensors = {"model/m/big": torch.arange(40_000.0), "model/m/small": torch.arange(77.0)}
    a, b = (saved(tmp_path / side, tensors, "rows", 2) for side in "ab")
    reads: list[tuple[str, int]] = []
    plain = ChunkReader.scatter

    def counted(self: ChunkReader, chunk: int, places: Any, *, verify: bool) -> str | None:
        reads.append((self.name, chunk))
        return plain(self, chunk, places, verify=verify)

    monkeypatch.setattr(ChunkReader, "scatter", counted)
    assert compare_tensors(a, b, batch_bytes=3 * 4096).same
    chunks = sum(len(info.chunks) for info in a.manifest.files.values())
    assert chunks == 40
    headers = sum(len(checkpoint.manifest.files) for checkpoint in (a, b))
    assert len(reads) <= 2 * 2 * chunks + headers


MEASURE = """
import re, sys, time
from pathlib import Path
from disttrain.checkpoint import Checkpoint
from disttrain.checkpoint.keep.compare import compare_tensors

def compare(a, b):
    return compare_tensors(*(Checkpoint.open(Path(root) / "step-00000001") for root in (a, b)), batch_bytes=int(most))

def peak():  # not ru_maxrss: that of a started process begins at its parent's
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

most, *warm, a, b = sys.argv[1:]
if warm:
    compare(*warm)  # whatever is made once
before, start = peak(), time.process_time()
found = compare(a, b)
print(sum(one.differing for one in found.differences), peak() - before, time.process_time() - start)
"""


def measured(*words: object) -> tuple[int, int, float]:
    """Runs in a separate process.

    Returns the number of differing elements, the growth of peak bytes, and CPU seconds.
    """
    asked = [sys.executable, "-c", MEASURE, *map(str, words)]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    differing, grown, spent_s = done.stdout.split()
    return int(differing), int(grown), float(spent_s)


def test_a_big_tensor_is_compared_in_little_memory(tmp_path: Path) -> None:
    for size, numel in (("small", 2**21), ("big", 2**24)):  # 8 and 64 MiB
        for side, value in (("a", 1.0), ("b", 1.5)):
            saved(tmp_path / f"{size}-{side}", {"model/m/w": torch.full((numel,), value)}, chunk_bytes=2**20)
    places = (tmp_path / name for name in ("small-a", "small-b", "big-a", "big-b"))
    differing, grown, _ = measured(4 * 2**20, *places)
    assert differing == 2**24
    assert 0 <= grown < 32 * 2**20, "as for the small tensor, whatever the size; the allocator keeps a little"


@pytest.mark.slow
def test_what_a_comparison_costs(tmp_path: Path) -> None:
    """Half a GiB in one tensor, and in 2,000 tensors: the figures of docs/reference/checkpoint-commands.md."""
    big = {"model/m/w": torch.randn(8192, 16384)}
    many = {f"model/m/w{number:05d}": torch.randn(256, 256) for number in range(2_000)}
    for kind, tensors, other in (
        ("one tensor", big, {"model/m/w": big["model/m/w"] * 1.001}),
        ("2,000 tensors", many, many),
    ):
        a, b = tmp_path / kind / "a", tmp_path / kind / "b"
        saved(a, tensors, "rows", 8, chunk_bytes=CHUNK_BYTES)
        saved(b, other, "rows", 4, chunk_bytes=CHUNK_BYTES)
        differing, grown, spent_s = measured(BATCH_BYTES, a, b)
        print(f"{kind}: {differing} elements differ, {grown / 2**20:.0f} MiB above the imports, {spent_s:.1f} s of CPU")
        assert BATCH_BYTES < grown < 400 * 2**20
        shutil.rmtree(tmp_path / kind)
