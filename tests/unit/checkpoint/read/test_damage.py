"""Damage, malicious files, full disks and killed writers: committed data loads, damaged data never does."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_world import LAYOUTS, blank, on_ranks, same_bits, seal, some_tensors

from disttrain.checkpoint import (
    Box,
    Checkpoint,
    Disk,
    Shard,
    SoleRank,
    full_shard,
    list_checkpoints,
    newest_intact,
    prune,
    save_checkpoint,
    set_aside,
)
from disttrain.errors import CheckpointError, UnreadableError


def save(root: Path, step: int, ranks: int = 2, value: float | None = None, listed: bool = False) -> Path:
    """Save from several ranks that each hold rows.

    In rank order the boxes form a grid, in another order they are listed.
    """
    tensors = some_tensors() if value is None else {"model/m/w": torch.full((1500,), value)}
    act = lambda own: save_checkpoint(  # noqa: E731
        root,
        step,
        LAYOUTS["rows"](tensors, ranks - 1 - own.rank if listed else own.rank, ranks),
        {"step": step},
        own,
        chunk_bytes=4096,
    )
    return on_ranks(ranks, act)[0]


def load_all(path: Path) -> None:
    """Loads everything, as a resuming rank does."""
    checkpoint = Checkpoint.open(path)
    checkpoint.load_into(blank(LAYOUTS["replicated"](some_tensors(), 0, 1)))
    checkpoint.verify()


def test_four_hundred_single_bit_flips_are_all_detected(tmp_path: Path) -> None:
    path = save(tmp_path, 100)
    files = sorted(path.iterdir())
    sizes = [file.stat().st_size for file in files]
    chosen = random.Random(0)
    for trial in range(400):
        # every fourth in the manifest, the rest anywhere in the folder by size
        file = path / "manifest.json" if trial % 4 == 0 else chosen.choices(files, sizes)[0]
        content = bytearray(file.read_bytes())
        bit = chosen.randrange(len(content) * 8)
        content[bit // 8] ^= 1 << bit % 8
        original = file.read_bytes()
        file.write_bytes(content)
        with pytest.raises(CheckpointError):
            load_all(path)
        file.write_bytes(original)
    load_all(path)


def test_two_hundred_bit_flips_each_send_the_run_back_to_the_previous_and_name_the_file(tmp_path: Path) -> None:
    """Anywhere in the folder in proportion to size, every fourth in the manifest. No position is used twice."""
    save(tmp_path, 100)
    path = save(tmp_path, 200)
    files = sorted(path.iterdir())
    sizes = [file.stat().st_size for file in files]
    chosen, tried = random.Random(7), set()
    while len(tried) < 200:
        file = path / "manifest.json" if len(tried) % 4 == 0 else chosen.choices(files, sizes)[0]
        original = file.read_bytes()
        bit = chosen.randrange(len(original) * 8)
        if (file, bit) in tried:
            continue
        tried.add((file, bit))
        content = bytearray(original)
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        checkpoint, rejected = newest_intact(tmp_path, SoleRank())
        assert checkpoint is not None
        assert checkpoint.step == 100
        ((what, why),) = rejected
        assert what == path
        assert file.name in why, (bit, why)
        file.write_bytes(original)
    assert newest_intact(tmp_path, SoleRank())[1] == []


def test_any_zeroed_piece_and_any_two_swapped_ones_are_detected(tmp_path: Path) -> None:
    path = save(tmp_path, 100)
    piece = 64
    damaged = 0
    for file in sorted(path.iterdir()):
        original = file.read_bytes()
        starts = range(0, len(original), piece)
        contents = [original[:at] + bytes(len(original[at : at + piece])) + original[at + piece :] for at in starts]
        for at in starts[:-2]:
            a, b = original[at : at + piece], original[at + piece : at + 2 * piece]
            contents.append(original[:at] + b + a + original[at + 2 * piece :])
        for content in contents:
            if content != original:
                file.write_bytes(content)
                with pytest.raises(CheckpointError, match=re.escape(file.name)):
                    load_all(path)
                damaged += 1
        file.write_bytes(original)
    load_all(path)
    print(f"\n{damaged} of {damaged} zeroed or swapped pieces detected")
    assert damaged > 150


@pytest.mark.parametrize("name", ["manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"])
def test_truncated_emptied_zeroed_lengthened_missing_and_swapped_files_are_detected(tmp_path: Path, name: str) -> None:
    file = save(tmp_path, 100) / name
    original = file.read_bytes()
    for content in [original[:-1], original[: len(original) // 2], b"", bytes(len(original)), original + b"\0"]:
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"step-00000100"):
            load_all(file.parent)
    file.unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_all(file.parent)
    other = save(tmp_path / "other", 100, value=1.0) / name
    shutil.copy(other, file)
    with pytest.raises(CheckpointError):
        load_all(file.parent)


def test_damage_names_the_file_and_nothing_is_copied_before_it_is_detected(tmp_path: Path) -> None:
    path = save(tmp_path, 100)
    file = path / "rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    shards = blank(LAYOUTS["replicated"](some_tensors(), 0, 1))
    with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors, bytes \d+ to \d+: checksum"):
        Checkpoint.open(path).load_into(shards)
    assert all(same_bits(shard.tensor, torch.zeros_like(shard.tensor)) for shard in shards)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["straight", "through the buffer"])
def test_damage_after_verification_is_detected_while_tensors_are_filled(tmp_path: Path, dtype: Any) -> None:
    """In the requested bytes, between them, in the header: in every chunk that this process has not read before."""
    tensors = {f"model/m/{name}": torch.arange(float(size)) for name, size in (("a", 300), ("b", 2500), ("c", 40))}
    path = save_checkpoint(
        tmp_path, 1, [full_shard(*item) for item in tensors.items()], {}, SoleRank(), chunk_bytes=4096
    )
    file = path / "rank-00000.safetensors"
    found = Checkpoint.open(path)
    starts = {name: found.locate(name)[0].start for name in tensors}
    a, b = starts["model/m/a"], starts["model/m/b"]
    assert a < b < 4096 < b + 4 * 2500 - 4096 < starts["model/m/c"], "three chunks: b begins in the first"

    def load(*names: str) -> list[torch.Tensor]:
        checkpoint = Checkpoint.open(path)
        checkpoint.verify_while_loading()  # as after `newest_intact`: other ranks have read the chunk
        into = [torch.zeros(tensors[name].shape, dtype=dtype) for name in names]
        checkpoint.load_into([full_shard(*item) for item in zip(names, into, strict=True)], strict=False)
        return into

    assert torch.equal(load("model/m/b")[0], tensors["model/m/b"].to(dtype))
    whole = file.read_bytes()
    for place in (9, a, a + 1199, b, 4095, 4096, 4097, b + 4 * 2500 - 1, len(whole) - 1):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        what = "the header of {}" if place == 9 else r"{}, bytes \d+ to \d+: checksum"
        with pytest.raises(CheckpointError, match=what.format(r"rank-00000\.safetensors")):
            load("model/m/b", "model/m/c")
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert torch.equal(load("model/m/a")[0], tensors["model/m/a"].to(dtype)), "what is not read is not missed"


@pytest.mark.parametrize("at_once", [False, True])
def test_shards_may_ask_for_the_same_bytes_and_in_any_order(tmp_path: Path, at_once: bool) -> None:
    rows = torch.arange(120.0).view(30, 4)
    path = save_checkpoint(tmp_path, 1, [full_shard("model/m/w", rows)], {}, SoleRank(), chunk_bytes=4096)
    line = torch.arange(4000.0)
    other = save_checkpoint(tmp_path, 2, [full_shard("model/m/w", line)], {}, SoleRank(), chunk_bytes=4096)
    boxes = [Box((first, 0), (count, 4)) for first, count in ((20, 10), (0, 20), (10, 15), (0, 30), (29, 1))]
    second = (4096 - Checkpoint.open(other).locate("model/m/w")[0].start) // 4  # the second chunk's first element
    parts = [Box((0,), (4000,)), Box((second,), (1024,)), Box((second + 1024,), (100,))]
    cases = [(path, rows, boxes), (path, rows, boxes[:2]), (other, line, parts), (other, line, parts[:2])]
    for where, tensor, chosen in [*cases, *((where, tensor, chosen[::-1]) for where, tensor, chosen in cases)]:
        checkpoint = Checkpoint.open(where)
        if at_once:
            checkpoint.verify_while_loading()
        shards = [Shard("model/m/w", tuple(tensor.shape), box, torch.zeros(box.sizes)) for box in chosen]
        checkpoint.load_into(shards)
        assert all(torch.equal(shard.tensor, tensor[shard.box.slices()]) for shard in shards)


def test_resuming_uses_the_newest_intact_checkpoint_and_says_what_was_wrong(tmp_path: Path) -> None:
    for step in (100, 200, 300, 400):
        save(tmp_path, step, value=float(step))
    (tmp_path / "step-00000400" / "manifest.json").unlink()
    file = tmp_path / "step-00000300" / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"abcd")
    (tmp_path / "step-00000200").rename(tmp_path / "step-00000250")  # intact, but its content belongs to another step
    for size in (1, 3):
        found = on_ranks(size, lambda ranks: newest_intact(tmp_path, ranks))
        for checkpoint, rejected in found:
            assert checkpoint.step == 100
            assert [path.name for path, _ in rejected] == ["step-00000400", "step-00000300", "step-00000250"]
            assert "manifest.json" in rejected[0][1]
            assert "rank-00001.safetensors" in rejected[1][1]
            assert "it contains step 200" in rejected[2][1]
        assert len({str(rejected) for _, rejected in found}) == 1


def test_a_checkpoint_of_a_newer_format_ends_the_search_and_is_unchanged(tmp_path: Path) -> None:
    """Continuing from an older checkpoint would discard what a newer disttrain has trained."""
    save(tmp_path, 100)
    newer = save(tmp_path, 200)
    seal(newer, lambda m: m.update(version=2))
    for found in on_ranks(2, lambda own: newest_intact(tmp_path, own)):
        assert isinstance(found, UnreadableError) and "format version 2" in str(found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000100", "step-00000200"]


def test_there_is_nothing_to_resume_from_in_an_empty_or_absent_folder(tmp_path: Path) -> None:
    assert newest_intact(tmp_path, SoleRank()) == (None, [])
    assert newest_intact(tmp_path / "absent", SoleRank()) == (None, [])


def _evil(name: str, change: Callable[[dict[str, Any]], None], found: str) -> Any:
    return pytest.param(change, found, id=name)


W = "model/m/w"
FIRST = "rank-00000.safetensors"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        _evil("outside", lambda m: m["files"].update({"../x.safetensors": m["files"].pop(FIRST)}), "plain name"),
        _evil("absolute", lambda m: m["files"].update({"/etc/x.safetensors": m["files"].pop(FIRST)}), "plain name"),
        _evil("unlisted", lambda m: m["tensors"][W]["boxes"][0].__setitem__(2, "/etc/passwd"), "not one of the files"),
        _evil("hole", lambda m: m["tensors"][W]["boxes"].pop(), "hold 750 of 1500"),
        _evil("overlap", lambda m: m["tensors"][W]["boxes"].append(m["tensors"][W]["boxes"][0]), "overlap"),
        _evil("outside its shape", lambda m: m["tensors"][W].update(shape=[1499]), "not inside shape"),
        _evil("absurd shape", lambda m: m["tensors"][W].update(shape=[2**62, 2**62]), "impossible shape"),
        _evil("absurd number", lambda m: m["tensors"][W].update(shape=[10**100]), "shape of model/m/w"),
        _evil("negative", lambda m: m["tensors"][W].update(shape=[-1]), "is -1"),
        _evil("fraction", lambda m: m["tensors"][W].update(shape=[1500.0]), "is 1500.0"),
        _evil("beyond the file", lambda m: m["tensors"][W]["boxes"][0].__setitem__(3, 2**40), "is stored at bytes"),
        _evil("unaligned", lambda m: m["tensors"][W]["boxes"][0].__setitem__(3, 1), "is stored at bytes"),
        _evil("shared bytes", lambda m: m["tensors"].update({"model/m/v": m["tensors"][W]}), "share bytes"),
        _evil("dtype", lambda m: m["tensors"][W].update(dtype="object"), "'object'"),
        _evil("dtype of no kind", lambda m: m["tensors"][W].update(dtype=[1]), "as a manifest"),
        _evil("name", lambda m: m["tensors"].update({"w": m["tensors"].pop(W)}), "begin with one of"),
        _evil("chunks", lambda m: m["files"][FIRST]["chunks"].append(0), "checksums for"),
        _evil("chunk size", lambda m: m.update(chunk_bytes=2**50), "chunk_bytes"),
        _evil("no step", lambda m: m.pop("step"), "no 'step'"),
        _evil("list", lambda m: m.update(tensors=[]), "not an object"),
        _evil("someone else's", lambda m: m.update(format="other"), "another program's format"),
        _evil("newer", lambda m: m.update(version=2), "upgrade disttrain"),
    ],
)
def test_an_inconsistent_manifest_is_rejected(tmp_path: Path, change, found: str) -> None:
    path = save(tmp_path, 100, value=3.0, listed=True)
    reject_changed(path, change, found)


def reject_changed(path: Path, change: Callable[[dict[str, Any]], None], found: str) -> None:
    seal(path, lambda manifest: None)
    Checkpoint.open(path).verify()  # recomputing the digest alone changes nothing
    seal(path, change)
    with pytest.raises(CheckpointError, match=r"step-00000100") as caught:
        Checkpoint.open(path)
    assert found in str(caught.value)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        _evil("no steps", lambda m: m["tensors"][W].pop("steps"), "no 'steps'"),
        _evil("step of nothing", lambda m: m["tensors"][W].update(steps=[0]), "in steps of (0,)"),
        _evil("step beyond", lambda m: m["tensors"][W].update(steps=[1501]), "in steps of (1501,)"),
        _evil("too few steps", lambda m: m["tensors"][W].update(steps=[]), "in steps of ()"),
        _evil("more boxes than files", lambda m: m["tensors"][W].update(steps=[1]), "1500 files, of which there are 2"),
        _evil("absurd", lambda m: m["tensors"][W].update(shape=[2**60], steps=[1]), f"{2**60} files"),
        _evil("two in a file", lambda m: m["tensors"][W].update(strides=[0]), "several boxes in one file"),
        _evil("absent files", lambda m: m["tensors"][W].update(first=7), "rank-00007.safetensors"),
        _evil("absurd rank", lambda m: m["tensors"][W].update(first=2**62), "not one of the files"),
        _evil("negative stride", lambda m: m["tensors"][W].update(strides=[-1]), "is -1"),
    ],
)
def test_an_inconsistent_grid_is_rejected(tmp_path: Path, change, found: str) -> None:
    reject_changed(save(tmp_path, 100, value=3.0), change, found)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        _evil("other shape", lambda h: h["model/m/w[0:750]"].update(shape=[375, 2]), "model/m/w[0:750] is stored as"),
        _evil("other dtype", lambda h: h["model/m/w[0:750]"].update(dtype="I32"), "model/m/w[0:750] is stored as"),
        _evil("other name", lambda h: h.update({"model/m/v": h.pop("model/m/w[0:750]")}), "no model/m/w[0:750]"),
        _evil("beyond", lambda h: h["model/m/w[0:750]"].update(data_offsets=[0, 2**40]), "the boxes end at byte"),
        _evil("shifted", lambda h: h["model/m/w[0:750]"].update(data_offsets=[8, 3000]), "a gap or overlap at byte"),
        _evil("no numbers", lambda h: h["model/m/w[0:750]"].update(data_offsets=["a", "b"]), "does not fit"),
        _evil("no offsets", lambda h: h["model/m/w[0:750]"].pop("data_offsets"), "does not fit"),
        _evil("a list", lambda h: h.update({"model/m/w[0:750]": []}), "does not fit"),
    ],
)
def test_a_false_header_is_rejected_before_anything_is_written(tmp_path: Path, change, found: str) -> None:
    path = save(tmp_path, 100, value=3.0)
    file = path / FIRST
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    changed = len(text).to_bytes(8, "little") + text + raw[8 + length :]
    file.write_bytes(changed)
    chunks = [zlib.crc32(changed[at : at + 4096]) for at in range(0, len(changed), 4096)]
    seal(path, lambda m: m["files"].update({FIRST: {"size": len(changed), "chunks": chunks}}))
    target = full_shard("model/m/w", torch.zeros(1500))
    with pytest.raises(CheckpointError, match=r"header of rank-00000.safetensors does not fit") as caught:
        Checkpoint.open(path).load_into([target])
    assert found in str(caught.value)
    assert not target.tensor.any()


@pytest.mark.parametrize("listed", [False, True])
def test_random_values_anywhere_in_a_manifest_never_raise_another_error(tmp_path: Path, listed: bool) -> None:
    path = save(tmp_path, 100, value=3.0, listed=listed)
    original = (path / "manifest.json").read_bytes()
    chosen = random.Random(1)
    values = [None, -1, 0, 2**70, 1.5, "x", "", [], {}, [[]], [{}], True, {"a": 1}, ["x"], [None]]

    def change(node: Any) -> None:
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                return
            key = chosen.choice(keys)
            if isinstance(node[key], dict | list) and node[key] and chosen.random() < 0.8:
                node = node[key]
                continue
            node[key] = chosen.choice(values)
            return

    for _ in range(500):
        (path / "manifest.json").write_bytes(original)
        seal(path, change)
        try:
            checkpoint = Checkpoint.open(path)
            checkpoint.verify()
            checkpoint.load_into([full_shard(W, torch.zeros(1500))])
        except CheckpointError:
            pass


@pytest.mark.parametrize("name", ["manifest.json", FIRST])
def test_links_and_pipes_are_rejected(tmp_path: Path, name: str) -> None:
    file = save(tmp_path, 100) / name
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="a link"):
        load_all(file.parent)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_all(file.parent)


def test_a_pickle_of_any_name_is_never_run(tmp_path: Path) -> None:
    witness = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(witness),)

    trap = pickle.dumps(Trap())
    path = save(tmp_path, 100)
    for stray in ["model.pt", ".metadata", "rank-00009.safetensors", "manifest.pkl"]:
        (path / stray).write_bytes(trap)
    load_all(path)
    assert Checkpoint.open(path).strays() == [".metadata", "manifest.pkl", "model.pt", "rank-00009.safetensors"]
    for name in ["manifest.json", FIRST]:
        original = (path / name).read_bytes()
        (path / name).write_bytes(trap)
        with pytest.raises(CheckpointError):
            load_all(path)
        (path / name).write_bytes(original)
    assert not witness.exists()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([], "an empty folder"),
        ([".metadata", "__0_0.distcp"], "torch distributed checkpoint"),
        (["latest", "zero_pp_rank_0"], "DeepSpeed checkpoint"),
        (["notes.txt"], "no manifest.json among notes.txt"),
    ],
)
def test_a_folder_in_a_foreign_format_is_named(tmp_path: Path, content: list[str], found: str) -> None:
    for name in content:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=found):
        Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint.open(tmp_path / "absent")


def test_a_full_disk_is_reported_with_the_required_and_free_space_and_leaves_nothing(small_disk: Path) -> None:
    root = small_disk / "checkpoints"
    first = save(root, 100)
    state = [full_shard("model/m/w", torch.zeros(200_000)), full_shard("model/m/v", torch.zeros(200_000))]
    found = on_ranks(2, lambda ranks: save_checkpoint(root, 200, state if ranks.rank else [], {}, ranks))
    for error in found:
        assert isinstance(error, CheckpointError)
        text = str(error)
        assert os.strerror(errno.ENOSPC) in text
        assert "rank 1" in text
        assert re.search(r"needs 160\d{4} bytes, \d+ were free before it and \d+ are now", text)
    assert list(root.iterdir()) == [first]
    load_all(first)


@pytest.mark.parametrize("victim", [0, 1])
def test_all_ranks_learn_of_a_failed_operation_and_nothing_is_left(tmp_path: Path, victim: int) -> None:
    tensors = {"model/m/w": torch.arange(3000.0), "model/m/b": torch.ones(5)}
    failing, seen = 0, []
    while failing <= len(seen):  # nothing fails in the last round
        root, seen = tmp_path / str(failing), []
        first = save(root, 100)

        def before(operation: str, path: Path, seen: list[str] = seen, failing: int = failing) -> None:
            seen.append(operation)
            if len(seen) == failing + 1:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

        def act(ranks, root: Path = root, before=before):
            disk = Disk(before) if ranks.rank == victim else Disk()
            shards = LAYOUTS["rows"](tensors, ranks.rank, 2)
            return save_checkpoint(root, 200, shards, {}, ranks, disk=disk, chunk_bytes=4096)

        found = on_ranks(2, act)
        failed = failing < len(seen)
        # The commit is the rename. If only the folder's sync after it fails, the checkpoint exists and is intact.
        committed = not failed or seen[failing - 1] == "rename"
        if failed:
            assert all(isinstance(e, CheckpointError) and "Input/output error" in str(e) for e in found), found
            assert len({str(error) for error in found}) == 1
        assert sorted(root.iterdir()) == [first, *([root / "step-00000200"] if committed else [])]
        load_all(first)
        assert newest_intact(root, SoleRank())[1] == []
        failing += 1
    assert {"create", "write", "sync", "sync_folder"} <= set(seen)


def test_pruning_keeps_the_newest_and_the_protected_and_does_not_count_the_broken(tmp_path: Path) -> None:
    paths = [save(tmp_path, step, value=1.0) for step in (1, 2, 3, 4, 5, 6)]
    (paths[5] / FIRST).unlink()
    assert prune(tmp_path, 2, protect=[paths[1]]) == [paths[0], paths[2]]
    assert list_checkpoints(tmp_path) == [paths[1], paths[3], paths[4], paths[5]]
    with pytest.raises(ValueError, match="at least 1"):
        prune(tmp_path, 0)


def test_a_rejected_checkpoint_set_aside_frees_its_step(tmp_path: Path) -> None:
    path = save(tmp_path, 100)
    aside = set_aside(path)
    assert aside.name == "rejected-step-00000100-1"
    assert set_aside(save(tmp_path, 100)).name == "rejected-step-00000100-2"
    assert list_checkpoints(tmp_path) == []
    assert save(tmp_path, 100) == path


def test_a_rank_that_raises_anything_ends_the_save_on_all_ranks(tmp_path: Path) -> None:
    class Broken:
        name = "model/m/w"

        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("user code")

    found = on_ranks(3, lambda ranks: save_checkpoint(tmp_path, 1, [Broken()] if ranks.rank == 1 else [], {}, ranks))
    assert all(
        isinstance(error, CheckpointError) and "rank 1: RuntimeError: user code" in str(error) for error in found
    )
    assert list(tmp_path.iterdir()) == []
