"""The commit without a rename, in fsspec's memory store: the manifest makes a folder a checkpoint."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from checkpoint_world import LAYOUTS, blank, empty_store, on_ranks, same_bits, some_tensors

from disttrain.checkpoint import (
    Address,
    Checkpoint,
    Disk,
    SoleRank,
    address_fault,
    full_shard,
    holds_checkpoints,
    list_checkpoints,
    newest_intact,
    parse_location,
    prune,
    remove_stale_staging,
    save_checkpoint,
    set_aside,
    storage_of,
)
from disttrain.errors import CheckpointError

ROOT = Address("memory://bucket/run")
W = "model/m/w"


@pytest.fixture(autouse=True)
def store() -> Iterator[Any]:
    """The store's content by key, empty before and after."""
    with empty_store() as held:
        yield held


def save(step: int, ranks: int = 2, value: float | None = None, root: Address = ROOT) -> Address:
    tensors = some_tensors() if value is None else {W: torch.full((1500,), value)}
    found = on_ranks(
        ranks,
        lambda own: save_checkpoint(
            root, step, LAYOUTS["rows"](tensors, own.rank, ranks), {"step": step}, own, chunk_bytes=4096
        ),
    )
    assert found == [root / f"step-{step:08d}"] * ranks, found
    return found[0]


def content(store: Any) -> dict[str, bytes]:
    return {key: bytes(file.getbuffer()) for key, file in store.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 3])
def test_saved_by_any_ranks_and_loaded_bit_equal_by_any_others(layout: str, size: int) -> None:
    tensors = some_tensors()
    save(100, size)
    for ranks in (1, 2, 3):
        for rank in range(ranks):
            shards = blank(LAYOUTS[layout](tensors, rank, ranks))
            absent = {name for name in tensors if name not in {shard.name for shard in shards}}
            Checkpoint.open(str(ROOT / "step-00000100")).load_into(shards, ignore=absent)
            for shard in shards:
                assert same_bits(shard.tensor, tensors[shard.name][shard.box.slices()]), shard.name


def test_a_store_holds_the_bytes_that_a_disk_holds(tmp_path: Path, store: Any) -> None:
    save(100)
    on_ranks(
        2,
        lambda own: save_checkpoint(
            tmp_path, 100, LAYOUTS["rows"](some_tensors(), own.rank, 2), {"step": 100}, own, chunk_bytes=4096
        ),
    )
    on_disk = {f"/bucket/run/step-00000100/{file.name}": file.read_bytes() for file in tmp_path.glob("*/*")}
    assert content(store) == on_disk


@pytest.mark.parametrize("victim", [0, 1])
def test_all_ranks_learn_of_a_failed_operation_and_nothing_is_left(store: Any, victim: int) -> None:
    tensors = {W: torch.arange(3000.0), "model/m/b": torch.ones(5)}
    save(100)
    before_it = content(store)
    failing, seen = 0, []
    while failing <= len(seen):  # nothing fails in the last round
        seen = []

        def before(operation: str, place: Address, seen: list[str] = seen, failing: int = failing) -> None:
            seen.append(operation)
            if len(seen) == failing + 1:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(place))

        def act(ranks: Any, before: Any = before) -> Any:
            disk = Disk(before) if ranks.rank == victim else Disk()
            shards = LAYOUTS["rows"](tensors, ranks.rank, 2)
            return save_checkpoint(ROOT, 200, shards, {}, ranks, disk=disk, chunk_bytes=4096)

        found = on_ranks(2, act)
        if failing < len(seen):
            assert all(isinstance(e, CheckpointError) and "Input/output error" in str(e) for e in found), found
            assert len({str(error) for error in found}) == 1
            assert content(store) == before_it
        failing += 1
    assert {"create", "write", "sync"} <= set(seen)
    assert list_checkpoints(ROOT) == [ROOT / "step-00000100", ROOT / "step-00000200"]


class Killed(BaseException):
    """Stands for SIGKILL in a process that shares its store with the test."""


def test_a_writer_stopped_at_any_operation_leaves_the_previous_or_the_new_checkpoint(store: Any) -> None:
    state = [full_shard(W, torch.full((1500,), 2.0)), full_shard("model/m/v", torch.ones(7))]
    steps: list[int] = []
    killed = True
    while killed:
        store.clear()
        save(100, value=1.0)
        operations, as_it_was = 0, dict(store)

        def before(operation: str, place: Address, at: int = len(steps)) -> None:
            nonlocal operations, as_it_was
            operations += 1
            if operations == at + 1:
                as_it_was = dict(store)
                raise Killed

        try:
            save_checkpoint(ROOT, 200, state, {}, SoleRank(), disk=Disk(before), chunk_bytes=4096)
            killed = False
        except Killed:
            store.clear()
            store.update(as_it_was)  # a killed process cleans nothing up
        checkpoint, rejected = newest_intact(ROOT, SoleRank())
        assert checkpoint is not None
        assert rejected == []
        assert torch.equal(checkpoint.read(W), torch.full((1500,), {100: 1.0, 200: 2.0}[checkpoint.step]))
        committed = {path.name for path in list_checkpoints(ROOT)}
        left = {key.split("/")[-2] for key in store} - committed
        assert [path.name for path in remove_stale_staging(ROOT)] == sorted(left)
        assert {key.split("/")[-2] for key in store} == committed
        steps.append(checkpoint.step)
    assert steps[:-1] == [100] * (len(steps) - 1)
    assert steps[-1] == 200
    assert len(steps) > 5


def test_a_folder_without_a_manifest_is_not_listed_and_its_step_is_free_after_removal(store: Any) -> None:
    save(100)
    save(200)
    del store["/bucket/run/step-00000200/manifest.json"]
    assert list_checkpoints(ROOT) == [ROOT / "step-00000100"]
    found, rejected = newest_intact(ROOT, SoleRank())
    assert found is not None
    assert (found.step, rejected) == (100, [])
    with pytest.raises(CheckpointError, match="exists already"):
        save_checkpoint(ROOT, 200, [], {}, SoleRank())
    assert remove_stale_staging(ROOT) == [ROOT / "step-00000200"]
    assert save(200) == ROOT / "step-00000200"


def test_files_of_others_are_never_removed_as_leftovers(store: Any) -> None:
    fsspec.filesystem("memory").pipe_file("memory://bucket/run/step-00000300/thesis.pdf", b"years of work")
    fsspec.filesystem("memory").pipe_file("memory://bucket/run/notes.txt", b"more")
    assert remove_stale_staging(ROOT) == []
    assert len(store) == 2


def test_one_flipped_byte_is_detected_and_the_run_continues_from_the_previous_checkpoint(store: Any) -> None:
    for step in (100, 200, 300):
        save(step)
    store["/bucket/run/step-00000300/rank-00001.safetensors"].getbuffer()[-1] ^= 1
    store["/bucket/run/step-00000200/manifest.json"].getbuffer()[300] ^= 1
    found = on_ranks(3, lambda ranks: newest_intact(ROOT, ranks))
    for checkpoint, rejected in found:
        assert checkpoint.step == 100
        assert [path.name for path, _ in rejected] == ["step-00000300", "step-00000200"]
        assert "rank-00001.safetensors" in rejected[0][1]
    shards = blank(LAYOUTS["replicated"](some_tensors(), 0, 1))
    with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors, bytes \d+ to \d+: checksum"):
        Checkpoint.open(ROOT / "step-00000300").load_into(shards)
    assert all(same_bits(shard.tensor, torch.zeros_like(shard.tensor)) for shard in shards)


@pytest.mark.parametrize("at_once", [False, True])
def test_a_store_is_read_once_per_chunk_for_any_number_of_tensors(
    store: Any, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"model/m/small{number:03d}": torch.full((64,), float(number)) for number in range(100)}
    tensors["model/m/zz_large"] = torch.arange(5000.0)
    path = save_checkpoint(ROOT, 1, [full_shard(*item) for item in tensors.items()], {}, SoleRank(), chunk_bytes=4096)
    chunks = sum(len(info.chunks) for info in Checkpoint.open(path).manifest.files.values())
    asked: list[tuple[int, int]] = []
    system = type(fsspec.filesystem("memory"))
    plain = system.cat_file

    def counted(self: Any, where: str, start: int | None = None, end: int | None = None, **more: Any) -> bytes:
        if start is not None and end is not None:
            asked.append((start, end))
        return plain(self, where, start=start, end=end, **more)

    monkeypatch.setattr(system, "cat_file", counted)
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    checkpoint = Checkpoint.open(path)
    if at_once:
        checkpoint.verify_while_loading()
    checkpoint.load_into([full_shard(*item) for item in into.items()])
    assert all(torch.equal(into[name], tensor) for name, tensor in tensors.items())
    headers = -(-asked[0][1] // 4096) + 2
    assert len(asked) <= (1 if at_once else 2) * chunks + headers, "to check it and to fill, or once"


def test_a_modification_time_is_returned_or_unknown_or_rejected(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(1) / "manifest.json"
    told = storage_of(path).written_at(path)
    assert told is not None and told.tzinfo is not None
    assert storage_of(path).written_at(path.with_name("gone")) is None

    def fail(error: Exception) -> None:
        def modified(self: Any, where: str) -> None:
            raise error

        monkeypatch.setattr(type(fsspec.filesystem("memory")), "modified", modified)

    fail(NotImplementedError())
    assert storage_of(path).written_at(path) is None, "a driver that does not say"
    fail(PermissionError(errno.EACCES, "not yours"))
    with pytest.raises(CheckpointError, match="the store failed: not yours"):
        storage_of(path).written_at(path)


def test_a_missing_or_shortened_file_is_named(store: Any) -> None:
    path = save(100)
    name = "/bucket/run/step-00000100/rank-00001.safetensors"
    file = store[name]
    file.truncate(100)
    with pytest.raises(CheckpointError, match=r"rank-00001.safetensors.*\n.*100 bytes instead of \d+"):
        Checkpoint.open(path)
    del store[name]
    with pytest.raises(CheckpointError, match=r"rank-00001.safetensors.*\n.*no such file"):
        Checkpoint.open(path)
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint.open("memory://bucket/run/step-00000999")


def test_pruning_keeps_the_newest_and_the_protected_and_leaves_nothing_of_the_others(store: Any) -> None:
    paths = [save(step, value=1.0) for step in (1, 2, 3, 4, 5, 6)]
    del store["/bucket/run/step-00000006/rank-00000.safetensors"]
    assert prune(ROOT, 2, protect=[paths[1]]) == [paths[0], paths[2]]
    assert list_checkpoints(ROOT) == [paths[1], paths[3], paths[4], paths[5]]
    assert not [key for key in store if "step-00000001" in key or "step-00000003" in key]


def test_an_interrupted_removal_leaves_no_checkpoint(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [save(step, value=1.0) for step in (1, 2)]

    def fail(*_: Any, **__: Any) -> None:
        raise PermissionError("not allowed")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "rm", fail)
    with pytest.raises(CheckpointError, match="not allowed"):
        prune(ROOT, 1)
    monkeypatch.undo()
    assert list_checkpoints(ROOT) == [paths[1]]
    assert remove_stale_staging(ROOT) == [paths[0]]


def test_a_rejected_checkpoint_set_aside_keeps_its_bytes_and_frees_its_step(store: Any) -> None:
    path = save(100)
    there = {key.rsplit("/", 1)[-1]: value for key, value in content(store).items()}
    assert set_aside(path).name == "rejected-step-00000100-1"
    aside = {key.rsplit("/", 1)[-1]: value for key, value in content(store).items() if "/rejected-step" in key}
    assert aside == there
    assert set_aside(save(100)).name == "rejected-step-00000100-2"
    assert list_checkpoints(ROOT) == []
    assert save(100) == path


def test_stray_keys_are_named_and_never_read(store: Any) -> None:
    path = save(100)
    fsspec.filesystem("memory").pipe_file(f"{path}/model.pt", b"a pickle")
    assert Checkpoint.open(path).strays() == ["model.pt"]
    Checkpoint.open(path).verify()


def test_a_run_and_a_checkpoint_are_distinguished() -> None:
    path = save(100)
    assert holds_checkpoints(ROOT)
    assert not holds_checkpoints(path)
    assert not holds_checkpoints(Address("memory://bucket/elsewhere"))


def test_addresses_are_read_as_they_are_written() -> None:
    assert parse_location("runs/a") == Path("runs/a")
    assert parse_location("file:///data/a") == Path("/data/a")
    place = parse_location("s3://bucket/prefix/run/")
    assert isinstance(place, Address)
    assert str(place / "step-00000001") == "s3://bucket/prefix/run/step-00000001"
    assert (place.name, str(place.parent), str(place.with_name("b"))) == (
        "run",
        "s3://bucket/prefix",
        "s3://bucket/prefix/b",
    )
    with pytest.raises(TypeError):
        Path(place)  # type: ignore[arg-type] # as a path it would be the local folder s3:


@pytest.mark.parametrize(
    ("url", "found", "do"),
    [
        ("s3x://bucket/a", "Protocol not known: s3x", "did you mean s3"),
        ("zzzzzz://bucket/a", "Protocol not known", "s3, gs, abfs"),
        ("simplecache::s3://bucket/a", "a chain", "use the address of the store alone"),
        ("s3://", "does not name a bucket", "PROTOCOL://BUCKET"),
        ("adl://store/a", "adlfs", "install the package"),
    ],
)
def test_an_unusable_address_is_rejected_without_network_access(url: str, found: str, do: str) -> None:
    fault = address_fault(Address(url))
    assert fault is not None
    assert found in fault[0]
    assert do in fault[1]
    with pytest.raises(CheckpointError, match="Cannot store checkpoints at"):
        Checkpoint.open(url)
