"""Exported weights are read back by safetensors and torch.load, with one tensor in memory at a time."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checkpoint_world import same_bits, some_tensors
from torch import Tensor

from disttrain.checkpoint import Disk, SoleRank, full_shard, save_checkpoint
from disttrain.checkpoint.formats import EXPORTS, Extras, export_weights, format_of, open_weights, read_weight
from disttrain.engine.export import convert
from disttrain.errors import CheckpointError, ConfigError

BIG = 2**22


def weights_of_some() -> dict[str, Tensor]:
    """Only the model's tensors with unusual shapes and dtypes."""
    found = {name.removeprefix("model/model/"): tensor for name, tensor in some_tensors().items()}
    return {name: tensor for name, tensor in found.items() if "/" not in name}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    shards = [full_shard(name, tensor) for name, tensor in some_tensors().items()]
    return save_checkpoint(tmp_path / "saved", 7, shards, {"config": {}, "optim": {}}, SoleRank())


def test_a_safetensors_file_is_read_by_safetensors(checkpoint: Path, tmp_path: Path) -> None:
    expected = weights_of_some()
    expected["wave"] = expected["wave"].to(torch.complex64)  # the format has no wider type
    shards = [full_shard(f"model/model/{name}", tensor) for name, tensor in expected.items()]
    source = save_checkpoint(tmp_path / "narrow", 7, shards, {}, SoleRank())
    done = convert(source, tmp_path / "weights.safetensors")
    found = safetensors.torch.load_file(tmp_path / "weights.safetensors")
    assert set(found) == set(expected) and done.tensors == len(expected)
    assert all(same_bits(found[name], expected[name]) for name in expected)


def test_a_torch_file_is_read_by_torch_without_running_it(checkpoint: Path, tmp_path: Path) -> None:
    weights = open_weights(checkpoint)
    export_weights(weights, tmp_path / "weights.pt", "torch", extras=Extras(aliases={"head.weight": "embed.weight"}))
    expected = weights_of_some()
    for options in ({}, {"mmap": True}):
        found = torch.load(tmp_path / "weights.pt", weights_only=True, **options)
        assert set(found) == {*expected, "head.weight"}
        assert all(same_bits(found[name], expected[name]) for name in expected)
        assert found["head.weight"].data_ptr() == found["embed.weight"].data_ptr()
        assert all(tensor.data_ptr() % 64 == 0 for tensor in found.values() if tensor.numel())
    with zipfile.ZipFile(tmp_path / "weights.pt") as archive:
        assert archive.testzip() is None


def test_a_big_model_goes_into_several_files_with_an_index(tmp_path: Path) -> None:
    tensors = {f"layers.{k}.weight": torch.full((10,), float(k)) for k in range(7)}
    shards = [full_shard(f"model/model/{name}", tensor) for name, tensor in tensors.items()]
    source = save_checkpoint(tmp_path, 1, shards, {}, SoleRank())
    folder = tmp_path / "folder"
    export_weights(open_weights(source), folder, "huggingface", shard_bytes=100, extras=Extras({"config.json": "{}"}))
    names = sorted(path.name for path in folder.iterdir())
    files = [f"model-{k:05d}-of-00004.safetensors" for k in range(1, 5)]
    assert names == ["config.json", *files, "model.safetensors.index.json"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 7 * 40
    found = {}
    for file in files:
        own = safetensors.torch.load_file(folder / file)
        assert {index["weight_map"][name] for name in own} == {file}
        assert sum(tensor.numel() * 4 for tensor in own.values()) <= 100
        found |= own
    assert set(found) == set(tensors) and all(torch.equal(found[name], tensors[name]) for name in tensors)
    again = open_weights(folder)
    assert all(torch.equal(read_weight(again, name), tensors[name]) for name in tensors)


@pytest.mark.parametrize("to", EXPORTS)
def test_nothing_is_overwritten(to: str, checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("precious")
    with pytest.raises(CheckpointError, match="nothing is overwritten") as refused:
        convert(checkpoint, target, to=to)
    assert refused.value.exit_code == 5
    assert target.read_text() == "precious"


@pytest.mark.parametrize("to", EXPORTS)
def test_a_full_disk_leaves_nothing(to: str, tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "saved", 1, [full_shard("model/model/a", torch.ones(9))], {}, SoleRank())

    def full(operation: str, path: Path) -> None:
        if operation == "rename":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="No space left on device"):
        export_weights(open_weights(source), tmp_path / "target", to, disk=Disk(full))
    assert sorted(tmp_path.iterdir()) == before


def test_a_type_that_safetensors_lacks_is_rejected_with_a_fix(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"wave[^\n]*\n[^\n]*complex128[^\n]*\n[^\n]*--to torch"):
        convert(checkpoint, tmp_path / "weights.safetensors")
    assert not (tmp_path / "weights.safetensors").exists()


def test_another_name_and_another_format_are_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="models were prepared as model"):
        convert(checkpoint, tmp_path / "x.pt", name="critic")
    with pytest.raises(ConfigError, match="huggingface, safetensors, torch, disttrain"):
        convert(checkpoint, tmp_path / "x", to="onnx")
    with pytest.raises(CheckpointError, match="it is one"):
        convert(checkpoint, tmp_path / "x", to="disttrain")


def test_the_suffix_of_a_path_selects_the_format(checkpoint: Path, tmp_path: Path) -> None:
    single = save_checkpoint(tmp_path / "one", 1, [full_shard("model/model/a", torch.ones(9))], {}, SoleRank())
    found = {"disttrain": checkpoint}
    for to in EXPORTS:
        found[to] = convert(single, tmp_path / f"as-{to}", to=to).path
        again = open_weights(found[to])
        assert torch.equal(read_weight(again, "a"), torch.ones(9))
    assert {name: format_of(path) for name, path in found.items()} == {name: name for name in found}


MEASURED = """
import resource, sys, torch
from pathlib import Path
from disttrain.checkpoint.formats import export_weights, open_weights
source, target, to = sys.argv[1:]
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
weights = open_weights(Path(source))
before = peak()
export_weights(weights, Path(target), to)
print(peak() - before)
"""


@pytest.mark.parametrize("to", EXPORTS)
def test_an_export_holds_one_tensor(to: str, tmp_path: Path) -> None:
    tensors = [full_shard(f"model/model/{k}", torch.full((BIG,), float(k))) for k in range(12)]
    source = save_checkpoint(tmp_path, 1, tensors, {}, SoleRank())
    command = [sys.executable, "-c", MEASURED, str(source), str(tmp_path / "target"), to]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    # Data read together is 32 MiB, and a chunk of the reader 16 MiB, of 192 MiB in total. The rest is slack.
    assert int(done.stdout) < (32 + 16 + 24) * 2**20
