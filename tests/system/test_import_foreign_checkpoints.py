"""Real checkpoints of torch DCP and DeepSpeed import bit-equal, and training continues from them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_checkpoints import (
    STEPS,
    Small,
    Told,
    grouped,
    write_dcp,
    write_deepspeed_stages,
)
from torch import nn
from world import run_world

import disttrain
from disttrain.checkpoint import Checkpoint
from disttrain.checkpoint.formats import WantedBox, format_of, import_checkpoint, open_weights
from disttrain.checkpoint.formats import huggingface as huggingface_format
from disttrain.engine.export import convert
from disttrain.errors import CheckpointError

QUIET = {"every": 1, "progress": False, "plot": False, "trackers": []}
MORE_STEPS = 3


def config(folder: Path, strategy: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "run": {"name": "run", "dir": str(folder), "steps": STEPS + MORE_STEPS, "device": "cpu", "timeout_s": 60},
        "strategy": dict(strategy),
        "report": QUIET,
        **more,
    }


def assert_holds(checkpoint: Checkpoint, told: Told) -> None:
    """The checkpoint holds every expected value, to the bit, and nothing else except the steps of optimizers that
    count.
    """
    known = set()
    for name, entry in told.items():
        if name == "head.weight":  # tied: DCP stores the weight twice
            continue
        for key, expected in entry.items():
            full = f"model/model/{name}" if key == "value" else f"optim/model/{name}:{key}"
            found = checkpoint.read(full).numpy()
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape), full
            assert found.tobytes() == np.ascontiguousarray(expected).tobytes(), full
            known.add(full)
    others = set(checkpoint.tensors) - known
    assert all(name.endswith(":step") and float(checkpoint.read(name)) == STEPS for name in others)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Told]]:
    """Folders that two ranks of torch and DeepSpeed wrote, by kind, with their expected content."""
    root = tmp_path_factory.mktemp("foreign")
    found = {f"dcp-{kind}": run_world(2, write_dcp, root / f"dcp-{kind}", kind)[0] for kind in ("ddp", "fsdp")}
    cases: dict[str, dict[str, Any]] = {f"zero{stage}": {"stage": stage} for stage in (1, 2, 3)}
    cases["zero1-sgd"] = {"stage": 1, "optimizer": "sgd"}
    found |= run_world(2, write_deepspeed_stages, root, cases)[0]
    return {kind: (root / kind, told) for kind, told in found.items()}


KINDS = ("dcp-ddp", "dcp-fsdp", "zero1", "zero2", "zero3", "zero1-sgd")


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_optimizer_state_import_bit_equal(
    kind: str, foreign: dict[str, tuple[Path, Told]], tmp_path: Path
) -> None:
    source, told = foreign[kind]
    assert format_of(source) == ("torch-distributed" if kind.startswith("dcp") else "deepspeed")
    done = convert(source, tmp_path / "converted")
    checkpoint = Checkpoint.open(tmp_path / "converted")
    checkpoint.verify()
    assert_holds(checkpoint, told)
    assert checkpoint.step == STEPS and "head.weight is another name of embed.weight" in done.left_out
    loaded = disttrain.load(source, make_model=Small)
    assert loaded.rise.weight.detach().numpy().tobytes() == told["rise.weight"]["value"].tobytes()
    assert loaded.head.weight is loaded.embed.weight


LAYOUTS = {
    "several groups of parameters inside one": {"stage": 3, "zero": {"sub_group_size": 30}},
    "parameters in turn": {"stage": 2, "zero": {"round_robin_gradients": True}},
    "bf16 with float32 masters": {"stage": 2, "bf16": True},
    "bf16 cut": {"stage": 3, "bf16": True},
    "offloaded": {"stage": 2, "zero": {"offload_optimizer": {"device": "cpu"}}},
}


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_layout_of_deepspeed_imports(size: int, tmp_path: Path) -> None:
    told = run_world(size, write_deepspeed_stages, tmp_path, LAYOUTS)[0]
    for name in LAYOUTS:
        import_checkpoint(tmp_path / name, tmp_path / f"{name} converted")
        found = Checkpoint.open(tmp_path / f"{name} converted")
        for parameter, entry in told[name].items():
            for key, expected in entry.items():
                full = f"model/model/{parameter}" if key == "value" else f"optim/model/{parameter}:{key}"
                value = found.read(full)
                wide = value.float() if value.dtype is torch.bfloat16 else value
                assert wide.numpy().tobytes() == expected.tobytes(), (name, full)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3, 4])
def test_shards_of_any_number_of_ranks_import(size: int, tmp_path: Path) -> None:
    told = run_world(size, write_dcp, tmp_path / "fsdp", "fsdp")[0]
    import_checkpoint(tmp_path / "fsdp", tmp_path / "converted")
    assert_holds(Checkpoint.open(tmp_path / "converted"), told)


def test_deepspeeds_weights_convert_to_other_formats(foreign: dict[str, tuple[Path, Told]], tmp_path: Path) -> None:
    source, told = foreign["zero3"]
    convert(source, tmp_path / "weights.pt")
    state = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert all(state[name].numpy().tobytes() == entry["value"].tobytes() for name, entry in told.items())


def tokens_of(step: int) -> torch.Tensor:
    return torch.randint(0, 11, (8,), generator=torch.Generator().manual_seed(step))


def losses_from_checkpoint(folder: Path, converted: Path, strategy: Mapping[str, Any]) -> list[float]:
    """Resume from the converted checkpoint in a custom loop. Returns the losses of the remaining steps."""
    given = config(folder, strategy, checkpoint={"resume": str(converted)})
    with disttrain.Engine(given) as engine:
        engine.prepare("model", Small, lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0))
        engine.resume()
        assert engine.progress.steps == STEPS
        losses = []
        while not engine.finished():
            tokens = tokens_of(engine.progress.steps)
            share = tokens.chunk(engine.world_size)[engine.rank]

            def objective(model: Any, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
                return nn.functional.cross_entropy(model.eval()(batch), batch, reduction="sum"), len(batch)

            losses.append(engine.accumulate("model", engine.micro_batches([share]), objective).loss)
            engine.step("model")
            engine.log()
            engine.should_stop()
        return losses


def plain_losses(told: Told) -> list[float]:
    """The same losses by a plain loop, from the state that DeepSpeed and torch reported."""
    model = Small().eval()
    tensors = {name: torch.from_numpy(copy.deepcopy(entry["value"])) for name, entry in told.items()}
    model.load_state_dict({**tensors, "head.weight": tensors["embed.weight"]})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            moments = {key: torch.from_numpy(copy.deepcopy(told[name][key])) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(float(STEPS)), **moments}
    losses = []
    for step in range(STEPS, STEPS + MORE_STEPS):
        tokens = tokens_of(step)
        loss = nn.functional.cross_entropy(model(tokens), tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    ("kind", "strategy", "size"),
    [
        ("zero2", {"name": "fsdp"}, 2),
        ("zero3", {"name": "none"}, 1),
        ("dcp-fsdp", {"name": "ddp"}, 2),
        pytest.param("dcp-ddp", {"name": "deepspeed", "deepspeed": {"stage": 3}}, 2, marks=pytest.mark.slow),
        pytest.param("zero1", {"name": "fsdp"}, 3, marks=pytest.mark.slow),
    ],
)
def test_training_continues_with_its_moments_in_another_strategy(
    kind: str, strategy: Mapping[str, Any], size: int, foreign: dict[str, tuple[Path, Told]], tmp_path: Path
) -> None:
    source, told = foreign[kind]
    import_checkpoint(source, tmp_path / "converted")
    found = run_world(size, losses_from_checkpoint, tmp_path / "runs", tmp_path / "converted", strategy)[0]
    # The order of float32 sums differs. The moments of other steps would change the second digit.
    assert found == pytest.approx(plain_losses(told), rel=1e-5)


def read_into(folder: Path, weights: Path, strategies: Mapping[str, Any], only: Sequence[str]) -> dict[str, Any]:
    """Load weights into each strategy. Returns the bytes that each read from the files, and the complete weights."""
    read = 0
    fill = huggingface_format.SafetensorsWeights.fill

    def counted(self: Any, wanted: Sequence[WantedBox]) -> None:
        nonlocal read
        read += sum(one.box.numel for one in wanted)
        fill(self, wanted)

    huggingface_format.SafetensorsWeights.fill = counted  # type: ignore[method-assign]
    found: dict[str, Any] = {}
    for name, strategy in strategies.items():
        read = 0
        with disttrain.Engine(config(folder / name, strategy)) as engine:
            engine.prepare("model", Small, lambda parameters: torch.optim.SGD(parameters, lr=0.1))
            before = engine.full_weights("model")
            differences = engine.load_weights("model", weights, strict=not only, only=only)
            after = engine.full_weights("model")
            changed = sorted(key for key in after if not torch.equal(before[key], after[key]))
            values = {key: value.numpy() for key, value in after.items()} if engine.rank == 0 else {}
            found[name] = {"read": read, "changed": changed, "values": values, "differences": differences}
    return found


STRATEGIES = {
    "ddp": {"name": "ddp"},
    "fsdp": {"name": "fsdp"},
    "zero2": {"name": "deepspeed", "deepspeed": {"stage": 2}},
    "zero3": {"name": "deepspeed", "deepspeed": {"stage": 3}},
}


def test_each_rank_reads_only_its_boxes(tmp_path: Path) -> None:
    torch.manual_seed(9)
    model = Small()
    source = tmp_path / "weights"
    source.mkdir()
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "head.weight"}
    import safetensors.torch

    safetensors.torch.save_file(state, source / "model.safetensors")
    ranks = run_world(2, read_into, tmp_path / "runs", source, STRATEGIES, [])
    whole = sum(tensor.numel() for tensor in state.values())
    buffers = sum(buffer.numel() for buffer in model.buffers())
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    for name in STRATEGIES:
        values = ranks[0][name]["values"]
        assert all(values[key].tobytes() == tensor.numpy().tobytes() for key, tensor in state.items()), name
        shares = [rank[name]["read"] for rank in ranks]
        twice = {"ddp": whole, "fsdp": buffers, "zero2": buffers + frozen, "zero3": buffers}[name]
        assert sum(shares) == whole + twice, name


def test_some_weights_load_and_the_rest_stay(tmp_path: Path) -> None:
    torch.manual_seed(9)
    torch.save({"rise.weight": torch.ones(7, 5), "rise.bias": torch.ones(7), "x": torch.ones(1)}, tmp_path / "w.pt")
    found = run_world(2, read_into, tmp_path / "runs", tmp_path / "w.pt", {"fsdp": STRATEGIES["fsdp"]}, ["rise.*"])
    assert found[0]["fsdp"]["changed"] == ["rise.bias", "rise.weight"]
    assert (found[0]["fsdp"]["values"]["rise.weight"] == 1).all()
    assert found[1]["fsdp"]["differences"].missing == ()


def test_weights_alone_cannot_continue_a_run(tmp_path: Path) -> None:
    torch.save(Small().state_dict(), tmp_path / "w.pt")
    import_checkpoint(tmp_path / "w.pt", tmp_path / "converted")
    with pytest.raises(AssertionError, match=r"model\.weights="):
        run_world(1, losses_from_checkpoint, tmp_path / "runs", tmp_path / "converted", {"name": "none"})


@pytest.mark.parametrize("damage", ["a rank's file", "another step's file", "model parallel", "cut short"])
def test_an_incomplete_deepspeed_checkpoint_is_rejected(
    damage: str, foreign: dict[str, tuple[Path, Told]], tmp_path: Path
) -> None:
    import shutil

    source = tmp_path / "there"
    shutil.copytree(foreign["zero2"][0], source)
    folder = source / "global_step3"
    last = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    if damage == "a rank's file":
        last.unlink()
    elif damage == "another step's file":
        shutil.copy(foreign["zero3"][0] / "global_step3" / last.name, last)
    elif damage == "model parallel":
        shutil.copy(folder / "mp_rank_00_model_states.pt", folder / "mp_rank_01_model_states.pt")
    else:
        last.write_bytes(last.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="there/global_step3"):
        import_checkpoint(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_errors_of_the_reader_name_the_converter(foreign: dict[str, tuple[Path, Told]]) -> None:
    for kind in ("zero1", "dcp-fsdp"):
        with pytest.raises(CheckpointError, match="disttrain ckpt convert PATH TARGET"):
            Checkpoint.open(foreign[kind][0])
    assert set(open_weights(foreign["zero1"][0]).tensors) < set(Small().state_dict())
    assert grouped(Small())[0]["weight_decay"] == 0.1
