"""Saved by k ranks in any layout, loaded by m ranks in any other: every bit is in its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_world import LAYOUTS, blank, on_ranks, same_bits, some_tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from disttrain.checkpoint import Box, Checkpoint, Shard, SoleRank, full_shard, save_checkpoint
from disttrain.errors import CheckpointError

DOCUMENT = {"progress": {"steps": 100}, "betas": (0.9, 0.999), "name": "Zoë", "off": None, "best": float("inf")}


def save(root: Path, layout: str, size: int, tensors=None, chunk_bytes: int = 4096, step: int = 100) -> Path:
    tensors = some_tensors() if tensors is None else tensors
    found = on_ranks(
        size,
        lambda ranks: save_checkpoint(
            root, step, LAYOUTS[layout](tensors, ranks.rank, size), DOCUMENT, ranks, chunk_bytes=chunk_bytes
        ),
    )
    assert found == [root / f"step-{step:08d}"] * size, found
    return found[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_every_layout_loads_into_every_other_bit_equal(tmp_path: Path, layout: str, size: int) -> None:
    tensors = some_tensors()
    path = save(tmp_path, layout, size)
    for other in LAYOUTS:
        for ranks in (1, 2, 3, 4):
            for rank in range(ranks):
                shards = blank(LAYOUTS[other](tensors, rank, ranks))
                absent = {name for name in tensors if name not in {shard.name for shard in shards}}
                Checkpoint.open(path).load_into(shards, ignore=absent)
                for shard in shards:
                    assert same_bits(shard.tensor, tensors[shard.name][shard.box.slices()]), (other, ranks, shard.name)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_box_of_a_tensor_larger_than_a_chunk_reads_right(tmp_path: Path, data: st.DataObject) -> None:
    shape = (7, 50, 11)  # 15,400 bytes over four chunks
    tensor = torch.arange(7 * 50 * 11, dtype=torch.int32).reshape(shape)
    layout, size = data.draw(st.sampled_from(["rows", "columns", "flat"])), data.draw(st.integers(1, 3))
    root = tmp_path / f"{layout}-{size}"
    path = root / "step-00000100"
    if not path.exists():
        save(root, layout, size, {"model/m/w": tensor})
    starts = [data.draw(st.integers(0, n)) for n in shape]
    box = Box(tuple(starts), tuple(data.draw(st.integers(0, n - s)) for s, n in zip(starts, shape, strict=True)))
    for verify in (True, False):
        assert same_bits(Checkpoint.open(path, verify=verify).read("model/m/w", box), tensor[box.slices()])


def test_the_document_comes_back_with_tuples_as_lists(tmp_path: Path) -> None:
    document = Checkpoint.open(save(tmp_path, "rows", 2)).document
    assert document == {**DOCUMENT, "betas": [0.9, 0.999]}


def test_replicated_state_is_written_once_and_distributed_over_the_ranks(tmp_path: Path) -> None:
    tensors = {f"model/m/{i}": torch.full((1000,), float(i)) for i in range(8)}
    path = save(tmp_path, "replicated", 4, tensors)
    sizes = [file.stat().st_size for file in sorted(path.glob("*.safetensors"))]
    assert len(sizes) == 4
    assert all(8000 < size < 9000 for size in sizes), sizes


def test_the_files_open_with_the_safetensors_library(tmp_path: Path) -> None:
    tensors = {name: t.contiguous() for name, t in some_tensors().items() if t.dtype is not torch.complex128}
    found = load_file(save(tmp_path, "replicated", 1, tensors) / "rank-00000.safetensors")
    assert set(found) == {name for name, t in tensors.items() if t.numel()}
    assert all(same_bits(found[name], tensors[name]) for name in found)


def test_the_manifest_is_plain_json_with_names_sizes_and_checksums(tmp_path: Path) -> None:
    path = save(tmp_path, "rows", 2)
    content = json.loads((path / "manifest.json").read_text())
    assert content["format"] == "disttrain-checkpoint"
    assert content["tensors"]["model/model/embed.weight"]["shape"] == [13, 7]
    assert content["files"]["rank-00001.safetensors"]["size"] == (path / "rank-00001.safetensors").stat().st_size


def test_a_stored_float_is_converted_to_the_shards_dtype(tmp_path: Path) -> None:
    path = save(tmp_path, "rows", 2, {"model/m/w": torch.tensor([1.0, 1 / 3])})
    into = torch.zeros(2, dtype=torch.bfloat16)
    Checkpoint.open(path).load_into([full_shard("model/m/w", into)])
    assert torch.equal(into, torch.tensor([1.0, 1 / 3]).bfloat16())


def test_a_strided_parameter_that_needs_gradients_is_filled(tmp_path: Path) -> None:
    tensor = torch.randn(6, 4)
    path = save(tmp_path, "rows", 2, {"model/m/w": tensor})
    into = torch.nn.Parameter(torch.zeros(4, 6).t())
    Checkpoint.open(path).load_into([full_shard("model/m/w", into)])
    assert torch.equal(into, tensor)


def test_all_missing_unexpected_and_misshapen_names_are_listed_and_nothing_is_written(tmp_path: Path) -> None:
    path = save(
        tmp_path, "rows", 2, {"model/m/a": torch.ones(3), "model/m/b": torch.ones(4), "model/m/c": torch.ones(2)}
    )
    a, b, d = torch.zeros(3), torch.zeros(5), torch.zeros(1)
    wanted = [full_shard("model/m/a", a), full_shard("model/m/b", b), full_shard("model/m/d", d)]
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path).load_into(wanted)
    text = str(caught.value)
    assert "missing: model/m/d" in text
    assert "unexpected: model/m/c" in text
    assert "model/m/b is (4,) in the checkpoint, (5,) here" in text
    assert not a.any()
    differences = Checkpoint.open(path).load_into([wanted[0], wanted[2]], strict=False)
    assert differences.missing == ("model/m/d",)
    assert differences.unexpected == ("model/m/b", "model/m/c")
    assert a.all()
    Checkpoint.open(path).load_into([wanted[0]], ignore={"model/m/b", "model/m/c"})


def test_an_integer_is_never_silently_converted_to_a_float(tmp_path: Path) -> None:
    path = save(tmp_path, "rows", 1, {"model/m/a": torch.arange(3)})
    with pytest.raises(CheckpointError, match=r"torch.int64 in the checkpoint, torch.float32 here"):
        Checkpoint.open(path).load_into([full_shard("model/m/a", torch.zeros(3))])


def test_an_unknown_name_is_rejected_with_the_near_ones(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model/model/bias"):
        Checkpoint.open(save(tmp_path, "rows", 1)).read("model/other/bias")


@pytest.mark.parametrize(
    ("shards", "fault"),
    [
        ([[Shard("model/m/w", (4,), Box((0,), (2,)), torch.zeros(2))]], "hold 2 of 4"),
        ([[full_shard("model/m/w", torch.zeros(4))], [full_shard("model/m/w", torch.zeros(4))]], "overlap"),
        ([[full_shard("model/m/w", torch.zeros(4))], [full_shard("model/m/w", torch.zeros(5))]], "on rank 1"),
        ([[full_shard("w", torch.zeros(4))]], "does not begin with one of model/"),
        ([[full_shard("model/m", torch.zeros(4))]], "KIND/OWNER/NAME"),
        ([[], [Shard("model/m/w", (4,), Box((0,), (4,)), torch.zeros(3))]], "rank 1"),
        ([[full_shard("model/m/w", torch.zeros(4, device="meta"))]], "meta"),
        ([[full_shard("model/m/w", torch.zeros(4), (2, 2))]], "replica 2 of 2"),
        ([[full_shard("model/m/w", torch.zeros(4)), full_shard("model/m/w", torch.ones(4))]], "twice"),
    ],
)
def test_shards_that_do_not_fit_are_rejected_on_all_ranks_before_a_byte_is_written(
    tmp_path: Path, shards, fault
) -> None:
    size = len(shards)
    found = on_ranks(size, lambda ranks: save_checkpoint(tmp_path / "c", 1, shards[ranks.rank], {}, ranks))
    assert all(isinstance(error, CheckpointError) and fault in str(error) for error in found), found
    assert len({str(error) for error in found}) == 1
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("document", [{"a": {1: 2}}, {"a": [{"b": torch.ones(1)}]}, {"a": {2, 3}}])
def test_a_document_that_json_would_change_is_rejected_with_its_place(tmp_path: Path, document) -> None:
    with pytest.raises(CheckpointError, match=r"document\.a"):
        save_checkpoint(tmp_path, 1, [], document, SoleRank())
    assert list(tmp_path.iterdir()) == []


def test_an_existing_name_is_never_written_into(tmp_path: Path) -> None:
    path = save(tmp_path, "rows", 2)
    before = (path / "manifest.json").read_bytes()
    with pytest.raises(CheckpointError, match="exists already"):
        save_checkpoint(tmp_path, 100, [], {}, SoleRank())
    assert (path / "manifest.json").read_bytes() == before
    (tmp_path / "step-00000200").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        save_checkpoint(tmp_path, 200, [], {}, SoleRank())


def test_hybrid_meshes_with_uneven_shards_on_two_axes_are_written_once(tmp_path: Path) -> None:
    """Two axes of two: x is sharded over the first and replicated over the second, y the reverse, both unevenly."""
    x, y = torch.randn(3, 4), torch.randn(5, 2)

    def cut(name: str, tensor: torch.Tensor, index: int, replica: int) -> Shard:
        per = -(-len(tensor) // 2)
        box = Box((index * per, 0), (min(per, len(tensor) - index * per), tensor.shape[1]))
        return Shard(name, tuple(tensor.shape), box, tensor[box.slices()].clone(), (replica, 2))

    def act(ranks) -> Path:
        a, b = divmod(ranks.rank, 2)
        return save_checkpoint(tmp_path, 1, [cut("model/m/x", x, a, b), cut("model/m/y", y, b, a)], {}, ranks)

    path = on_ranks(4, act)[0]
    assert torch.equal(Checkpoint.open(path).read("model/m/x"), x)
    assert torch.equal(Checkpoint.open(path).read("model/m/y"), y)
