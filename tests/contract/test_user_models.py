"""User modules from a folder outside the project equal a plain loop, with YAML only and with `Engine`."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.engine_runs import QUIET, STRATEGIES, strategies_at, to_numpy, train_all, worst
from plain import plain_loop
from world import run_world

import disttrain
from disttrain.data import Order

SOURCE = Path(__file__).parents[1] / "models" / "user_models.py"
SEED, STEPS, BATCH = 11, 8, 10

YAML = """
version: 1
run: {{seed: 11, steps: 8, name: mine}}
model: {{target: "user_models:{model}"}}
objective: {{target: "user_models:token_loss"}}
data: {{train: {{target: "user_models:Tokens"}}, global_batch: 10, micro_batch: 2}}
optim: {{target: torch.optim.AdamW, args: {{lr: 0.01}}, clip_norm: 0.4, decay_vectors: true}}
checkpoint: {{at_end: false}}
"""


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A user's folder: their modules, and a config for each."""
    shutil.copy(SOURCE, tmp_path / "user_models.py")
    for model in ("NanoGPT", "Encoder", "Awkward"):
        (tmp_path / f"{model}.yaml").write_text(YAML.format(model=model))
    return tmp_path


def user_module() -> Any:
    """The user's file, as a plain import."""
    spec = importlib.util.spec_from_file_location("plain_user_models", SOURCE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["plain_user_models"] = module
    spec.loader.exec_module(module)
    return module


def expected(name: str, dtype: torch.dtype, **args: Any) -> dict[str, Any]:
    """The plain loop: constructor under the seed, every sample of a step, missing gradients as zeros."""
    user = user_module()
    torch.manual_seed(SEED)
    model = getattr(user, name)(**args)
    first = {key: value.clone() for key, value in model.state_dict().items()}
    model.to(dtype)
    data = user.Tokens()
    order = Order(len(data), SEED)
    steps = []
    for step in range(STEPS):
        epoch, position = divmod(step * BATCH, len(data))
        chosen = [data[i] for i in order.indices(epoch, position, BATCH).tolist()]
        # in micro-batches of two: the awkward model depends on the batch it gets
        steps.append([torch.utils.data.default_collate(chosen[i : i + 2]) for i in range(0, BATCH, 2)])
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses, norms = plain_loop(model, torch.optim.AdamW(trainable, lr=0.01), steps, user.token_loss, clip=0.4)
    return {"losses": losses, "norms": norms, "first": first, "last": model.state_dict()}


def is_steady(model: str, name: str, size: int) -> bool:
    return model == "Awkward" and name.startswith("zero") and size > 1


@pytest.mark.parametrize("size", [3, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 2))])
@pytest.mark.parametrize("model", ["NanoGPT", pytest.param("Encoder", marks=pytest.mark.slow), "Awkward"])
def test_with_yaml_only(model: str, size: int, outside: Path) -> None:
    cases = {}
    for name in strategies_at(size):
        # some ranks do not use all parameters: DeepSpeed cannot, and here only `sometimes` does so
        steady = ["model.args={sometimes: false}"] if is_steady(model, name, size) else []
        cases[name] = [*STRATEGIES[name], *steady]
        if not name.startswith("zero"):
            cases[f"{name}/fp64"] = [*STRATEGIES[name], "precision.compute=fp64"]
    found = run_world(size, train_all, outside / f"{model}.yaml", outside / "runs", cases)[0]
    for name, run in found.items():
        fp64, steady = name.endswith("fp64"), is_steady(model, name, size)
        plain = expected(model, torch.float64 if fp64 else torch.float32, **({"sometimes": False} if steady else {}))
        for key, value in plain["first"].items():
            assert torch.equal(torch.from_numpy(run["first"][key]).to(value.dtype), value), (
                f"{name}: {key} begins otherwise"
            )
        bound = 1e-9 if fp64 else 2e-5
        assert worst(run["losses"], plain["losses"]) < bound, name
        assert worst(run["norms"], plain["norms"]) < bound, name
        if fp64:
            for key, value in plain["last"].items():
                torch.testing.assert_close(
                    torch.from_numpy(run["last"][key]), value, rtol=1e-7, atol=1e-9, msg=f"{name} {key}"
                )


def train_with_engine(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """The same in Python, with custom factories, a custom objective and a custom dataset."""
    user = user_module()
    config = {"run": {"name": "engine", "dir": str(folder), "seed": SEED, "steps": STEPS}}
    config["optim"] = {"target": "torch.optim.SGD", "clip_norm": 0.4}  # the engine applies clip_norm
    with disttrain.Engine(config, [*QUIET, *overrides, "checkpoint.at_end=false"]) as engine:
        engine.prepare("model", user.NanoGPT, lambda parameters: torch.optim.AdamW(parameters, lr=0.01))
        first = engine.full_weights()
        losses, norms = [], []
        for micro_batches in engine.batches(user.Tokens(), global_batch=BATCH, micro_batch=2):
            losses.append(engine.accumulate("model", micro_batches, user.token_loss).loss)
            norms.append(engine.step("model").grad_norm)
            engine.log()
            if engine.should_stop():
                break
        return {"losses": losses, "norms": norms, "first": to_numpy(first)}


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero2", "zero3"])
def test_with_engine(name: str, tmp_path: Path) -> None:
    run = run_world(2, train_with_engine, tmp_path, STRATEGIES[name])[0]
    plain = expected("NanoGPT", torch.float32)
    assert all(torch.equal(torch.from_numpy(run["first"][key]), value) for key, value in plain["first"].items())
    assert worst(run["losses"], plain["losses"]) < 2e-5
    assert worst(run["norms"], plain["norms"]) < 2e-5
