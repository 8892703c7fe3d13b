"""Imports weights of other libraries: no code in them runs, and every defect is reported by name."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor, nn

import disttrain
from disttrain.checkpoint import Box, Checkpoint, Shard, full_shard
from disttrain.checkpoint.formats import (
    WantedBox,
    format_of,
    import_checkpoint,
    match_weights,
    open_weights,
    read_weight,
)
from disttrain.checkpoint.formats import huggingface as huggingface_format
from disttrain.errors import CheckpointError


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 6), nn.Linear(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.encoder.weight


def shards_of(model: nn.Module) -> list[Shard]:
    return [full_shard(f"model/net/{name}", parameter) for name, parameter in model.named_parameters()]


TIES = {"head.weight": "encoder.weight"}


@pytest.fixture
def net() -> Net:
    torch.manual_seed(3)
    return Net()


def written(kind: str, model: nn.Module, folder: Path) -> Path:
    """The model's state in the format of another library."""
    state = model.state_dict()
    folder.mkdir()
    if kind == "safetensors":
        safetensors.torch.save_model(model, folder / "net.safetensors")
        return folder / "net.safetensors"
    if kind == "folder":
        safetensors.torch.save_model(model, folder / "model.safetensors")
        return folder
    if kind == "bin":
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    if kind == "ddp":
        state = OrderedDict((f"module.{name}", tensor) for name, tensor in state.items())
    if kind == "script":
        state = {"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {"state": {}}}
    torch.save(state, folder / "net.pt", _use_new_zipfile_serialization=kind != "legacy")
    return folder / "net.pt"


@pytest.mark.parametrize("kind", ["safetensors", "folder", "bin", "plain", "ddp", "script", "legacy"])
def test_every_form_of_weights_loads(kind: str, net: Net, tmp_path: Path) -> None:
    path = written(kind, net, tmp_path / "there")
    loaded = disttrain.load(path, make_model=Net)
    for name, expected in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], expected)
    import_checkpoint(path, tmp_path / "step-00000000", owner="net")
    again = disttrain.load(tmp_path / "step-00000000", name="net", make_model=Net)
    assert torch.equal(again.head.weight, net.head.weight)
    assert again.head.weight is again.encoder.weight


def test_only_the_requested_part_of_a_tensor_is_read(net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reject(*_: Any) -> Any:
        raise AssertionError("a whole tensor was read")

    class Slices:
        """The library's handle, without the method that returns a complete tensor."""

        def __init__(self, path: str, **options: Any) -> None:
            self._handle = safe_open(path, **options)
            self.keys, self.get_slice, self.get_tensor = self._handle.keys, self._handle.get_slice, reject

    monkeypatch.setattr(huggingface_format, "safe_open", Slices)
    weights = open_weights(written("safetensors", net, tmp_path / "there"))
    into = torch.zeros(2, 3, dtype=torch.float64)
    weights.fill([WantedBox("encoder.weight", Box((1, 1), (2, 3)), into)])
    assert torch.equal(into, net.encoder.weight[1:3, 1:4].double())


def fill_matching(weights: Any, shards: Any, **options: Any) -> Any:
    """Loads weights as an engine does, and returns the differences."""
    found, wanted = match_weights(weights, shards, **options)
    weights.fill(wanted)
    return found


def test_differences_are_listed_and_nothing_is_loaded(net: Net, tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in net.state_dict().items() if name != "decoder.bias"}
    state |= {"decoder.weight": torch.zeros(4, 5), "extra": torch.zeros(2), "encoder.bias": torch.zeros(6).long()}
    torch.save(state, tmp_path / "net.pt")
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(CheckpointError) as refused:
            fill_matching(open_weights(tmp_path / "net.pt"), shards_of(model), owner="net", aliases=TIES, strict=strict)
        text = str(refused.value)
        assert "missing: decoder.bias; unexpected: extra; misshapen: " in text
        assert "decoder.weight is (4, 5) there, (4, 6) here" in text
        assert "encoder.bias is torch.int64 there, torch.float32 here" in text
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_parts_of_a_model_load_under_other_names(net: Net, tmp_path: Path) -> None:
    torch.save({f"backbone.{name}": tensor for name, tensor in net.state_dict().items()}, tmp_path / "net.pt")
    weights, model = open_weights(tmp_path / "net.pt"), Net()
    kept = model.decoder.weight.clone()
    options: dict[str, Any] = {"owner": "net", "aliases": TIES}
    found = fill_matching(
        weights, shards_of(model), only=["encoder.*"], rename=lambda name: name.removeprefix("backbone."), **options
    )
    assert (found.missing, found.unexpected) == ((), ())
    assert torch.equal(model.encoder.weight, net.encoder.weight) and torch.equal(model.decoder.weight, kept)
    found = fill_matching(weights, shards_of(model), strict=False, **options)
    assert len(found.missing) == 4 and "backbone.encoder.bias" in found.unexpected
    with pytest.raises(CheckpointError, match=r"'encodr\.\*'; there are encoder"):
        fill_matching(weights, shards_of(model), only=["encodr.*"], **options)
    with pytest.raises(CheckpointError, match="both become same"):
        fill_matching(weights, shards_of(model), rename=lambda name: "same", **options)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize(
    "place", ["bare pickle", "bare pickle 2", "hidden in a torch file", "bin", ".metadata", ".distcp", "deepspeed"]
)
def test_no_pickle_is_run(place: str, tmp_path: Path) -> None:
    mark, folder = tmp_path / "ran", tmp_path / "there"
    folder.mkdir()
    state: dict[str, Any] = {"model": {"w": torch.ones(3)}, "optim": {"state": {"w": {"step": Canary(mark)}}}}
    path = folder
    if place.startswith("bare pickle"):
        path = folder / "net.pt"
        path.write_bytes(pickle.dumps({"w": Canary(mark)}, protocol=2 if place.endswith("2") else 4))
    elif place == "hidden in a torch file":
        path = folder / "net.safetensors"
        torch.save({"w": torch.ones(3), "note": Canary(mark)}, path)
    elif place == "bin":
        torch.save({"w": Canary(mark)}, folder / "pytorch_model.bin")
    elif place == ".metadata":
        (folder / ".metadata").write_bytes(pickle.dumps(Canary(mark)))
    elif place == ".distcp":
        dcp.save(state, checkpoint_id=str(folder), no_dist=True)
    else:
        torch.save({"module": {}, "x": Canary(mark)}, folder / "mp_rank_00_model_states.pt")
        torch.save({"optimizer_state_dict": Canary(mark)}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    for act in (
        lambda: disttrain.load(path, make_model=lambda: nn.Linear(1, 1)),
        lambda: import_checkpoint(path, tmp_path / "target"),
    ):
        with pytest.raises(CheckpointError) as refused:
            act()
        assert refused.value.exit_code == 5
        assert "mkdir" in str(refused.value) or place == "bare pickle"  # which torch rejects because of its protocol
        assert "nothing in it was run" in str(refused.value)
    assert not mark.exists() and not (tmp_path / "target").exists()
    pickle.loads(pickle.dumps(Canary(mark)))
    assert mark.exists()  # so the test above would have detected it


def test_an_index_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(3)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors")):
        index.write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(CheckpointError, match="outside the folder"):
            open_weights(folder)
    index.write_text(json.dumps({"weight_map": {"w": "model-00001-of-00001.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"no model-00001-of-00001\.safetensors"):
        open_weights(folder)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_weights(folder)


def test_damaged_files_are_rejected_by_name(net: Net, tmp_path: Path) -> None:
    for kind in ("safetensors", "plain"):
        path = written(kind, net, tmp_path / kind)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(CheckpointError, match=path.name):
            open_weights(path)


def test_other_formats_are_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing to load here")
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, found in ((tmp_path / "notes.txt", "a file that begins with"), (empty, "an empty folder")):
        with pytest.raises(CheckpointError, match=found):
            format_of(path)
    torn = import_checkpoint(written("plain", Net(), tmp_path / "there"), tmp_path / "torn").path
    (torn / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"a folder with rank-00000\.safetensors"):
        format_of(torn)
    with pytest.raises(CheckpointError, match=r"no manifest\.json among rank-00000\.safetensors"):
        disttrain.load(torn.rename(tmp_path / "step-00000000"), make_model=Net)
    with pytest.raises(CheckpointError, match="no such folder"):
        disttrain.load(tmp_path / "absent")
    torch.save({"epoch": 3}, tmp_path / "no_weights.pt")
    with pytest.raises(CheckpointError, match="a mapping with epoch"):
        open_weights(tmp_path / "no_weights.pt")


def test_weights_without_a_config_ask_for_the_model(net: Net, tmp_path: Path) -> None:
    path = written("plain", net, tmp_path / "there")
    with pytest.raises(CheckpointError, match="make_model="):
        disttrain.load(path)
    import_checkpoint(path, tmp_path / "target")
    with pytest.raises(CheckpointError, match="make_model="):
        disttrain.load(tmp_path / "target")


def dcp_of(state: dict[str, Any], folder: Path) -> Path:
    dcp.save(state, checkpoint_id=str(folder), no_dist=True)
    return folder


def test_a_torch_distributed_checkpoint_may_keep_its_weights_under_any_usual_key(net: Net, tmp_path: Path) -> None:
    plain = net.state_dict()
    optimizer: dict[str, Tensor] = {f"state.{name}.exp_avg": torch.ones_like(t) for name, t in plain.items()}
    del optimizer["state.head.weight.exp_avg"]
    for number, state in enumerate(
        (
            dict(plain),
            {"model": plain},
            {"app": {"model": plain, "optim": {"state": {}}}},
            {"model": {f"module.{name}": tensor for name, tensor in plain.items()}},
            {"state_dict": plain, "optimizer": optimizer},
        )
    ):
        folder = dcp_of(state, tmp_path / str(number))
        loaded = disttrain.load(folder, make_model=Net)
        assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in plain.items())
    import_checkpoint(folder, tmp_path / "last", owner="net")
    found = Checkpoint.open(tmp_path / "last")
    assert torch.equal(found.read("optim/net/decoder.bias:exp_avg"), torch.ones(4))
    assert "model/net/head.weight" not in found.tensors


def test_state_that_a_torch_distributed_checkpoint_cannot_hold_is_reported(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    numbered = dcp_of({"model": model.state_dict(), "optim": optimizer.state_dict()}, tmp_path / "numbered")
    with pytest.raises(CheckpointError, match="optimizer state of 0, 1, which names no parameter"):
        import_checkpoint(numbered, tmp_path / "target")
    other = dcp_of({"model": model.state_dict(), "rng": {"cuda": torch.ones(3)}, "step": 4}, tmp_path / "other")
    left = import_checkpoint(other, tmp_path / "target").left_out
    assert [text.split(",")[0] for text in left] == ["rng.cuda", "step"]


@pytest.mark.parametrize("damage", ["missing file", "cut short", "a link", "no metadata left", "another's data"])
def test_damage_in_a_torch_distributed_checkpoint_is_rejected(damage: str, tmp_path: Path) -> None:
    folder = dcp_of({"model": {"w": torch.ones(300), "v": torch.ones(4)}}, tmp_path / "there")
    (data,) = folder.glob("*.distcp")
    if damage == "missing file":
        data.unlink()
    elif damage == "cut short":
        data.write_bytes(data.read_bytes()[:600])
    elif damage == "a link":
        shutil.move(data, tmp_path / "elsewhere")
        data.symlink_to(tmp_path / "elsewhere")
    elif damage == "no metadata left":
        (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:100])
    else:
        other = dcp_of({"model": {"w": torch.ones(4), "v": torch.ones(300)}}, tmp_path / "other")
        shutil.copy(next(other.glob("*.distcp")), data)
    with pytest.raises(CheckpointError, match="there"):
        import_checkpoint(folder, tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("kind", ["plain", "bin", "dcp"])
def test_every_flipped_bit_of_a_weight_is_detected(kind: str, net: Net, tmp_path: Path) -> None:
    if kind == "dcp":
        source = dcp_of({"model": net.state_dict()}, tmp_path / "there")
        (file,) = source.glob("*.distcp")
    else:
        source = written(kind, net, tmp_path / "there")
        file = source if source.is_file() else source / "pytorch_model.bin"
    content = file.read_bytes()
    places = [content.index(tensor.detach().numpy().tobytes()) for tensor in net.parameters()]
    for place in places:
        for bit in (0, 9, 31):
            rotten = bytearray(content)
            rotten[place + bit // 8] ^= 1 << bit % 8
            file.write_bytes(rotten)
            with pytest.raises(CheckpointError, match=f"{file.name}[^\n]*\n[^\n]*checksum"):
                import_checkpoint(source, tmp_path / "target")
    file.write_bytes(content)
    import_checkpoint(source, tmp_path / "target")


def test_reads_a_weight_in_full(net: Net, tmp_path: Path) -> None:
    for kind in ("safetensors", "plain"):
        weights = open_weights(written(kind, net, tmp_path / kind))
        assert torch.equal(read_weight(weights, "decoder.bias"), net.decoder.bias)
