"""User parts unlike torch's: optimizers with numbers as state, unusual memory layouts, counters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.engine_runs import QUIET, STRATEGIES, worst
from torch import Tensor, nn
from world import run_world

import disttrain
from disttrain.errors import CheckpointError, ConfigError, TrainingError

SEED, STEPS, RATE = 3, 6, 0.1


class OldAdam(torch.optim.Optimizer):
    """Its step is a Python int, the decay of its rate a float, its first step a bool, as before torch 1.12."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": RATE})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(step=0, decay=1.0, begun=False, mean=torch.zeros_like(parameter))
                assert (type(state["step"]), type(state["decay"]), type(state["begun"])) == (int, float, bool)
                assert state["begun"] is (state["step"] > 0)
                state.update(step=state["step"] + 1, decay=state["decay"] * 0.9, begun=True)
                state["mean"].mul_(0.9).add_(parameter.grad, alpha=0.1)
                parameter.add_(state["mean"] / (1 - state["decay"]), alpha=-group["lr"])


class Hoarder(OldAdam):
    def step(self) -> None:  # type: ignore[override]
        super().step()
        for state in self.state.values():
            state["history"] = [1, 2]


def net() -> nn.Module:
    return nn.Linear(4, 1)


def batches(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(2, 4, generator=generator) for _ in range(3)]


def squares(model: Any, x: Tensor) -> Any:
    return (model(x) - x.sum(1, keepdim=True)).square().sum(), len(x)


def plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """Every step uses all three batches together."""
    losses = []
    for step in range(STEPS):
        total, weight = squares(model, torch.cat(batches(step)))
        optimizer.zero_grad()
        (total / weight).backward()
        optimizer.step()
        losses.append(total.item() / weight)
    return losses


def train(folder: Path, name: str, make_model: Any, make: Any, stops: Sequence[int]) -> list[float]:
    """Losses up to each stop. After a stop a new engine continues from the checkpoint."""
    losses = []
    for stop in stops:
        config = {"run": {"name": "strange", "dir": str(folder), "seed": SEED, "steps": STEPS, "timeout_s": 60}}
        with disttrain.Engine(config, [*QUIET, *STRATEGIES[name]]) as engine:
            engine.prepare("model", make_model, make)
            engine.resume()
            while engine.progress.steps < stop:
                mine = batches(engine.progress.steps)[engine.rank :: engine.world_size]
                losses.append(engine.accumulate("model", engine.micro_batches(mine), squares).loss)
                engine.step("model")
                engine.log()
            engine.save()
    return losses


def built(make_model: Any) -> nn.Module:
    torch.manual_seed(SEED)
    return make_model()


def test_numbers_in_an_optimizers_state_stay_numbers_under_any_strategy(tmp_path: Path) -> None:
    model = built(net)
    expected = plain(model, OldAdam(model.parameters()))
    losses: list[float] = []
    for stop, (name, size) in enumerate((("ddp", 2), ("zero2", 2), ("fsdp", 3), ("none", 1)), start=1):
        losses += run_world(size, train, tmp_path, name, net, OldAdam, [stop])[0]
    assert worst(losses, expected[:4]) < 2e-5  # the order of float32 sums


def test_other_state_is_rejected_by_name_when_it_is_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"optim/model/weight:history(.|\n)*a list"):
        train(tmp_path, "none", net, Hoarder, [1])


class Odd(nn.Module):
    """A transposed weight, a kernel in channels_last and an empty parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
        self.mix = nn.Parameter(torch.randn(5, 4).t())
        self.nothing = nn.Parameter(torch.zeros(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        image = x[:, :3, None, None].expand(-1, -1, 2, 2)
        return (self.kernel(image)[:, :, 0, 0] @ self.mix).mean(1, keepdim=True) + self.nothing.sum()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


class ChannelsLast(nn.Module):
    """The same without an empty parameter, and large enough for ZeRO 3 to shard."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Conv2d(3, 40, 3).to(memory_format=torch.channels_last)
        self.mix = nn.Parameter(torch.randn(300, 40).t() / 20)

    def forward(self, x: Tensor) -> Tensor:
        image = x[:, :3, None, None].expand(-1, -1, 3, 3)
        return (self.kernel(image)[:, :, 0, 0] @ self.mix).mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("name", "make"),
    [*((name, Odd) for name in ("ddp", "ddp-buckets", "fsdp")), *((f"zero{n}", ChannelsLast) for n in (1, 2, 3))],
)
def test_parameters_may_have_any_memory_format_and_size(name: str, make: type[nn.Module], tmp_path: Path) -> None:
    model = built(make)
    expected = plain(model, sgd(model.parameters()))
    found = run_world(3, train, tmp_path, name, make, sgd, [2, STEPS])[0]
    assert worst(found, expected) < 2e-5  # the order of float32 sums


class Clamped(nn.Module):
    """Changes a weight in its forward, as early implementations of weight clipping did."""

    def __init__(self) -> None:
        super().__init__()
        # above the size that ZeRO 3 keeps on every rank, and below
        self.first, self.last = nn.Linear(4, 120), nn.Linear(120, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.last.weight.clamp_(-0.05, 0.05)
        return self.last(self.first(x))


class Clipped(nn.Module):
    """The loop changes its weights between steps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 120), nn.Linear(120, 120)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x)).mean(1, keepdim=True)


def clip_by_hand(folder: Path, strategy: Sequence[str], make: type[nn.Module], by_hand: bool) -> list[float] | str:
    """The losses of four steps, or the error."""
    config = {"run": {"name": "clip", "dir": str(folder), "seed": SEED, "steps": 4}}
    losses = []
    try:
        with disttrain.Engine(config, [*QUIET, "checkpoint.at_end=false", *strategy]) as engine:
            model = engine.prepare("model", make, lambda own: torch.optim.SGD(own, lr=0.05))
            for step in range(4):
                mine = engine.micro_batches(batches(step)[engine.rank :: engine.world_size])
                sums = engine.accumulate("model", mine, lambda model, x: ((model(x) - 1).square().sum(), len(x)))
                losses.append(sums.loss)
                engine.step("model")
                engine.log()
                with torch.no_grad():
                    for parameter in model.parameters() if by_hand else ():
                        parameter.clamp_(-0.05, 0.05)
    except TrainingError as error:
        return str(error)
    return losses


@pytest.mark.parametrize("make", [Clamped, Clipped])
@pytest.mark.parametrize("name", ["ddp", "ddp-buckets", "fsdp", "zero1", "zero3"])
def test_weights_changed_by_hand_are_kept_or_rejected(name: str, make: type[nn.Module], tmp_path: Path) -> None:
    """If the weights are sharded, the change would be lost silently: in the forward, and under ZeRO 3 at any time."""
    by_hand = make is Clipped
    (expected,) = run_world(1, clip_by_hand, tmp_path / "one", STRATEGIES["none"], make, by_hand)
    (other,) = run_world(1, clip_by_hand, tmp_path / "other", STRATEGIES["none"], make, False)
    assert not by_hand or worst(expected, other) > 1e-3
    found = run_world(2, clip_by_hand, tmp_path / "two", STRATEGIES[name], make, by_hand)
    if name == "zero3" or (name == "fsdp" and not by_hand):
        assert found[0] == found[1]
        assert ("between steps" if by_hand else "in the forward") in found[0] and "last.weight" in found[0]
    else:
        assert worst(found[0], expected) < 2e-5  # the order of float32 sums


def prepare_alone(folder: Path, strategy: Sequence[str], make: Any) -> str:
    config = {"run": {"name": "refused", "dir": str(folder), "steps": 1}}
    try:
        with disttrain.Engine(config, [*QUIET, *strategy]) as engine:
            engine.prepare("model", make, sgd)
    except ConfigError as error:
        return str(error)
    return "nothing raised"


def renormed() -> nn.Module:
    return nn.Sequential(nn.Embedding(5, 4, max_norm=1.0), nn.Linear(4, 1))


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 1))


def of_two_types() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4).double(), nn.Linear(4, 1))


@pytest.mark.parametrize(
    ("name", "make", "found"),
    [
        ("ddp", renormed, "max_norm of 0:"),
        ("fsdp", renormed, "max_norm of 0:"),
        ("ddp", lazy, "no shape yet: 0.weight, 0.bias"),
        ("zero3", lazy, "no shape yet: 0.weight, 0.bias"),
        ("fsdp", of_two_types, "0.weight of float64, 1.weight of float32"),
        ("zero1", of_two_types, "0.bias of float64, 1.bias of float32"),
        ("zero3", of_two_types, "0.bias of float64, 1.bias of float32"),
    ],
)
def test_models_that_cannot_be_replicated_or_sharded_are_rejected_by_name(
    name: str, make: Any, found: str, tmp_path: Path
) -> None:
    told = run_world(2, prepare_alone, tmp_path, STRATEGIES[name], make)
    assert told[0] == told[1] and found in told[0], told


@pytest.mark.parametrize("name", ["none", "ddp", "ddp-buckets"])
def test_sparse_gradients_are_rejected_by_name(name: str, tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Flatten(0), nn.Embedding(3, 1, sparse=True), nn.Unflatten(0, (-1, 4)))

    def objective(model: Any, x: Tensor) -> Any:
        return model((x > 0).long()).sum(), len(x)

    config = {"run": {"name": "sparse", "dir": str(tmp_path), "steps": 1}}
    with disttrain.Engine(config, [*QUIET, *STRATEGIES[name]]) as engine:
        engine.prepare("model", make, sgd)
        engine.accumulate("model", engine.micro_batches(batches(0)), objective)
        with pytest.raises(ConfigError, match=r"the gradient of '1.weight' is sparse"):
            engine.step("model")


def change_memory_format(folder: Path, strategy: Sequence[str], accumulated: int) -> Any:
    """The kernel's use after three steps of fused Adam on a model whose memory format changed after `prepare`."""
    config = {"run": {"name": "change_memory_format", "dir": str(folder), "seed": SEED, "steps": 3}}
    with disttrain.Engine(config, [*QUIET, "checkpoint.at_end=false", *strategy]) as engine:
        make = lambda parameters: torch.optim.AdamW(parameters, lr=0.05, fused=True)  # noqa: E731
        model = engine.prepare("model", lambda: nn.Conv2d(3, 4, 3), make)
        model.to(memory_format=torch.channels_last)
        for step in range(3):
            images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
            mine = engine.micro_batches(list(images[engine.rank :: engine.world_size].chunk(accumulated)))
            engine.accumulate("model", mine, lambda model, x: (model(x).square().sum(), len(x)))
            engine.step("model")
            engine.log()
        return engine.full_weights("model")["weight"].numpy()


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("name", ["ddp", "ddp-buckets"])
def test_a_model_continues_training_after_a_change_of_memory_format(
    name: str, accumulated: int, tmp_path: Path
) -> None:
    (expected,) = run_world(1, change_memory_format, tmp_path / "one", STRATEGIES["none"], 1)
    found = run_world(2, change_memory_format, tmp_path / "two", STRATEGIES[name], accumulated)[0]
    assert abs(found - expected).max() < 1e-5


class Counting(nn.Module):
    """Trained, and counts its batches in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(1))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, model: Any, x: Tensor) -> Any:
        self.seen += 1
        return (model(x) + self.offset).square().sum(), len(x)


def count(folder: Path) -> int:
    config = {"run": {"name": "count", "dir": str(folder), "seed": SEED, "steps": 1}, "strategy": {"name": "ddp"}}
    objective = Counting()
    with disttrain.Engine(config, QUIET) as engine:
        engine.prepare("model", net, sgd, objective=objective)
        mine = batches(0)[engine.rank :: engine.world_size]
        engine.accumulate("model", engine.micro_batches(mine), objective)
        return int(objective.seen)


def test_a_replay_leaves_no_trace_in_the_trained_objective(tmp_path: Path) -> None:
    assert run_world(2, count, tmp_path) == [2, 1]  # three batches: the second rank replays one
