"""Tensor parallelism, alone and with fsdp, equals a plain loop for gpt and a Hugging Face-style model.

Relative bounds: float32 1e-5 for losses and norms, float64 1e-9, weights alike. Initial weights are bit-equal.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import yaml
from contract.engine_runs import QUIET, to_numpy, train_all, train_one, worst
from contract.test_user_models import user_module
from plain import plain_loop
from torch.utils.data import default_collate
from world import run_world

import disttrain
from disttrain.data import Order
from disttrain.errors import ConfigError, TrainingError
from disttrain.model import GPT
from disttrain.runtime.seeds import derive_seed

MODELS = Path(__file__).parents[1] / "models"
SEED, STEPS, BATCH, MICRO = 11, 5, 10, 2
BOUNDS = {"fp32": 1e-5, "fp64": 1e-9}
SMALL: dict[str, Any] = {
    "vocab": 12,
    "context": 8,
    "layers": 2,
    "heads": 4,
    "width": 16,
    "kv_heads": 2,
    "hidden": 24,
}
GPTS: dict[str, dict[str, Any]] = {
    "tied": SMALL,
    "untied": {**SMALL, "tied": False},
    "dropped": {**SMALL, "dropout": 0.2},
    "heads": {**SMALL, "kv_heads": 4},
}
TWO, FOUR = ["mesh.tensor=2"], ["mesh.tensor=4"]
SEQUENCE, LOSS = "strategy.fsdp.tensor.sequence=true", "strategy.fsdp.tensor.loss=true"


def config_of(target: str, args: dict[str, Any]) -> dict[str, Any]:
    return {
        "version": 1,
        "run": {"seed": SEED, "steps": STEPS, "name": "x"},
        "model": {"target": target, "args": args},
        "objective": {"target": "next_token"},
        "data": {
            "train": {"target": "user_models:Tokens", "args": {"vocab": 12, "context": 8}},
            "global_batch": BATCH,
            "micro_batch": MICRO,
        },
        "optim": {"target": "torch.optim.AdamW", "args": {"lr": 0.01}, "clip_norm": 0.4},
        "checkpoint": {"at_end": False},
        "strategy": {"name": "fsdp"},
    }


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A user's folder: their modules, and a config for each model."""
    for name in ("user_models.py", "tensor_models.py"):
        shutil.copy(MODELS / name, tmp_path / name)
    for name, args in GPTS.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config_of("gpt", args)))
    (tmp_path / "decoder.yaml").write_text(yaml.safe_dump(config_of("tensor_models:Decoder", {})))
    return tmp_path


def loss_of(model: Any, batch: Any) -> tuple[Any, int]:
    inputs, targets = batch
    total = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return total, int((targets != -100).sum())


def expected(make: Any, dtype: torch.dtype) -> dict[str, Any]:
    """A plain loop over the model as its constructor makes it, with the dropout seed of each micro-batch."""
    torch.manual_seed(SEED)
    model = make()
    first = to_numpy({name: value.clone() for name, value in model.state_dict().items()})
    model.to(dtype)
    data = user_module().Tokens(vocab=12, context=8)
    order, steps, seeds = Order(len(data), SEED), [], []
    for step in range(STEPS):
        epoch, position = divmod(step * BATCH, len(data))
        chosen = [data[index] for index in order.indices(epoch, position, BATCH).tolist()]
        steps.append([default_collate(chosen[at : at + MICRO]) for at in range(0, BATCH, MICRO)])
        seeds.append([derive_seed(SEED, "step", "model", step, index) for index in range(len(steps[-1]))])
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    losses, norms = plain_loop(model, torch.optim.AdamW(groups, lr=0.01), steps, loss_of, clip=0.4, seeds=seeds)
    return {"losses": losses, "norms": norms, "first": first, "last": to_numpy(model.state_dict())}


def assert_equal(found: dict[str, Any], plain: dict[str, Any], precision: str, case: str) -> None:
    bound = BOUNDS[precision]
    for name, value in plain["first"].items():
        assert (found["first"][name] == value).all(), f"{case}: {name} begins otherwise"
    assert worst(found["losses"], plain["losses"]) < bound, case
    assert worst(found["norms"], plain["norms"]) < bound, case
    for name, value in plain["last"].items():
        ours, theirs = torch.from_numpy(found["last"][name]), torch.from_numpy(value)
        # AdamW turns rounding into steps where a gradient is almost zero: ten times the bound of a loss
        assert float((ours - theirs).norm()) <= 10 * bound * float(theirs.norm()), f"{case}: {name}"


CASES = [
    pytest.param(
        2,
        "tied",
        {"two/fp32": TWO, "two/fp64": TWO, "loss/fp64": [*TWO, LOSS], "time/fp64": [*TWO, SEQUENCE]},
        marks=pytest.mark.slow,
    ),
    (2, "untied", {"all/fp32": [*TWO, SEQUENCE, LOSS], "again/fp64": [*TWO, SEQUENCE, "memory.recompute=full"]}),
    (2, "dropped", {"two/fp64": TWO, "time/fp64": [*TWO, SEQUENCE]}),
    (4, "tied", {"shard/fp32": TWO, "replicate/fp64": [*TWO, "mesh.replicate=2"]}),
    pytest.param(4, "tied", {"shard/fp64": TWO}, marks=pytest.mark.slow),
    pytest.param(
        4,
        "untied",
        {"all/fp64": [*TWO, SEQUENCE, LOSS, "strategy.fsdp.offload=true", "strategy.fsdp.reduce=every"]},
        marks=pytest.mark.slow,
    ),
    (4, "heads", {"all/fp32": [*FOUR, SEQUENCE, LOSS]}),
    pytest.param(4, "heads", {"four/fp64": FOUR}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("size", "name", "cases"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_gpt_equals_a_plain_loop(size: int, name: str, cases: dict[str, list[str]], outside: Path) -> None:
    runs = {case: [*overrides, f"precision.compute={case[-4:]}"] for case, overrides in cases.items()}
    found = run_world(size, train_all, outside / f"{name}.yaml", outside / "runs", runs)
    for precision in {case[-4:] for case in cases}:
        plain = expected(lambda: GPT(**GPTS[name]), torch.float64 if precision == "fp64" else torch.float32)
        for case in [case for case in cases if case.endswith(precision)]:
            assert_equal(found[0][case], plain, precision, case)
            assert all(rank[case]["norms"] == found[0][case]["norms"] for rank in found), case


def decoder(folder: Path, **args: Any) -> Any:
    namespace: dict[str, Any] = {}
    exec((folder / "tensor_models.py").read_text(), namespace)
    return lambda: namespace["Decoder"](**args)


NORMS = {"layers.*.*layernorm": "sequence_parallel", "norm": "sequence_parallel"}
MLP = {"*.gate_proj": "colwise", "*.up_proj": "colwise", "*.down_proj": "rowwise"}


@pytest.mark.parametrize(
    "chosen", [("tied", "whole along time"), pytest.param(("own", "mlp alone"), marks=pytest.mark.slow)]
)
def test_a_hugging_face_style_model_by_its_plan_or_the_users(chosen: tuple[str, str], outside: Path) -> None:
    cases = {
        "own": [],
        "tied": ["model.args={tied: true}"],
        "whole along time": [f"strategy.fsdp.tensor.plan={ {**decoder(outside)()._tp_plan, **NORMS} }", SEQUENCE, LOSS],
        "mlp alone": [f"strategy.fsdp.tensor.plan={MLP}"],
    }
    runs = {case: [*TWO, "precision.compute=fp64", *cases[case]] for case in chosen}
    found = run_world(4, train_all, outside / "decoder.yaml", outside / "runs", runs)[0]
    for case, run in found.items():
        assert_equal(run, expected(decoder(outside, tied=case == "tied"), torch.float64), "fp64", case)


def continue_run(config: Path, folder: Path, steps: int, *overrides: str) -> dict[str, Any]:
    """Train to `steps` from the folder's newest checkpoint, evaluate, and save."""
    where = [f"run.dir={folder}", "run.name=one", "checkpoint.at_end=true", f"run.steps={steps}"]
    with disttrain.Engine(config, [*QUIET, "precision.compute=fp64", *overrides, *where]) as engine:
        engine.prepare("model")
        found = train_one(engine)
        sets = {"again": user_module().Tokens(size=7, vocab=12, context=8)}
        return {**found, "eval": engine.evaluate(sets)["eval/again/loss"]}


def test_a_checkpoint_moves_between_meshes(outside: Path) -> None:
    """Sharded by tensor and shard, then by shard only, over replicas of tensor ranks, and complete on one process."""
    plain = expected(lambda: GPT(**GPTS["untied"]), torch.float64)
    meshes = [(4, [*TWO, SEQUENCE, LOSS]), (3, []), (4, [*TWO, "mesh.replicate=2"]), (2, TWO), (1, [])]
    evaluated = []
    for steps, (size, overrides) in enumerate(meshes, start=1):
        run = run_world(size, continue_run, outside / "untied.yaml", outside / "runs", steps, *overrides)[0]
        assert abs(run["losses"][0] / plain["losses"][steps - 1] - 1) < 1e-9, (size, overrides)
        assert abs(run["norms"][0] / plain["norms"][steps - 1] - 1) < 1e-9, (size, overrides)
        evaluated.append(run["eval"])
    model = GPT(**GPTS["untied"]).double()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in plain["last"].items()})
    with torch.no_grad():
        total, weight = loss_of(model, default_collate([*user_module().Tokens(size=7, vocab=12, context=8)]))
    assert abs(evaluated[-1] / (float(total) / weight) - 1) < 1e-9
    # Logits that are sharded in training are complete in an evaluation. Same run, on the mesh it was trained on.
    run = run_world(4, continue_run, outside / "untied.yaml", outside / "runs", STEPS, *meshes[0][1])[0]
    assert abs(run["eval"] / evaluated[-1] - 1) < 1e-9


def rejected(config: Path, folder: Path, *overrides: str) -> tuple[str, bool]:
    """Returns the message, and whether a process group existed."""
    try:
        train_all(config, folder, {"refused": overrides})
    except (ConfigError, TrainingError) as error:
        return f"{type(error).__name__}: {error}", torch.distributed.is_initialized()
    return "nothing raised", False


def test_a_plan_that_omits_a_module_with_some_of_the_heads_is_rejected(outside: Path) -> None:
    plan = {name: style for name, style in decoder(outside)()._tp_plan.items() if "_norm" not in name}
    told = run_world(2, rejected, outside / "decoder.yaml", outside / "runs", *TWO, f"strategy.fsdp.tensor.plan={plan}")
    assert told[0] == told[1]
    assert "TrainingError" in told[0][0] and "layers.0.self_attn.q_norm.weight" in told[0][0]
    assert "replicated_with_grad_allreduce" in told[0][0] and "layernorm" not in told[0][0]


def three_ways(folder: Path) -> list[tuple[str, bool]]:
    return [rejected(folder / f"{name}.yaml", folder / "runs", "mesh.tensor=3") for name in ("tied", "decoder")]


def test_heads_that_do_not_divide_are_rejected_before_the_group_where_possible(outside: Path) -> None:
    for (gpt, early), (other, late) in run_world(3, three_ways, outside):
        assert not early and "ConfigError" in gpt and "heads=4, kv_heads=2" in gpt and "mesh.tensor=3" in gpt
        # A model without `init_weights` is not built before the group exists.
        assert not late and "ConfigError" in other and "'layers.0.self_attn.q_proj' has 4 head(s)" in other
