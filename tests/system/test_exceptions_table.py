"""The table of exceptions in docs/tutorials/your-loop.md: each cell is a training run against a plain PyTorch loop."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.engine_runs import QUIET, STRATEGIES
from launched import PROJECT
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from world import run_world

import disttrain
from disttrain.errors import DisttrainError

PAGE = PROJECT / "docs" / "tutorials" / "your-loop.md"
SEED, STEPS = 3, 3


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def squares(model: Any, x: Tensor) -> Any:
    return (model(x) - 1).square().sum(), len(x)


@dataclass(frozen=True)
class Situation:
    """A model, an optimizer, an objective and an action between steps. One of them is unusual."""

    make_model: Callable[[], nn.Module]
    make_optimizer: Callable[[Any], torch.optim.Optimizer] = sgd
    objective: Callable[[Any, Tensor], Any] = squares
    between_steps: Callable[[nn.Module], None] = lambda model: None
    options: Mapping[str, str] | None = None


class Net(nn.Module):
    """One matrix larger than ZeRO 3 keeps on every rank, one smaller.

    No biases, because Muon and Adafactor accept matrices.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 400, bias=False), nn.Linear(400, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


class Normed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class Routed(Net):
    """Two experts. A micro-batch uses one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.experts[int(x[0, 0] > 0)](x))


class Clamped(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.last.weight.clamp_(-0.02, 0.02)
        return super().forward(x)


def clamp(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.clamp_(-0.02, 0.02)


class Renormed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2, 4, max_norm=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.table((x[:, 0] > 0).long()))


class Sparse(Net):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2, 4, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.table((x[:, 0] > 0).long()))


def penalty(model: Any, x: Tensor) -> Any:
    """A gradient penalty like WGAN-GP's: it differentiates through a gradient."""
    x = x.clone().requires_grad_()
    output = model(x)
    (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    return (output - 1).square().sum() + slope.square().sum(), len(x)


class TwoTypes(Net):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(4, 4, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.wide(x.double()).float())


class Scaled(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Complex(Net):
    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.randn(4, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x * self.turn).real)


class Empty(Net):
    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.nothing.sum()


class Lazy(Net):
    def __init__(self) -> None:
        super().__init__()
        self.lazy = nn.LazyLinear(4)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.lazy(x))


def parametrized() -> nn.Module:
    model = Net()
    parametrizations.weight_norm(model.first)
    return model


class Eager(torch.optim.Optimizer):
    """Momentum that creates its state in the constructor."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.05})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["mean"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                mean = self.state[parameter]["mean"].mul_(0.9).add_(parameter.grad)
                parameter.add_(mean, alpha=-group["lr"])


def adafactor(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(parameters, lr=0.05)


def lbfgs(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters)


# The situations, by the first words of their rows.
SITUATIONS = {
    "Items influence each other": Situation(Normed),
    "Ranks use different modules in a step": Situation(Routed),
    "The same, with `strategy.fsdp.blocks: []`": Situation(Routed, options={"fsdp": "strategy.fsdp.blocks=[]"}),
    "The optimizer reads complete parameters": Situation(Net, adafactor),
    "The optimizer needs a closure": Situation(Net, lbfgs),
    "The optimizer creates state in its constructor": Situation(Net, Eager),
    "The loop changes weights between steps": Situation(Net, between_steps=clamp),
    "The forward changes weights": Situation(Clamped),
    "An embedding has `max_norm`": Situation(Renormed),
    "`torch.nn.utils.parametrize`": Situation(parametrized),
    "The objective differentiates a gradient": Situation(Net, objective=penalty),
    "Trained parameters have several dtypes": Situation(TwoTypes),
    "A parameter has 0 dimensions": Situation(Scaled),
    "A parameter is complex": Situation(Complex),
    "A parameter is empty": Situation(Empty),
    "A module is lazy": Situation(Lazy),
    "A gradient is sparse": Situation(Sparse),
}


def batches(step: int) -> list[Tensor]:
    """Four micro-batches of two items. The first number of each is positive on one rank, negative on the other."""
    generator = torch.Generator().manual_seed(step)
    found = [torch.randn(2, 4, generator=generator) for _ in range(4)]
    for number, batch in enumerate(found):
        batch[:, 0] = batch[:, 0].abs() * (1 if number % 2 else -1)
    return found


def plain(situation: Situation) -> list[float]:
    """Losses of a loop in plain PyTorch. Each expert processes its items only, all other models the global batch."""
    torch.manual_seed(SEED)
    model = situation.make_model()
    optimizer = situation.make_optimizer(model.parameters())
    losses = []
    for step in range(STEPS):
        parts = batches(step) if situation.make_model is Routed else [torch.cat(batches(step))]
        loss = torch.stack([situation.objective(model, part)[0] for part in parts]).sum() / 8
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        situation.between_steps(model)
        losses.append(float(loss.detach()))
    return losses


def train(folder: Path, strategy: str, name: str) -> list[float] | str:
    """Losses of the same training with `Engine`, or the error as `ErrorClass: message`."""
    situation = SITUATIONS[name]
    config = {"run": {"name": "run", "dir": str(folder), "seed": SEED, "steps": STEPS, "timeout_s": 60}}
    extra = (situation.options or {}).get(strategy)
    overrides = [*QUIET, "checkpoint.at_end=false", *STRATEGIES[strategy], *([extra] if extra else [])]
    losses = []
    try:
        with disttrain.Engine(config, overrides) as engine:
            model = engine.prepare("model", situation.make_model, situation.make_optimizer)
            for step in range(STEPS):
                mine = engine.micro_batches(batches(step)[engine.rank :: engine.world_size])
                losses.append(engine.accumulate("model", mine, situation.objective).loss)
                engine.step("model")
                engine.log()
                situation.between_steps(model)
    except DisttrainError as error:
        return f"rejected {type(error).__name__}: {error}"
    except Exception as error:  # noqa: BLE001 - an error of torch
        return f"fails {type(error).__name__}: {error}"
    return losses


def train_all(folder: Path, strategy: str) -> dict[str, list[float] | str]:
    """Run every situation in turn, in this world."""
    return {name: train(folder / str(number), strategy, name) for number, name in enumerate(SITUATIONS)}


def verdict(found: Sequence[float] | str, situation: Situation) -> str:
    """Returns exact, differs, rejected or fails."""
    if isinstance(found, str):
        return found.split()[0]
    worst = max(abs(a - b) / abs(b) for a, b in zip(found, plain(situation), strict=True))
    return "exact" if worst < 2e-5 else "differs"  # the order of float32 sums


def table() -> dict[str, dict[str, str]]:
    """The page's table, from situation to strategy to cell."""
    rows = re.findall(r"^\| (.+) \|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    start = next(number for number, row in enumerate(rows) if row.startswith("situation | none"))
    header, found = rows[start].split(" | "), {}
    for row in rows[start + 1 :]:
        cells = row.split(" | ")
        if len(cells) == len(header):
            found[cells[0]] = dict(zip(header[1:], cells[1:], strict=True))
    return found


def said(cell: str, strategy: str) -> str:
    """The verdict of a cell such as `exact` or `exact; stage 3: rejected`."""
    usual, _, stage_three = cell.partition("; stage 3: ")
    return stage_three if strategy == "zero3" and stage_three else usual


@pytest.mark.parametrize(("strategy", "size"), [("none", 1), ("ddp", 2), ("fsdp", 2), ("zero1", 2), ("zero3", 2)])
def test_every_cell_is_true(strategy: str, size: int, tmp_path: Path) -> None:
    column = "deepspeed" if strategy.startswith("zero") else strategy
    everyone = run_world(size, train_all, tmp_path, strategy)
    rows = {next(name for name in SITUATIONS if row.startswith(name)): cells for row, cells in table().items()}
    assert set(rows) == set(SITUATIONS)
    found = {name: verdict(everyone[0][name], situation) for name, situation in SITUATIONS.items()}
    assert found == {name: said(rows[name][column], strategy) for name in found}
    for name, results in everyone[0].items():  # every rank raises the same error
        if isinstance(results, str):
            assert results.startswith("fails") or all(one[name] == results for one in everyone), name


if __name__ == "__main__":
    import sys
    import tempfile

    for one in sys.argv[1:]:
        where = Path(tempfile.mkdtemp())
        for key, value in run_world(1 if one == "none" else 2, train_all, where, one)[0].items():
            print(
                one,
                "|",
                key,
                "|",
                verdict(value, SITUATIONS[key]),
                "|",
                value if isinstance(value, str) else "",
                flush=True,
            )
