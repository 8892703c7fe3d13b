"""A candidate is read once: each rank reads its part into place, and all ranks share the rest."""

from __future__ import annotations

import gc
import random
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_world import LAYOUTS, blank, empty_store, on_ranks, same_bits, some_tensors

from disttrain.checkpoint import Checkpoint, SoleRank, newest_intact, parse_location, save_checkpoint
from disttrain.checkpoint.form.manifest import FileInfo
from disttrain.checkpoint.read import reader
from disttrain.checkpoint.read.chunk_ranges import all_chunks, divide_unread, merge_chunks
from disttrain.checkpoint.storage.chunk_reader import ChunkReader
from disttrain.errors import DamagedError, UnreadableError

CHUNK = 4096


def large_tensors(scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Tensors with rows that every world here divides evenly, and several chunks per rank."""
    return {f"model/m/{name}": torch.arange(36.0 * 240).view(36, 240) * scale + k for k, name in enumerate("abc")}


def save(root: Any, step: int, tensors: dict[str, torch.Tensor], layout: str = "rows", ranks: int = 2) -> Any:
    act = lambda own: save_checkpoint(  # noqa: E731
        root, step, LAYOUTS[layout](tensors, own.rank, ranks), {"step": step}, own, chunk_bytes=CHUNK
    )
    return on_ranks(ranks, act)[0]


def resume(root: Any, tensors: dict[str, torch.Tensor], layout: str, ranks: int) -> list[Any]:
    """Returns for each rank: the selected checkpoint, the rejected ones, and its shards after filling."""

    def act(own: Any) -> Any:
        shards = blank(LAYOUTS[layout](tensors, own.rank, ranks))
        found, rejected = newest_intact(root, own, lambda checkpoint: checkpoint.load_into(shards) and None)
        return found, rejected, shards

    return on_ranks(ranks, act)


def reject_other_bits(shards: Any, tensors: dict[str, torch.Tensor]) -> None:
    for shard in shards:
        assert same_bits(shard.tensor, tensors[shard.name][shard.box.slices()]), shard.name


@pytest.mark.parametrize("kept_in", ["disk", "store"])
@pytest.mark.parametrize(("saved", "loaded"), [(2, 2), (3, 3), (1, 1), (3, 1)])
def test_all_ranks_together_read_every_chunk_once(
    saved: int, loaded: int, kept_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with empty_store():
        root = parse_location(tmp_path if kept_in == "disk" else "memory://bucket/run")
        path = save(root, 7, large_tensors(), ranks=saved)
        files = Checkpoint.open(path).manifest.files
        chunks = all_chunks(files)
        assert len(chunks) >= 2 * saved * 3
        summed: list[tuple[str, int]] = []
        read: list[int] = []
        scatter, fill = ChunkReader.scatter, ChunkReader.fill

        def scattered(self: ChunkReader, chunk: int, places: Any, *, verify: bool) -> str | None:
            assert verify
            summed.append((self.name, chunk))
            return scatter(self, chunk, places, verify=verify)

        def filled(self: ChunkReader, view: memoryview, begin: int) -> str | None:
            read.append(len(view))
            return fill(self, view, begin)

        monkeypatch.setattr(ChunkReader, "scatter", scattered)
        monkeypatch.setattr(ChunkReader, "fill", filled)
        monkeypatch.setattr(reader, "_MOST_HEADERS", 64)  # the first bytes of all headers here, then the rest
        for found, rejected, shards in resume(root, large_tensors(), "rows", loaded):
            assert (found.step, rejected) == (7, [])
            reject_other_bits(shards, large_tensors())
        assert sorted(summed) == sorted(chunks)
        stored = sum(info.size for info in files.values())
        assert stored <= sum(read) <= stored + 1000 * saved, "a header is read before, to know where all is"


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_flip_anywhere_makes_every_rank_load_the_previous_checkpoint(layout: str, ranks: int, tmp_path: Path) -> None:
    """This holds also if no rank reads the chunk for its shards, and after tensors were filled from the damaged
    checkpoint.
    """
    old = {name: tensor.clone() for name, tensor in some_tensors().items()}
    for name in ("model/model/embed.weight", "optim/model/embed.weight:exp_avg"):
        old[name] = old[name] + 1
    save(tmp_path, 100, old)
    path = save(tmp_path, 200, some_tensors() | {"user/rank-9/own": torch.arange(3000.0)})
    files = sorted(path.iterdir())
    sizes = [file.stat().st_size for file in files]
    chosen = random.Random(f"{layout} {ranks}")
    for trial in range(14):
        file = path / "manifest.json" if trial == 0 else chosen.choices(files, sizes)[0]
        original = file.read_bytes()
        bit = chosen.randrange(len(original) * 8)
        content = bytearray(original)
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)

        def act(own: Any) -> Any:
            shards = blank(LAYOUTS[layout](old, own.rank, ranks))
            names = {shard.name for shard in shards}  # flat parts of a scalar belong to one rank
            fill = lambda one: one.load_into(shards, ignore=set(one.tensors) - names)  # noqa: E731
            return *newest_intact(tmp_path, own, fill), shards

        for found, rejected, shards in on_ranks(ranks, act):
            assert found.step == 100, (file.name, bit)
            ((what, why),) = rejected
            assert what == path
            assert file.name in why, (bit, why)
            reject_other_bits(shards, old)
        file.write_bytes(original)


def test_all_ranks_reject_a_checkpoint_that_one_rank_finds_damaged(tmp_path: Path) -> None:
    """The damage is in the last rows, which only the last rank reads. The others have filled theirs by then."""
    save(tmp_path, 1, large_tensors())
    path = save(tmp_path, 2, large_tensors(2.0))
    file = path / "rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for found, rejected, shards in resume(tmp_path, large_tensors(), "rows", 2):
        assert found.step == 1
        assert "rank 1" in rejected[0][1] and file.name in rejected[0][1]
        reject_other_bits(shards, large_tensors())


def test_an_error_while_filling_rejects_the_candidate_on_every_rank(tmp_path: Path) -> None:
    save(tmp_path, 1, large_tensors())
    save(tmp_path, 2, large_tensors())

    def act(own: Any) -> Any:
        def fill(one: Checkpoint) -> None:
            if own.rank == 1 and one.step == 2:
                raise RuntimeError("no room")

        return newest_intact(tmp_path, own, fill)

    for found, rejected in on_ranks(2, act):
        assert found.step == 1
        assert "RuntimeError: no room" in rejected[0][1]


def test_chunks_that_no_rank_read_are_shared_evenly() -> None:
    files = {"a": FileInfo(0, (0,) * 10), "b": FileInfo(0, (0,) * 4), "c": FileInfo(0, ())}
    chosen = random.Random(3)
    for _ in range(200):
        count = chosen.randrange(1, 6)
        read = [merge_chunks(chosen.sample(all_chunks(files), chosen.randrange(9))) for _ in range(count)]
        shares = divide_unread(files, read, count)
        expand = lambda runs: [(name, k) for name, first, stop in runs for k in range(first, stop)]  # noqa: E731
        known = {one for runs in read for one in expand(runs)}
        told = Counter(one for runs in shares for one in expand(runs))
        assert set(told) == set(all_chunks(files)) - known
        assert set(told.values()) <= {1}
        sizes = [len(expand(runs)) for runs in shares]
        assert max(sizes) - min(sizes) <= 1
    assert merge_chunks([("b", 1), ("a", 3), ("a", 1), ("a", 2)]) == [("a", 1, 4), ("b", 1, 2)]


def test_a_header_that_differs_in_a_second_reading_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first reading placed all tensors. The chunk that matches its checksum has different content."""
    save(tmp_path, 1, large_tensors())
    save(tmp_path, 2, large_tensors(2.0))
    plain = Checkpoint._bytes

    def misread(self: Checkpoint, reader: ChunkReader, begin: int, end: int) -> bytes:
        found = plain(self, reader, begin, end)
        swapped = found.replace(b"model/m/a", b"model/m/x").replace(b"model/m/b", b"model/m/a")
        return swapped.replace(b"model/m/x", b"model/m/b") if self.step == 2 else found

    monkeypatch.setattr(Checkpoint, "_bytes", misread)
    for found, rejected, shards in resume(tmp_path, large_tensors(), "rows", 2):
        assert found.step == 1
        assert "its header was read twice and differed" in rejected[0][1]
        reject_other_bits(shards, large_tensors())
    with pytest.raises(DamagedError, match="read twice"):
        Checkpoint.open(tmp_path / "step-00000002").load_into(blank(LAYOUTS["replicated"](large_tensors(), 0, 1)))


def test_a_file_that_has_become_unreadable_ends_the_search(tmp_path: Path) -> None:
    """The file may be intact. Continuing from an older checkpoint would discard trained steps."""
    for step in (1, 2):
        save(tmp_path, step, large_tensors())

    def act(own: Any) -> Any:
        def fill(one: Checkpoint) -> None:
            if own.rank == 1:
                raise UnreadableError("not any more")

        return newest_intact(tmp_path, own, fill)

    for found in on_ranks(2, act):
        assert isinstance(found, UnreadableError) and "not any more" in str(found)


def test_memory_filled_from_a_rejected_candidate_is_freed_at_once(tmp_path: Path) -> None:
    """Not at Python's next garbage collection, which a training script may have turned off."""
    path = save(tmp_path, 1, large_tensors())
    (path / "rank-00001.safetensors").write_bytes((path / "rank-00001.safetensors").read_bytes()[:-1] + b"?")
    made: list[weakref.ref[torch.Tensor]] = []

    def fill(one: Checkpoint) -> None:
        shards = blank(LAYOUTS["replicated"](large_tensors(), 0, 1))
        made.extend(weakref.ref(shard.tensor) for shard in shards)
        one.load_into(shards)

    gc.disable()
    try:
        assert newest_intact(tmp_path, SoleRank(), fill)[0] is None
        assert len(made) == 3
        assert [one() for one in made] == [None] * 3
    finally:
        gc.enable()
