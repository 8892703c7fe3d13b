"""Every optimizer of torch under every strategy equals a plain loop, or is rejected by name."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.engine_runs import QUIET, STRATEGIES, to_numpy, worst
from torch import Tensor, nn
from world import run_world

import disttrain
from disttrain.config import load_config
from disttrain.engine.build import plan_run
from disttrain.errors import ConfigError

SEED, STEPS = 3, 4
ZOO: dict[str, dict[str, Any]] = {
    "ASGD": {"lr": 0.05, "t0": 2},
    "Adadelta": {"lr": 1.0},
    "Adafactor": {"lr": 0.05},
    "Adagrad": {"lr": 0.05, "lr_decay": 0.1, "weight_decay": 0.01, "initial_accumulator_value": 0.1},
    "Adam": {"lr": 0.02, "amsgrad": True},
    "AdamW": {"lr": 0.02},
    "Adamax": {"lr": 0.02},
    "LBFGS": {},
    "Muon": {"lr": 0.05},
    "NAdam": {"lr": 0.02},
    "RAdam": {"lr": 0.02},
    "RMSprop": {"lr": 0.01, "momentum": 0.5, "centered": True},
    "Rprop": {"lr": 0.02},
    "SGD": {"lr": 0.05, "momentum": 0.9},
    "SparseAdam": {},
}
REFUSED = {
    "ddp": {"LBFGS", "SparseAdam"},
    "fsdp": {"LBFGS", "SparseAdam", "Adafactor", "Muon", "Rprop"},
    "zero1": {"LBFGS", "SparseAdam", "Adafactor", "Adagrad", "Muon"},
    "zero3": {"LBFGS", "SparseAdam", "Adafactor", "Adagrad", "Muon"},
}


class Net(nn.Module):
    """Matrices of odd sizes, because Muon accepts nothing else. One has fewer rows than twice the number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 7, bias=False), nn.Linear(7, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def batches(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(2, 5, generator=generator) for _ in range(3)]


def squares(model: Any, x: Tensor) -> Any:
    return (model(x) - 3 * x[:, :3]).square().sum(), len(x)


def plain(name: str) -> tuple[list[float], dict[str, Tensor]]:
    torch.manual_seed(SEED)
    model = Net()
    optimizer = _make(name, list(model.parameters()))
    schedule = _falling(optimizer)
    losses = []
    for step in range(STEPS):
        total, weight = squares(model, torch.cat(batches(step)))
        optimizer.zero_grad()
        (total / weight).backward()
        optimizer.step()
        schedule.step()
        losses.append(total.item() / weight)
    return losses, model.state_dict()


def train(folder: Path, strategy: str) -> dict[str, Any]:
    """Losses and last weights of a model per supported optimizer, all in one engine."""
    config = {"run": {"name": strategy, "dir": str(folder), "seed": SEED, "steps": STEPS}}
    found: dict[str, Any] = {}
    with disttrain.Engine(config, [*QUIET, *STRATEGIES[strategy], "checkpoint.at_end=false"]) as engine:
        for name in ZOO.keys() - REFUSED[strategy]:
            found[name] = []
        for name in sorted(found):
            engine.prepare(name, Net, partial(_make, name), _falling)
        for step in range(STEPS):
            mine = engine.micro_batches(batches(step)[engine.rank :: engine.world_size])
            for name in sorted(found):
                found[name].append(engine.accumulate(name, mine, squares).loss)
                engine.step(name)
            engine.log()
        return {name: (found[name], to_numpy(engine.full_weights(name))) for name in sorted(found)}


def _make(name: str, parameters: Any) -> torch.optim.Optimizer:
    """Two groups, chosen by position. One has a different rate."""
    rate = {"lr": ZOO[name]["lr"] / 2}
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], **rate}]
    optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(groups, **ZOO[name])
    return optimizer


def _falling(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.7**step)


@pytest.mark.parametrize("strategy", list(REFUSED))
def test_each_trains_as_in_a_plain_loop(strategy: str, tmp_path: Path) -> None:
    for name, (losses, weights) in run_world(2, train, tmp_path, strategy)[0].items():
        expected, last = plain(name)
        # Muon's products are bfloat16: the order of the float32 sums before them can change one of their roundings.
        loose = 1e-2 if name == "Muon" else 1e-4
        assert worst(losses, expected) < loose / 5, name
        for key, value in last.items():
            assert float((torch.from_numpy(weights[key]) - value).norm() / value.norm()) < loose, f"{name} {key}"


@pytest.mark.parametrize(
    ("strategy", "name"), [(one, name) for one, names in REFUSED.items() for name in sorted(names)]
)
def test_the_others_are_rejected_by_name_before_the_group_exists(strategy: str, name: str) -> None:
    optim = {"target": f"torch.optim.{name}", "args": ZOO[name]}
    with pytest.raises(ConfigError, match=name):
        plan_run(load_config({"optim": optim, "run": {"steps": 1}}, STRATEGIES[strategy]))
    assert not torch.distributed.is_initialized()


class Eager(torch.optim.Optimizer):
    """Sign descent that allocates its state in the constructor, for parameters that DeepSpeed later replaces by flat
    parts.
    """

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["sum"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["sum"] += parameter.grad
                parameter.add_(self.state[parameter]["sum"].sign(), alpha=-group["lr"])


def test_state_created_in_the_constructor_is_rejected_by_name_under_deepspeed(tmp_path: Path) -> None:
    config = {"run": {"name": "eager", "dir": str(tmp_path), "seed": SEED, "steps": STEPS}}
    engine = disttrain.Engine(config, [*QUIET, *STRATEGIES["zero1"]])
    with pytest.raises(ConfigError, match="Eager makes state for its parameters before its first step"), engine:
        engine.prepare("model", Net, lambda own: Eager(own, lr=0.1))
