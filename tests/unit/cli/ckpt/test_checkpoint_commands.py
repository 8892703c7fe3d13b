"""`disttrain ckpt` on real folders: its output against their bytes, its rejections, and what prune must never do."""

from __future__ import annotations

import fnmatch
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pytest
import torch
from checkpoint_world import LAYOUTS, empty_store, on_ranks, seal, some_tensors

from disttrain.checkpoint import Address, save_checkpoint
from disttrain.cli import main as cli_main
from disttrain.cli.ckpt.find import CheckpointStatus
from disttrain.engine.checkpointing.documents import tracked_shards
from disttrain.engine.checkpointing.random_state import random_shards
from disttrain.engine.checkpointing.snapshot import RANKS
from disttrain.report import RunFolder


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.fixture
def ckpt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Done]]:
    """The function of the console script. Returns exit code, stdout and stderr of `disttrain ckpt ARGUMENTS`."""
    logger = logging.getLogger("disttrain")
    before = (list(logger.handlers), logger.level, logger.propagate)

    def command(*arguments: str | Path) -> Done:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["disttrain", "ckpt", *map(str, arguments)])
        try:
            cli_main()
        except SystemExit as ended:
            return Done(int(ended.code or 0), *capsys.readouterr())
        return Done(0, *capsys.readouterr())

    yield command
    logger.handlers[:], logger.level, logger.propagate = before


def document(step: int, **more: Any) -> dict[str, Any]:
    """The document in the form that the engine writes."""
    group = {"members": ["w", "b"], "lr": 0.1}
    return {
        "progress": {"steps": step, "samples": 8 * step, "tokens": 0, "positions": {"train": {"position": 8 * step}}},
        "config": {"run": {"name": "r"}, "strategy": {"name": "fsdp"}},
        "folder": "/somewhere",
        "optim": {"m": {"updates": step, "optimizer": "torch.optim.adamw:AdamW", "groups": [group]}},
        "user": {},
        "writer": {"strategy": "fsdp", "mesh": {"replicate": 1, "shard": 2, "tensor": 1}},
        **more,
    }


def save(
    run: Path, step: int, ranks: int = 2, layout: str = "rows", tensors: Mapping[str, Any] | None = None, **more: Any
) -> Path:
    held = some_tensors() if tensors is None else tensors
    act = lambda own: save_checkpoint(  # noqa: E731
        run / "checkpoints", step, LAYOUTS[layout](held, own.rank, ranks), document(step, **more), own, chunk_bytes=4096
    )
    found = on_ranks(ranks, act)[0]
    assert isinstance(found, Path), found
    return found


def flip(file: Path, at: int = -1) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# ---------------------------------------------------------------------- ls


def test_ls_shows_checkpoints_whether_they_are_intact_and_other_folders(
    tmp_path: Path, ckpt: Callable[..., Done]
) -> None:
    run = tmp_path / "run"
    whole, lacking, cut, bare, renamed = (save(run, step) for step in (100, 200, 300, 400, 500))
    (lacking / "rank-00001.safetensors").unlink()
    os.truncate(cut / "rank-00000.safetensors", 10)
    (bare / "manifest.json").unlink()
    renamed.rename(run / "checkpoints" / "step-00000450")
    (whole / "notes.txt").write_text("seven b")
    (run / "checkpoints" / ".tmp-step-00000600-ab12").mkdir()
    (run / "checkpoints" / ".tmp-step-00000600-ab12" / "rank-00000.safetensors").write_bytes(bytes(33))
    save(tmp_path / "other", 7).rename(run / "checkpoints" / "rejected-step-00000007-1")
    (run / "checkpoints" / "readme").write_text("mine")
    before = contents(run)

    done = ckpt("ls", run, "--json")
    assert done.code == 0
    rows = {row["name"]: row for row in done.json["checkpoints"]}
    assert [row["step"] for row in done.json["checkpoints"]] == [100, 200, 300, 400, 500], "by the folders' order"
    first = rows["step-00000100"]
    assert first["bytes"] == sum(path.stat().st_size for path in whole.iterdir())
    assert (first["tensors"], first["strategy"], first["ranks"]) == (len(some_tensors()), "fsdp", 2)
    assert first["mesh"] == {"replicate": 1, "shard": 2, "tensor": 1}
    assert (first["intact"], first["faults"], first["strays"]) == (True, [], ["notes.txt"])
    assert {name: row["faults"] for name, row in rows.items() if not row["intact"]} == {
        "step-00000200": ["rank-00001.safetensors: No such file or directory"],
        "step-00000300": [
            f"rank-00000.safetensors: 10 bytes instead of {len(before[str(whole / 'rank-00000.safetensors')])}"
        ],
        "step-00000400": [
            "manifest.json: no manifest.json among rank-00000.safetensors, rank-00001.safetensors "
            "(name an intact folder step-NNNNNNNN of a run)"
        ],
        "step-00000450": ["the folder name does not match step 500 of the manifest: rename the folder back"],
    }
    others = {one["name"]: (one["what"].partition(":")[0], one["bytes"]) for one in done.json["others"]}
    assert others[".tmp-step-00000600-ab12"] == ("staging", 33)
    assert others["readme"] == ("stray", 4)
    assert others["rejected-step-00000007-1"][0] == "set aside"

    text = ckpt("ls", run / "checkpoints").out
    assert re.search(r"^100 .* fsdp, 2 ranks, shard 2 +yes$", text, re.MULTILINE)
    assert "step-00000200: rank-00001.safetensors: No such file" in text and "readme (4 B): stray" in text
    assert contents(run) == before


def test_ls_accepts_one_checkpoint_and_its_code_says_that_none_is_intact(
    tmp_path: Path, ckpt: Callable[..., Done]
) -> None:
    path = save(tmp_path / "run", 100)
    assert [row["step"] for row in ckpt("ls", path, "--json").json["checkpoints"]] == [100]
    (path / "rank-00000.safetensors").unlink()
    for place in (path, tmp_path / "run"):
        done = ckpt("ls", place)
        assert done.code == 5
        assert "step-00000100: rank-00000.safetensors: No such file" in done.out


# ---------------------------------------------------------------------- inspect


def test_inspect_shows_the_position_of_each_tensors_bytes(tmp_path: Path, ckpt: Callable[..., Done]) -> None:
    path = save(tmp_path / "run", 100)
    save(tmp_path / "run", 50)
    (save(tmp_path / "run", 200) / "rank-00000.safetensors").unlink()
    found = ckpt("inspect", tmp_path / "run", "--json").json
    assert found["path"] == str(path), "the newest whose files are all there"
    assert found == ckpt("inspect", path, "--json").json
    assert (found["step"], found["ranks"], found["progress"]) == (100, 2, document(100)["progress"])
    assert found["optim"] == document(100)["optim"]
    tensors = some_tensors()
    assert set(found["tensors"]) == set(tensors)
    for name, tensor in tensors.items():
        one = found["tensors"][name]
        assert (one["shape"], f"torch.{one['dtype']}") == (list(tensor.shape), str(tensor.dtype))
        assert one["bytes"] == tensor.numel() * tensor.element_size()
        for box in one["boxes"]:
            assert box["file"] == f"rank-{box['rank']:05d}.safetensors"
            part = tensor
            for dim, (offset, size) in enumerate(zip(box["offsets"], box["sizes"], strict=True)):
                part = part.narrow(dim, offset, size)
            held = torch.empty(part.shape, dtype=part.dtype).copy_(part).reshape(-1, 1).view(torch.uint8)
            assert box["bytes"] == held.numel() and held.numpy().tobytes() in (path / box["file"]).read_bytes()


def test_inspect_shows_a_part_by_name_and_the_boxes(tmp_path: Path, ckpt: Callable[..., Done]) -> None:
    path = save(tmp_path / "run", 100)
    pattern = "*/embed.weight*"
    chosen = fnmatch.filter(some_tensors(), pattern)
    assert len(chosen) == 4
    assert set(ckpt("inspect", path, "--name", pattern, "--json").json["tensors"]) == set(chosen)
    text = ckpt("inspect", path, "--name", pattern, "--boxes").out
    assert "m: torch.optim.adamw:AdamW, 100 updates\n  group 0: 2 tensors; lr 0.1\n" in text
    assert re.search(r"^model/model/embed.weight +13x7 +float32 +364 B +2 +ranks 0-1$", text, re.MULTILINE)
    assert re.search(r"^ +\[7:13,0:7\] 168 B in rank-00001.safetensors$", text, re.MULTILINE)
    assert f"4 of {len(some_tensors())} tensors" in text
    none = ckpt("inspect", path, "--name", "model/*/nothing")
    assert (none.code, none.out) == (2, "")
    assert "none of 14 names matches" in none.err


# ---------------------------------------------------------------------- verify


def test_verify_reads_every_byte_and_names_every_fault(tmp_path: Path, ckpt: Callable[..., Done]) -> None:
    run = tmp_path / "run"
    big = {"model/m/w": torch.arange(9000.0)}
    good, rotten, lacking, sealed = (save(run, step, tensors=big) for step in (100, 200, 300, 400))
    assert ckpt("verify", run).code == 0
    flip(rotten / "rank-00000.safetensors", at=5000)
    flip(rotten / "rank-00001.safetensors", at=4095)
    flip(rotten / "rank-00001.safetensors", at=4096)
    (lacking / "rank-00000.safetensors").unlink()
    flip(lacking / "rank-00001.safetensors")
    flip(sealed / "manifest.json", at=300)
    (good / "stray.bin").write_bytes(b"x")
    assert ckpt("ls", rotten, "--json").json["checkpoints"][0]["intact"] is True, "ls reads no content"

    done = ckpt("verify", run, "--json")
    assert (done.code, done.json["ok"]) == (5, False)
    found = {one["name"]: [fault.split(": checksum")[0] for fault in one["faults"]] for one in done.json["checkpoints"]}
    size = (rotten / "rank-00001.safetensors").stat().st_size
    assert found == {
        "step-00000100": [],
        "step-00000200": [
            "rank-00000.safetensors, bytes 4096 to 8192",
            "rank-00001.safetensors, bytes 0 to 4096",
            "rank-00001.safetensors, bytes 4096 to 8192",
        ],
        "step-00000300": [
            "rank-00000.safetensors: No such file or directory",
            f"rank-00001.safetensors, bytes {size // 4096 * 4096} to {size}",
        ],
        "step-00000400": [
            "manifest.json: its bytes do not match its digest (the file is damaged: use another checkpoint)"
        ],
    }
    assert done.json["checkpoints"][0]["strays"] == ["stray.bin"]
    text = ckpt("verify", run).out
    assert "step-00000100: intact, 1 tensors" in text and "stray file stray.bin" in text
    assert "4 checkpoints, 3 damaged" in text
    assert ckpt("verify", good).code == 0, "a stray file is no damage"
    assert ckpt("verify", rotten).code == 5


def test_files_that_a_run_removes_meanwhile_are_no_damage(
    tmp_path: Path, ckpt: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save(tmp_path / "run", step)
    plain = CheckpointStatus.content_faults

    def removed_first(one: CheckpointStatus) -> Iterator[str]:
        if one.step == 1:
            shutil.rmtree(one.path)
        return plain(one)

    monkeypatch.setattr(CheckpointStatus, "content_faults", removed_first)
    done = ckpt("verify", tmp_path / "run", "--json")
    assert (done.code, [one["step"] for one in done.json["checkpoints"]]) == (0, [2])


# ---------------------------------------------------------------------- diff


def test_diff_of_one_state_from_two_worlds_is_equal(tmp_path: Path, ckpt: Callable[..., Done]) -> None:
    a = save(tmp_path / "a", 100, ranks=3, layout="flat")
    b = save(tmp_path / "b", 100, ranks=2, layout="columns", writer={"strategy": "ddp", "mesh": {}}, config={})
    done = ckpt("diff", a, tmp_path / "b", "--json")
    assert (done.code, done.json["same"], done.json["equal"]) == (0, True, len(some_tensors()))
    assert {leaf["key"].split(".")[0] for leaf in done.json["metadata"]} == {"config", "writer"}
    text = ckpt("diff", a, b)
    assert text.code == 0
    assert "Equal: 14 tensors are bit-equal, and all other state." in text.out
    assert "writer.strategy: fsdp in A, ddp in B" in text.out


def test_diff_shows_what_differs_by_size_and_in_the_state(tmp_path: Path, ckpt: Callable[..., Done]) -> None:
    tensors = {"model/m/w": torch.zeros(4, 5), "model/m/b": torch.ones(3), "optim/m/w:step": torch.tensor(1.0)}
    other = {"model/m/w": torch.zeros(4, 5), "model/m/b": torch.ones(3), "ema/m/w": torch.zeros(2)}
    other["model/m/w"][2, 3] = -0.25
    other["model/m/b"][1] = torch.nan
    a, b = save(tmp_path / "a", 100, tensors=tensors), save(tmp_path / "b", 110, tensors=other, user={"x": [1, 2]})
    done = ckpt("diff", a, b, "--json")
    assert (done.code, done.json["same"]) == (1, False)
    assert (done.json["only_a"], done.json["only_b"]) == (["optim/m/w:step"], ["ema/m/w"])
    nan, number = done.json["differences"]
    assert (nan["name"], nan["nans"], nan["nan"]) == ("model/m/b", 1, {"at": [1], "a": 1.0, "b": "nan"})
    assert (number["name"], number["differing"], number["elements"]) == ("model/m/w", 1, 20)
    assert number["absolute"] == {"value": 0.25, "at": [2, 3], "a": 0.0, "b": -0.25}
    assert number["relative"]["value"] == 1.0
    assert done.json["state"] == [
        {"key": "step", "a": 100, "b": 110},
        {"key": "progress.steps", "a": 100, "b": 110},
        {"key": "progress.samples", "a": 800, "b": 880},
        {"key": "progress.positions.train.position", "a": 800, "b": 880},
        {"key": "optim.m.updates", "a": 100, "b": 110},
        {"key": "user.x", "b": [1, 2]},
    ]
    text = ckpt("diff", a, b).out
    assert "only in A: optim/m/w:step" in text and "user.x: absent in A, [1, 2] in B" in text
    assert re.search(r"^model/m/w +4x5 +float32 +1/20 +0\.25 +\[2,3\] +0 +-0\.25 +1 +\[2,3\]$", text, re.MULTILINE)
    assert "NaN on one side in 1, first at [1]: 1 in A, nan in B" in text
    assert text.endswith("4 tensors differ, 0 are equal; 6 other values of the state differ.\n")


def test_diff_by_name_compares_only_these_tensors(tmp_path: Path, ckpt: Callable[..., Done]) -> None:
    many = {f"model/m/w{number:02d}": torch.tensor(float(number)) for number in range(30)}
    a = save(tmp_path / "a", 1, tensors={**many, "model/m/same": torch.ones(2)})
    b = save(
        tmp_path / "b", 2, tensors={**{name: one + 1 for name, one in many.items()}, "model/m/same": torch.ones(2)}
    )
    assert ckpt("diff", a, b, "--name", "*/same").code == 0
    assert ckpt("diff", a, b, "--name", "model/m/w*").code == 1
    assert ckpt("diff", a, b, "--name", "w").code == 2
    few, every = (ckpt("diff", a, b, *more).out for more in ([], ["--all"]))
    assert (few.count("model/m/w"), every.count("model/m/w")) == (20, 30)
    assert "and 10 more (--all shows them)" in few


def rank_state(ranks: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The engine's per-rank state: tensors and document."""
    (random,) = random_shards(0, ranks, torch.device("cpu"))[:1]
    shards, told = tracked_shards("mine/rank-00000", Holder(), (0, 1))
    tensors = {random.name: torch.zeros(ranks, random.shape[1]), **{shard.name: shard.tensor for shard in shards}}
    return tensors, {"user": {"mine": {RANKS: [told] * ranks}}}


class Holder:
    def state_dict(self) -> dict[str, Any]:
        return {"count": 3, "kept": torch.ones(2)}


def test_diff_compares_per_rank_state_only_in_worlds_of_one_size(tmp_path: Path, ckpt: Callable[..., Done]) -> None:
    shared = {"model/m/w": torch.ones(4)}
    stored = {}
    for ranks in (2, 3):
        tensors, told = rank_state(ranks)
        stored[ranks] = save(tmp_path / str(ranks), 5, ranks=ranks, tensors={**shared, **tensors}, **told)
    done = ckpt("diff", stored[2], stored[3], "--json")
    assert (done.code, done.json["equal"]) == (0, 1)
    assert done.json["per_rank"] == ["user/disttrain/random/torch", "user/mine/rank-00000/kept"]
    assert "2 tensors of single ranks are not compared" in ckpt("diff", stored[2], stored[3]).out
    assert ckpt("diff", stored[2], stored[3], "--name", "user/*").code == 2, "nothing that could be compared"
    tensors, told = rank_state(2)
    tensors["user/mine/rank-00000/kept"][1] = 9.0
    told["user"]["mine"][RANKS][1] = {"count": 4}
    other = save(tmp_path / "other", 5, ranks=2, tensors={**shared, **tensors}, **told)
    done = ckpt("diff", stored[2], other, "--json")
    assert (done.code, done.json["per_rank"]) == (1, [])
    assert [one["name"] for one in done.json["differences"]] == ["user/mine/rank-00000/kept"]
    assert [leaf["key"] for leaf in done.json["state"]] == [
        f"user.mine.{RANKS}[1].count",
        f"user.mine.{RANKS}[1].kept",
    ]


def test_diff_of_a_damaged_checkpoint_is_an_error(tmp_path: Path, ckpt: Callable[..., Done]) -> None:
    a, b = save(tmp_path / "a", 1), save(tmp_path / "b", 1)
    flip(b / "rank-00000.safetensors")
    done = ckpt("diff", a, b)
    assert (done.code, done.out) == (5, "")
    assert "rank-00000.safetensors, bytes" in done.err


# ---------------------------------------------------------------------- prune


def test_prune_keeps_the_newest_and_the_milestones(tmp_path: Path, ckpt: Callable[..., Done]) -> None:
    run = tmp_path / "run"
    for step in (50, 100, 150, 200, 250, 300):
        save(run, step)
    save(tmp_path / "other", 9).rename(run / "checkpoints" / "rejected-step-00000009-1")
    before = contents(run)
    planned = ckpt("prune", run, "--keep-last", "2", "--keep-every", "100", "--dry-run", "--json")
    assert (planned.code, contents(run)) == (0, before)
    assert not (run / ".lock").exists()
    done = ckpt("prune", run, "--keep-last", "2", "--keep-every", "100", "--json")
    assert done.code == 0
    assert done.json["removed"] == planned.json["removed"] == ["step-00000050", "step-00000150"]
    kept = [f"step-{step:08d}" for step in (100, 200, 250, 300)]
    assert done.json["kept"] == kept
    assert names(run) == ["rejected-step-00000009-1", *kept], "nothing half removed lies about"
    gone = {path: content for path, content in before.items() if "00050" in path or "00150" in path}
    assert done.json["bytes"] == sum(map(len, gone.values()))
    assert contents(run / "checkpoints") == {path: one for path, one in before.items() if path not in gone}
    again = ckpt("prune", run / "checkpoints", "--keep-last", "1")
    assert names(run) == ["rejected-step-00000009-1", "step-00000300"]
    assert "kept step-00000300: intact\n" in again.out and "removed 3, " in again.out


def test_prune_keeps_the_best_as_a_run_does(tmp_path: Path, ckpt: Callable[..., Done]) -> None:
    run = tmp_path / "run"
    for step, loss in ((100, 3.0), (200, 1.0), (300, 2.0), (400, None), (500, 4.0)):
        save(run, step, evaluation={} if loss is None else {"eval/a/loss": loss})
    keep = ["--keep-last", "1", "--keep-best"]
    assert ckpt("prune", run, *keep, "eval/a/los").code == 2
    least = ckpt("prune", run, *keep, "eval/a/loss", "--dry-run", "--json").json["kept"]
    assert least == ["step-00000200", "step-00000500"]
    flip(run / "checkpoints" / "step-00000200" / "rank-00001.safetensors")
    left = ckpt("prune", run, *keep, "eval/a/loss", "--dry-run", "--json").json
    assert left["kept"] == ["step-00000300", "step-00000500"], "the best of those that are whole"
    assert [one["name"] for one in left["damaged"]] == ["step-00000200"]
    assert ckpt("prune", run, *keep, "eval/a/loss", "--mode", "max", "--json").json["kept"] == ["step-00000500"]
    assert names(run) == ["step-00000500"], "what nobody wants to keep is not read"


def test_prune_counts_and_removes_nothing_that_is_damaged(tmp_path: Path, ckpt: Callable[..., Done]) -> None:
    run = tmp_path / "run"
    for step in (100, 200, 300, 400, 500):
        save(run, step)
    flip(run / "checkpoints" / "step-00000500" / "rank-00001.safetensors")  # detected only when its content is read
    (run / "checkpoints" / "step-00000300" / "rank-00001.safetensors").unlink()
    done = ckpt("prune", run, "--keep-last", "1", "--json")
    assert (done.json["kept"], done.json["removed"]) == (["step-00000400"], ["step-00000100", "step-00000200"])
    left = {one["name"]: one["fault"].partition(":")[0] for one in done.json["damaged"]}
    assert set(left) == {"step-00000300", "step-00000500"}
    assert left["step-00000500"].startswith("rank-00001.safetensors, bytes 0 to ")
    assert names(run) == ["step-00000300", "step-00000400", "step-00000500"]


def test_prune_never_removes_the_only_intact_checkpoint(tmp_path: Path, ckpt: Callable[..., Done]) -> None:
    run = tmp_path / "run"
    for step in (100, 200, 300):
        save(run, step)
    for step in (200, 300):
        flip(run / "checkpoints" / f"step-{step:08d}" / "rank-00000.safetensors")
    before = contents(run / "checkpoints")
    done = ckpt("prune", run, "--keep-last", "1", "--json")
    assert (done.code, done.json["kept"], done.json["removed"]) == (0, ["step-00000100"], [])
    flip(run / "checkpoints" / "step-00000100" / "rank-00000.safetensors")
    refused = ckpt("prune", run, "--keep-last", "1")
    assert refused.code == 5 and "no checkpoint is intact: step-00000100: rank-00000" in refused.err
    flip(run / "checkpoints" / "step-00000100" / "rank-00000.safetensors")
    assert contents(run / "checkpoints") == before


HOLD = """
import sys
from pathlib import Path
from disttrain.cli.ckpt.find import CheckpointStatus
from disttrain.engine.checkpointing.random_state import random_shards
from disttrain.engine.checkpointing.snapshot import RANKS
from disttrain.engine.checkpointing.documents import tracked_shards
from disttrain.report import RunFolder

folder = RunFolder(Path(sys.argv[1]))
folder.lock()
print("held", flush=True)
sys.stdin.read()
"""


def test_prune_is_rejected_while_a_run_holds_the_folder(tmp_path: Path, ckpt: Callable[..., Done]) -> None:
    run = tmp_path / "run"
    for step in (100, 200):
        save(run, step)
    (tmp_path / "link").symlink_to(run / "checkpoints")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        before = contents(run)
        for place in (run, run / "checkpoints", tmp_path / "link"):
            done = ckpt("prune", place, "--keep-last", "1")
            assert done.code == 5 and "another process still holds .lock" in done.err
        assert contents(run) == before
        assert ckpt("prune", run, "--keep-last", "1", "--dry-run").code == 0, "reading is no harm"
        assert ckpt("ls", run).code == ckpt("verify", run).code == 0
        other.communicate()
    assert ckpt("prune", run, "--keep-last", "1").code == 0
    assert names(run) == ["step-00000200"]
    RunFolder(run).lock(wait_s=0)  # released again


@pytest.mark.parametrize("options", [[], ["--keep-last", "0"], ["--keep-last", "1", "--keep-every", "0"]])
def test_prune_needs_a_rule_for_what_to_keep(tmp_path: Path, ckpt: Callable[..., Done], options: list[str]) -> None:
    save(tmp_path / "run", 1)
    assert ckpt("prune", tmp_path / "run", *options).code == 2


def test_prune_accepts_no_single_checkpoint(tmp_path: Path, ckpt: Callable[..., Done]) -> None:
    path = save(tmp_path / "run", 1)
    done = ckpt("prune", path, "--keep-last", "1")
    assert done.code == 5 and "it is one checkpoint, not the checkpoints of a run" in done.err


# ---------------------------------------------------------------------- stores


@pytest.fixture
def store() -> Iterator[Any]:
    """A store in this process's memory, empty before and after, as a mapping from keys to files."""
    with empty_store() as held:
        yield held


def save_in(root: Any, step: int, ranks: int = 2, layout: str = "rows", **more: Any) -> Any:
    found = on_ranks(
        ranks,
        lambda own: save_checkpoint(
            root, step, LAYOUTS[layout](some_tensors(), own.rank, ranks), document(step, **more), own, chunk_bytes=4096
        ),
    )
    return found[0]


def test_a_store_is_read_like_a_folder(tmp_path: Path, ckpt: Callable[..., Done], store: Any) -> None:
    """The commands print the same for three checkpoints on a disk and for the same three in a store."""
    there = "memory://bucket/one"
    for step in (100, 200, 300):
        save(tmp_path / "one", step, 2)
        save_in(Address(there), step, 2)
    here = tmp_path / "one" / "checkpoints"
    missing, damaged = "step-00000200/rank-00001.safetensors", "step-00000300/rank-00000.safetensors"
    (here / missing).unlink()
    del store[f"/bucket/one/{missing}"]
    flipped = bytearray((here / damaged).read_bytes())
    flipped[-1] ^= 1
    for file, content in ((damaged, bytes(flipped)), ("step-00000300/notes.txt", b"mine")):
        (here / file).write_bytes(content)
        fsspec.filesystem("memory").pipe_file(f"{there}/{file}", content)

    for words in (["ls"], ["verify"], ["inspect", "--name", "model/*", "--boxes"]):
        told = []
        for path in (str(here), there):
            done = ckpt(words[0], path, *words[1:], "--json")
            text = done.out.replace("No such file or directory", "no such file")  # each storage words it differently
            text = text.replace(str(here), "ROOT").replace(there, "ROOT")
            told.append((done.code, re.sub(r'("when": )"[^"]*"', r"\1WHEN", text)))
            assert ("WHEN" in told[-1][1]) == (words[0] != "verify"), "a store says when too"
        assert told[0] == told[1], words
    assert "rank-00000.safetensors, bytes" in ckpt("verify", there).out
    assert ckpt("diff", f"{there}/step-00000100", here / "step-00000100").code == 0
    assert ckpt("diff", f"{there}/step-00000100", f"{there}/step-00000300").code == 5, "damaged bytes"


def test_a_run_is_located_in_the_store_that_its_config_names(
    tmp_path: Path, ckpt: Callable[..., Done], store: Any
) -> None:
    folder = tmp_path / "runs" / "afar"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("run: {name: afar}\ncheckpoint: {storage: 'memory://bucket/team'}\n")
    done = ckpt("ls", folder)
    assert done.code == 5 and "no step-NNNNNNNN in memory://bucket/team/afar: an empty folder" in done.err
    for step in (1, 2, 3):
        save_in(Address("memory://bucket/team/afar"), step)
    assert [one["step"] for one in ckpt("ls", folder, "--json").json["checkpoints"]] == [1, 2, 3]
    assert ckpt("inspect", folder, "--json").json["path"] == "memory://bucket/team/afar/step-00000003"
    sizes = {key: len(file.getvalue()) for key, file in store.items()}
    assert ckpt("prune", folder, "--keep-last", "1", "--dry-run").code == 0
    assert set(store) == set(sizes)
    own = RunFolder(folder)
    own.lock()
    try:
        with subprocess.Popen([sys.executable, "-c", PRUNE, folder], stderr=subprocess.PIPE, text=True) as other:
            assert "another process still holds .lock" in other.communicate()[1]  # checked before the store is reached
    finally:
        own.unlock()
    done = ckpt("prune", folder, "--keep-last", "1", "--json")
    assert (done.json["kept"], done.json["removed"]) == (["step-00000003"], ["step-00000001", "step-00000002"])
    assert {key.split("/")[4] for key in store} == {"step-00000003"}
    assert done.json["bytes"] == sum(size for key, size in sizes.items() if key not in store)


PRUNE = """
import sys
from contextlib import contextmanager
from pathlib import Path
from disttrain.checkpoint import Address
from disttrain.cli.ckpt.prune import _sole_writer
from disttrain.cli.ckpt.find import Listing
folder = Path(sys.argv[1])
with _sole_writer(Listing(folder, Address("memory://bucket/team/afar"), ()), failed="prune", needed=True):
    pass
"""


def test_a_folder_used_as_a_store_is_not_pruned_while_a_run_writes_to_it(
    tmp_path: Path, ckpt: Callable[..., Done]
) -> None:
    storage = tmp_path / "fast" / "one"
    for step in (1, 2):
        save_in(storage, step)
    before = contents(tmp_path)
    holder = "import sys; from pathlib import Path; from disttrain.report import RunFolder\n"
    holder += "RunFolder(Path(sys.argv[1])).lock(); print('held', flush=True); sys.stdin.readline()"
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", holder, storage], **pipes) as process:
        try:
            assert process.stdout.readline() == "held\n"
            done = ckpt("prune", storage, "--keep-last", "1")
            assert done.code == 5 and "another process still holds .lock" in done.err
        finally:
            process.communicate("\n")
    assert {path: held for path, held in contents(tmp_path).items() if not path.endswith(".lock")} == before
    assert ckpt("prune", storage, "--keep-last", "1").code == 0
    assert sorted(path.name for path in storage.iterdir()) == [".lock", "step-00000002"]


def test_a_save_under_way_in_a_store_is_no_damage(ckpt: Callable[..., Done], store: Any) -> None:
    there = "memory://bucket/one"
    save_in(Address(there), 1)
    save_in(Address(there), 2)
    del store["/bucket/one/step-00000002/manifest.json"]  # the manifest is written last
    done = ckpt("verify", there, "--json")
    assert (done.code, [one["step"] for one in done.json["checkpoints"]]) == (0, [1])
    assert [(one["name"], one["what"].partition(":")[0]) for one in done.json["others"]] == [
        ("step-00000002", "staging")
    ]
    del store["/bucket/one/step-00000001/manifest.json"]
    done = ckpt("ls", there)
    assert done.code == 5 and "no manifest.json among step-00000001, step-00000002" in done.err


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("memory://bucket/nowhere", "no such folder"),
        ("memory://bucket/others", "no manifest.json among weights.bin"),
        ("memory://bucket/runs", "a folder of runs: one"),
        ("s4://bucket/run", "Protocol not known"),
        ("simplecache::memory://bucket/run", "a chain of file systems"),
    ],
)
def test_an_address_without_a_checkpoint_is_rejected_with_a_list_of_what_exists(
    ckpt: Callable[..., Done], store: Any, path: str, found: str
) -> None:
    fsspec.filesystem("memory").pipe_file("memory://bucket/others/weights.bin", b"x")
    save_in(Address("memory://bucket/runs/one"), 1)
    for words in (["ls"], ["inspect"], ["verify"], ["prune", "--keep-last", "1"]):
        done = ckpt(words[0], path, *words[1:])
        assert (done.code, done.out) == (5, "") and found in done.err and "  fix: " in done.err, done.err


# ---------------------------------------------------------------------- bad input


def make_foreign(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """Paths that hold no checkpoint, each with the expected message."""
    for name in ("empty", "dcp", "deepspeed", "new/checkpoints", "fresh", "files/checkpoints", "runs/a/checkpoints"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "dcp" / ".metadata").write_bytes(b"x")
    (tmp_path / "deepspeed" / "latest").write_text("global_step1")
    (tmp_path / "fresh" / "config.yaml").write_text("version: 1\n")
    (tmp_path / "files" / "checkpoints" / "model.ckpt").write_bytes(b"x")
    (tmp_path / "file").write_bytes(b"x")
    odd = {"no-run": "", "null-run": "run:\n", "number": "run: {name: 7}\n", "list": "run: [1]\n", "yaml": "run: {"}
    for name, run in odd.items():
        (tmp_path / "odd" / name).mkdir(parents=True)
        (tmp_path / "odd" / name / "config.yaml").write_text(f"checkpoint: {{storage: elsewhere}}\n{run}")
    return {
        **{name: (tmp_path / "odd" / name, "only config.yaml") for name in odd},
        "folder of odd ones": (tmp_path / "odd", "no manifest.json among"),
        "nowhere": (tmp_path / "nowhere", "no such folder"),
        "empty": (tmp_path / "empty", "an empty folder"),
        "dcp": (tmp_path / "dcp", "a torch distributed checkpoint"),
        "deepspeed": (tmp_path / "deepspeed", "a DeepSpeed checkpoint"),
        "run without": (tmp_path / "new", "no step-NNNNNNNN in"),
        "its folder": (tmp_path / "new" / "checkpoints", "an empty folder"),
        "run before its first": (tmp_path / "fresh", "only config.yaml"),
        "others' checkpoints": (tmp_path / "files", "only model.ckpt"),
        "folder of runs": (tmp_path / "runs", "a folder of runs: a"),
        "file": (tmp_path / "file", "a file"),
    }


@pytest.mark.parametrize(
    "command",
    [["ls"], ["inspect"], ["verify"], ["prune", "--keep-last", "1"], ["diff", "GOOD"]],
    ids=lambda one: one[0],
)
def test_a_path_without_a_checkpoint_is_rejected_with_a_list_of_what_exists(
    tmp_path: Path, ckpt: Callable[..., Done], command: list[str]
) -> None:
    good = save(tmp_path / "good", 1)
    words = [str(good) if word == "GOOD" else word for word in command]
    for case, (path, found) in make_foreign(tmp_path).items():
        before = contents(tmp_path)
        for more in ([], ["--json"]):
            done = ckpt(*words, path, *more)
            assert (done.code, done.out) == (5, ""), case
            head, found_line, do_line = done.err.splitlines()
            assert head.startswith(f"error (exit 5): {path}"), case
            assert found_line.startswith("  problem: ") and found in found_line, (case, found_line)
            assert do_line.startswith("  fix: "), case
        assert contents(tmp_path) == before


def test_a_newer_format_is_rejected_with_the_fix(tmp_path: Path, ckpt: Callable[..., Done]) -> None:
    path = save(tmp_path / "run", 1)
    seal(path, lambda content: content.update(version=2))
    for words in (["ls", path], ["verify", path], ["inspect", path], ["diff", path, path], ["ls", tmp_path / "run"]):
        done = ckpt(*words)
        assert done.code == 5, words
        assert "format version 2; this disttrain reads 1" in done.out + done.err
        assert "upgrade disttrain" in done.out + done.err


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not read what root wrote")
def test_a_folder_without_read_permission_is_reported(tmp_path: Path, ckpt: Callable[..., Done]) -> None:
    path = save(tmp_path / "run", 1)
    above = {parent: parent.stat().st_mode for parent in (tmp_path, *list(tmp_path.parents)[:2])}
    for parent in above:
        parent.chmod(0o755)
    ckpt("ls", path)  # modules that are imported late are imported by now
    for locked in (tmp_path / "run", tmp_path / "run" / "checkpoints", path):
        locked.chmod(0o700)
        os.seteuid(65534)
        try:
            found = [ckpt(*words) for words in (["ls", path], ["verify", path], ["ls", tmp_path / "run"])]
        finally:
            os.seteuid(0)
            locked.chmod(0o755)
        for done in found:
            assert done.code == 5, done
            assert "Permission denied" in done.out + done.err, done
    for parent, mode in above.items():
        parent.chmod(mode)


def test_the_commands_and_their_help_load_no_torch() -> None:
    code = "import sys\nfrom disttrain.cli import main\ntry:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    for words in (["ckpt", "--help"], ["ckpt", "diff", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "False"), done.stderr
