"""fsdp equals a plain loop on every mesh of shards and replicas, and with each of its options.

Relative bounds: float32 1e-5 for losses and norms, float64 1e-9, weights alike. Initial weights are bit-equal.
"""

from __future__ import annotations

import shutil
import weakref
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.engine_runs import QUIET, train_all, worst
from contract.test_user_models import BATCH, SEED, SOURCE, STEPS, YAML, expected, user_module
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from world import run_world

import disttrain
from disttrain.model import GPT

MESHES = [
    (
        4,
        "NanoGPT",
        {
            "2x2/fp32": ["mesh.replicate=2"],
            "2x2/fp64": ["mesh.replicate=2", "strategy.fsdp.reduce=every"],
            "4x1/fp64": ["mesh.replicate=4"],
            "1x4/fp64": ["strategy.fsdp.reshard=2", "strategy.fsdp.prefetch_forward=2"],
            "2x2 on the host/fp64": [
                "mesh.replicate=2",
                "strategy.fsdp.offload=true",
                "strategy.fsdp.prefetch_backward=2",
            ],
        },
    ),
    (
        3,
        "Awkward",
        {
            "1x3/fp64": ["strategy.fsdp.offload=true", "strategy.fsdp.reduce=every"],
            "3x1/fp32": ["mesh.replicate=3"],
            "3x1/fp64": ["mesh.replicate=3", "strategy.fsdp.reduce=every"],
        },
    ),
    (2, "Awkward", {"2x1/fp64": ["mesh.replicate=2"], "1x2/fp32": ["strategy.fsdp.reshard=false"]}),
]


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    shutil.copy(SOURCE, tmp_path / "user_models.py")
    for model in ("NanoGPT", "Awkward"):
        (tmp_path / f"{model}.yaml").write_text(YAML.format(model=model))
    return tmp_path


@pytest.mark.parametrize(("size", "model", "cases"), MESHES, ids=["four", "three", "two"])
def test_equals_a_plain_loop(size: int, model: str, cases: dict[str, list[str]], outside: Path) -> None:
    runs = {case: ["strategy.name=fsdp", f"precision.compute={case[-4:]}", *options] for case, options in cases.items()}
    found = run_world(size, train_all, outside / f"{model}.yaml", outside / "runs", runs)
    for case, run in found[0].items():
        wide = case.endswith("fp64")
        plain = expected(model, torch.float64 if wide else torch.float32)
        bound = 1e-9 if wide else 1e-5
        assert worst(run["losses"], plain["losses"]) < bound, case
        assert worst(run["norms"], plain["norms"]) < bound, case
        assert all(rank[case]["norms"] == run["norms"] for rank in found), case
        for name, value in plain["first"].items():
            assert torch.equal(torch.from_numpy(run["first"][name]).to(value.dtype), value), f"{case}: {name}"
        for name, value in plain["last"].items():
            apart = float((torch.from_numpy(run["last"][name]) - value).norm())
            assert apart <= 10 * bound * float(value.norm()), f"{case}: {name}"


def continue_run(config: Path, folder: Path, steps: int, *overrides: str) -> tuple[list[float], int]:
    """Train to `steps` from the newest checkpoint.

    Returns the losses and the bytes of the model that this rank wrote.
    """
    where = [f"run.dir={folder}", "checkpoint.at_end=true", f"run.steps={steps}", "precision.compute=fp64"]
    losses = []
    with disttrain.Engine(config, [*QUIET, "strategy.name=fsdp", *where, *overrides]) as engine:
        engine.prepare("model")
        for micro_batches in engine.batches():
            losses.append(engine.accumulate("model", micro_batches).loss)
            engine.step("model")
            engine.log()
            if engine.should_stop():
                break
        held = sum(shard.box.numel for shard in engine.strategy.shards(engine._find("model")))
    return losses, held


def test_a_checkpoint_moves_between_meshes_and_no_rank_holds_more_than_its_part(outside: Path) -> None:
    plain = expected("NanoGPT", torch.float64)
    whole = 3 * sum(value.numel() for name, value in plain["last"].items() if name != "lm_head.weight")
    begin = 0
    for steps, size, replicate in ((2, 4, 2), (4, 3, 1), (6, 2, 2), (8, 4, 2)):
        config = outside / "NanoGPT.yaml"
        found = run_world(size, continue_run, config, outside / "runs", steps, f"mesh.replicate={replicate}")
        for losses, held in found:
            assert worst(losses, plain["losses"][begin:steps]) < 1e-9, (steps, size, replicate)
            # weights, two moments and a count per tensor; rows do not divide evenly
            assert held < 1.2 * whole * replicate / size
        begin = steps
    assert begin == STEPS


class Collectives(TorchDispatchMode):
    """Counts collectives by name, as torch's CommDebugMode does, which fails on a backward outside a module."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.gathered: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional"):
            self.counts[function._opname] += 1
            if function._opname == "_allgather_base_":
                self.gathered.add(args[0].dtype)
        return function(*args, **(kwargs or {}))


def count_collectives(folder: Path, overrides: list[str]) -> dict[str, int]:
    """The collectives of one step of five micro-batches, from the first forward to the last weight."""
    user = user_module()
    config = {"run": {"dir": str(folder), "seed": SEED, "steps": 2}, "optim": {"target": "torch.optim.SGD"}}
    with disttrain.Engine(config, [*QUIET, "strategy.name=fsdp", *overrides]) as engine:
        engine.prepare("model", user.NanoGPT, lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        steps = engine.batches(user.Tokens(), global_batch=BATCH, micro_batch=1)
        for number, micro_batches in enumerate(steps):
            with Collectives() as counted:
                engine.accumulate("model", micro_batches, user.token_loss)
                engine.step("model")
            engine.log()
            if number == 1:
                break
        return dict(counted.counts)


@pytest.mark.parametrize(("size", "replicate"), [(2, 1), (4, 2)])
@pytest.mark.parametrize("reduce", ["last", "every"])
def test_gradients_are_reduced_once_per_step_or_per_micro_batch(
    reduce: str, size: int, replicate: int, tmp_path: Path
) -> None:
    overrides = [f"strategy.fsdp.reduce={reduce}", f"mesh.replicate={replicate}"]
    # The groups are three blocks and the remaining parameters. Over replicas each group is reduced once per step, with
    # any value of `reduce`. The step's numbers and the norm take one all-reduce each.
    groups, micro_batches = 4, -(-BATCH // size)
    for counted in run_world(size, count_collectives, tmp_path, overrides):
        assert counted["_reduce_scatter_base_"] == groups * (micro_batches if reduce == "every" else 1)
        assert counted["allreduce_"] == 2 + (groups if replicate > 1 else 0)


class Live(TorchDispatchMode):
    """Records the peak bytes of storages created by tensors inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # the parts of a wrapper are what occupies memory
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage._cdata not in self._seen:
                    self._seen.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return found

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def construct(folder: Path, overrides: list[str]) -> tuple[int, int, int]:
    """Peak bytes of construction, bytes of the complete model, and bytes of its largest tensor."""
    sizes = {"vocab": 32, "context": 8, "layers": 6, "heads": 4, "width": 64}
    config = {"run": {"dir": str(folder)}, "model": {"target": "gpt", "args": sizes}, "strategy": {"name": "fsdp"}}
    with disttrain.Engine(config, [*QUIET, *overrides]) as engine, Live() as live:
        model = engine.prepare("model", partial(GPT, **sizes), lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        found = [parameter.numel() * parameter.element_size() for parameter in model.parameters()]
    return live.peak, sum(found), max(found)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [([], 4), (["mesh.replicate=2"], 2), (["mesh.tensor=2"], 4), (["mesh.tensor=2", "strategy.fsdp.offload=true"], 4)],
)
def test_no_rank_ever_holds_a_complete_model_with_init_weights(
    overrides: list[str], parts: int, tmp_path: Path
) -> None:
    for peak, whole, largest in run_world(4, construct, tmp_path, overrides):
        # The rank's part, one complete tensor with its temporary draws, and norms, which tensor ranks replicate.
        assert peak < whole / parts + 4 * largest < 0.7 * whole
        assert peak > whole / parts


def train_in_bf16(config: Path, folder: Path, overrides: list[str]) -> tuple[dict[str, Any], set[torch.dtype]]:
    with Collectives() as counted:
        found = train_all(config, folder, {"bf16": [*overrides, "strategy.name=fsdp", "precision.compute=bf16"]})
    return found["bf16"], counted.gathered


@pytest.mark.parametrize("overrides", [["strategy.fsdp.reduce=every"], ["strategy.fsdp.offload=true"]])
def test_bf16_is_communicated_as_bf16_and_stays_near_float32(overrides: list[str], outside: Path) -> None:
    run, gathered = run_world(2, train_in_bf16, outside / "NanoGPT.yaml", outside / "runs", overrides)[0]
    plain = expected("NanoGPT", torch.float32)
    # A block's input is rounded to 8 bits. One rounding, 2^-8, bounds a mean over many tokens. A norm has no mean that
    # smooths it, and AdamW's steps amplify it: sixteen roundings. Measured on the quick start's gpt over 20 steps: 8e-4
    # and 4e-2.
    assert worst(run["losses"], plain["losses"]) < 2**-8
    assert worst(run["norms"], plain["norms"]) < 2**-4
    assert all((run["first"][name] == value.numpy()).all() for name, value in plain["first"].items())
    assert gathered == {torch.bfloat16}


def train_batch_norm(folder: Path) -> list[float]:
    config = {"run": {"dir": str(folder), "seed": SEED, "steps": 3}, "optim": {"target": "torch.optim.SGD"}}
    losses = []
    with disttrain.Engine(config, [*QUIET, "strategy.name=fsdp", "precision.compute=bf16"]) as engine:

        def make() -> torch.nn.Module:
            return torch.nn.Sequential(torch.nn.Conv1d(6, 4, 1), torch.nn.BatchNorm1d(4), torch.nn.Flatten())

        def square(model: Any, batch: Any) -> tuple[Any, int]:
            return model(batch[0][:, :, None]).float().square().sum(), len(batch[0])

        engine.prepare("model", make, lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        for micro_batches in engine.batches(user_module().Vectors(), global_batch=8, micro_batch=4):
            losses.append(engine.accumulate("model", micro_batches, square).loss)
            engine.step("model")
            engine.log()
            if engine.should_stop():
                return losses
    return losses


def test_batch_norm_keeps_its_type_under_bf16(tmp_path: Path) -> None:
    losses = run_world(2, train_batch_norm, tmp_path)
    # Normalized values have mean square one, so four features give 4 per sample, up to the rounding of bf16.
    assert losses[0] == losses[1] and abs(losses[0][0] - 4.0) < 4.0 * 2**-6
