"""fsdp on every mesh of shards and replicas, and with each of its options, equals a plain loop.

float32 within 1e-5 relative in losses and norms, float64 within 1e-9, weights too; first weights bit-equal.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.engine_runs import QUIET, train_all, worst
from contract.test_user_models import BATCH, SEED, SOURCE, STEPS, YAML, expected, user_module
from torch.utils._python_dispatch import TorchDispatchMode
from world import run_world

import disttrain

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


def go_on(config: Path, folder: Path, steps: int, *overrides: str) -> tuple[list[float], int]:
    """Train to `steps` from the newest checkpoint on; the losses, and how many bytes this rank wrote of the model."""
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


def test_a_checkpoint_goes_from_mesh_to_mesh_and_no_rank_holds_more_than_its_part(outside: Path) -> None:
    plain = expected("NanoGPT", torch.float64)
    whole = 3 * sum(value.numel() for name, value in plain["last"].items() if name != "lm_head.weight")
    begin = 0
    for steps, size, replicate in ((2, 4, 2), (4, 3, 1), (6, 2, 2), (8, 4, 2)):
        config = outside / "NanoGPT.yaml"
        found = run_world(size, go_on, config, outside / "runs", steps, f"mesh.replicate={replicate}")
        for losses, held in found:
            assert worst(losses, plain["losses"][begin:steps]) < 1e-9, (steps, size, replicate)
            # weights, two moments and a count a tensor; parts are of rows, which do not divide evenly
            assert held < 1.2 * whole * replicate / size
        begin = steps
    assert STEPS == begin


class Collectives(TorchDispatchMode):
    """Counts them by name, as torch's own CommDebugMode, which trips over a backward outside a module."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional"):
            self.counts[function._opname] += 1
        return function(*args, **(kwargs or {}))


def count_collectives(folder: Path, overrides: list[str]) -> dict[str, int]:
    """Collectives of one step of five micro-batches: from the first forward to the last weight."""
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
def test_gradients_are_added_up_once_a_step_or_every_micro_batch(
    reduce: str, size: int, replicate: int, tmp_path: Path
) -> None:
    overrides = [f"strategy.fsdp.reduce={reduce}", f"mesh.replicate={replicate}"]
    # Three blocks and the rest are groups. Over replicas each is added up once a step, whatever `reduce` says; the
    # step's own numbers and the norm are one all-reduce each.
    groups, micro_batches = 4, -(-BATCH // size)
    for counted in run_world(size, count_collectives, tmp_path, overrides):
        assert counted["_reduce_scatter_base_"] == groups * (micro_batches if reduce == "every" else 1)
        assert counted["allreduce_"] == 2 + (groups if replicate > 1 else 0)
