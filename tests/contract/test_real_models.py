"""Features of real models under every strategy, compared with a plain loop: inputs, methods, groups, frozen weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.engine_runs import QUIET, STRATEGIES, strategies_at, to_numpy, worst
from torch import Tensor, nn
from world import run_world

import disttrain
from disttrain.errors import ConfigError

SEED, STEPS = 6, 4


def layer(width: int = 5) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 7), nn.Tanh(), nn.Linear(7, width))


class TwoInputs(nn.Module):
    """Called by a method other than `forward`, with several inputs by position and by name. Returns a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = nn.Linear(5, 7), nn.Linear(3, 7, bias=False), nn.Linear(7, 1)

    def score(self, left: Tensor, *, right: Tensor) -> dict[str, Tensor]:
        return {"score": self.out(torch.tanh(self.left(left) + self.right(right)))}


def score_of(model: Any, batch: dict[str, Tensor]) -> Any:
    found = model.score(batch["x"], right=batch["x"][:, :3])["score"]
    return (found - batch["y"]).square().sum(), len(batch["x"])


class NoBlocks(nn.Module):
    """Parameters on the root and no submodule. They have fewer elements, or rows, than there are ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(2, 5))
        self.offset = nn.Parameter(torch.zeros(1))
        self.pair = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.mix.t() * self.pair).sum(1, keepdim=True) + self.offset


class FrozenBlocks(nn.Module):
    """As in fine-tuning: blocks and the embedding are frozen, the last block and the head are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 5)
        self.layers = nn.ModuleList(layer() for _ in range(3))
        self.head = nn.Linear(5, 1)
        for part in (self.embed, self.layers[0], self.layers[1]):
            part.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.layers:
            x = x + block(x)
        return self.head(x)


class Idle(FrozenBlocks):
    """Nothing is frozen. A block and a weight are never used, on any rank."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(True)
        self.layers.append(layer())
        self.spare = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.layers[:3]:
            x = x + block(x)
        return self.head(x)


def squares(model: Any, batch: dict[str, Tensor]) -> Any:
    return (model(batch["x"]) - batch["y"]).square().sum(), len(batch["x"])


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1)


def groups(parameters: Any) -> torch.optim.Optimizer:
    """As users write them: by a custom rule, with a rate and a decay for each group."""
    parameters = list(parameters)
    return torch.optim.AdamW(
        [
            {"params": parameters[:2], "lr": 0.001},
            {"params": parameters[2:3], "weight_decay": 0.5},
            {"params": parameters[3:], "lr": 0.03, "betas": (0.5, 0.9)},
        ],
        lr=0.02,
    )


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


@dataclass(frozen=True)
class Case:
    make_model: Callable[[], nn.Module]
    objective: Any = squares
    make_optimizer: Any = sgd
    make_schedule: Any = None


CASES = {
    "inputs": Case(TwoInputs, score_of),
    "no blocks": Case(NoBlocks),
    "frozen blocks": Case(FrozenBlocks, make_optimizer=groups, make_schedule=halving),
    "idle": Case(Idle),
}


def batches(step: int) -> list[dict[str, Tensor]]:
    """Five micro-batches of two samples: the ranks have different numbers of them."""
    generator = torch.Generator().manual_seed(step)
    xs = [torch.randn(2, 5, generator=generator) for _ in range(5)]
    return [{"x": x, "y": x.sum(1, keepdim=True)} for x in xs]


def plain(case: Case) -> dict[str, Any]:
    torch.manual_seed(SEED)
    model = case.make_model()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = case.make_optimizer(trained)
    schedule = case.make_schedule(optimizer) if case.make_schedule else None
    losses, norms = [], []
    for step in range(STEPS):
        parts = [case.objective(model, batch) for batch in batches(step)]
        loss = sum(part[0] for part in parts) / sum(part[1] for part in parts)
        optimizer.zero_grad()
        loss.backward()
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        norms.append(float(nn.utils.clip_grad_norm_(trained, torch.inf)))
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(loss.item())
    return {"losses": losses, "norms": norms, "last": model.state_dict()}


def train(folder: Path, strategies: list[str], *overrides: str, names: Sequence[str] = tuple(CASES)) -> dict[str, Any]:
    found = {}
    for strategy in strategies:
        for name, case in ((name, CASES[name]) for name in names):
            config = {"run": {"name": f"{strategy}-{name}", "dir": str(folder), "seed": SEED, "steps": STEPS}}
            given = [*QUIET, *STRATEGIES[strategy], *overrides, "checkpoint.at_end=false"]
            with disttrain.Engine(config, given) as engine:
                engine.prepare("model", case.make_model, case.make_optimizer, case.make_schedule)
                losses, norms = [], []
                for step in range(STEPS):
                    mine = engine.micro_batches(batches(step)[engine.rank :: engine.world_size])
                    losses.append(engine.accumulate("model", mine, case.objective).loss)
                    norms.append(engine.step("model").grad_norm)
                    engine.log()
                weights = to_numpy(engine.full_weights("model"))
                found[f"{strategy} {name}"] = {"losses": losses, "norms": norms, "last": weights}
    return found


@pytest.mark.parametrize("size", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_every_case_equals_a_plain_loop_in_every_strategy(size: int, tmp_path: Path) -> None:
    expected = {name: plain(case) for name, case in CASES.items()}
    strategies = strategies_at(size) if size > 1 else ["none", "fsdp", "zero3"]
    for key, run in run_world(size, train, tmp_path, strategies)[0].items():
        reference = expected[key.partition(" ")[2]]
        # 2e-5, as in other tests: only the order of float32 sums differs.
        assert worst(run["losses"], reference["losses"]) < 2e-5, key
        assert worst(run["norms"], reference["norms"]) < 2e-5, key
        for name, value in reference["last"].items():
            found = torch.from_numpy(run["last"][name])
            assert float((found - value).norm()) < 1e-4 * float(value.norm()) + 1e-7, f"{key} {name}"


def train_mixed(folder: Path) -> list[float]:
    return train(folder, ["fsdp"], "precision.compute=bf16", names=["idle"])["fsdp idle"]["losses"]


def test_parameters_unused_in_an_accumulation_do_not_disturb_bf16(tmp_path: Path) -> None:
    losses = run_world(2, train_mixed, tmp_path)[0]
    # bfloat16 keeps 8 bits, 4e-3 per rounding, and losses of order one are sums of a few values
    assert worst(losses, plain(CASES["idle"])["losses"]) < 1e-2


class Plateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
    pass


def sam(parameters: Any) -> torch.optim.Optimizer:
    class SAM(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            assert closure is not None, "requires closure"
            closure()
            super().step()

    return SAM(parameters, lr=0.1)


@pytest.mark.parametrize(
    ("make_optimizer", "make_schedule", "told"),
    [
        (torch.optim.LBFGS, None, r"LBFGS\.step needs closure"),
        (sam, None, r"SAM only steps with a closure"),
        (sgd, lambda optimizer: Plateau(optimizer), r"step needs metrics"),
    ],
    ids=["LBFGS", "SAM", "ReduceLROnPlateau"],
)
def test_parts_that_need_a_callback_in_a_custom_loop_are_rejected_by_name(
    make_optimizer: Any, make_schedule: Any, told: str, tmp_path: Path
) -> None:
    config = {"run": {"name": "refused", "dir": str(tmp_path), "steps": 1}, "strategy": {"name": "none"}}
    with disttrain.Engine(config, QUIET) as engine, pytest.raises(ConfigError, match=told):
        engine.prepare("model", NoBlocks, make_optimizer, make_schedule)


def unfreeze(folder: Path, strategies: list[str]) -> list[str]:
    told = []
    for strategy in strategies:
        config = {"run": {"name": strategy, "dir": str(folder), "seed": SEED, "steps": STEPS}}
        with disttrain.Engine(config, [*QUIET, *STRATEGIES[strategy], "checkpoint.at_end=false"]) as engine:
            model = engine.prepare("model", FrozenBlocks, sgd)
            for step in range(2):
                try:
                    engine.accumulate("model", engine.micro_batches(batches(step)[engine.rank :: 2]), squares)
                    engine.step("model")
                except ConfigError as error:
                    told.append(str(error))
                    break
                engine.log()
                model.embed.requires_grad_(True)
    return told


def test_unfrozen_parameters_do_not_silently_stay_untrained(tmp_path: Path) -> None:
    for told in run_world(2, unfreeze, tmp_path, ["ddp", "fsdp", "zero2", "zero3"]):
        assert len(told) == 4 and all("in no optimizer: embed.weight, embed.bias" in one for one in told), told
