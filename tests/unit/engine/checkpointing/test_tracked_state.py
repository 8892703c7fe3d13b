"""Tracked state through a checkpoint: keys that are not text, and averages of sharded parameters."""

from __future__ import annotations

import copy
import json
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import TensorDataset
from world import run_world

import disttrain
from disttrain.checkpoint import Checkpoint
from disttrain.engine.checkpointing.documents import restore_tracked, tracked_shards, tracked_tensor_names
from disttrain.errors import CheckpointError

QUIET = ["report.progress=false", "report.plot=false", "report.trackers=[]"]
STEPS, HALF, RATE = 5, 2, 0.25


class Kept:
    """Tracked: any state, unchanged."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def through_json(source: Any, target: Any) -> None:
    shards, document = tracked_shards("it", source, (0, 1))
    tensors = {shard.name: shard.tensor for shard in shards}
    document = json.loads(json.dumps(document))
    assert sorted(tracked_tensor_names(document)) == sorted(tensors)
    restore_tracked(target, document, tensors)


@pytest.mark.parametrize(
    ("state", "fresh"),
    [
        ({3: "three", 0.5: [1], None: {True: 2}}, {}),
        ({"$tensor": 1, "$items": [2], "a": {"$": 3}}, {}),
        (Counter({4: 2, 7: 1}), Counter()),
        (OrderedDict([("b", 1), ("a", 2)]), OrderedDict()),
        (defaultdict(int, {1: 5}), defaultdict(int)),
        ({"betas": (0.9, 0.95), "list": [1, 2]}, {"betas": (0.0, 0.0), "list": []}),
    ],
)
def test_a_state_is_restored_with_its_keys_and_types(state: Any, fresh: Any) -> None:
    target = Kept(fresh)
    through_json(Kept(copy.deepcopy(state)), target)
    assert target.state == state
    assert type(target.state) is type(state)
    if isinstance(state, defaultdict):
        assert target.state["new"] == 0


def test_an_optimizer_of_torch_can_be_tracked() -> None:
    def step(weight: nn.Parameter, optimizer: torch.optim.Optimizer) -> Tensor:
        weight.grad = torch.full_like(weight, 0.3)
        optimizer.step()
        return weight.detach().clone()

    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([weight], lr=0.1)
    step(weight, optimizer)
    other = nn.Parameter(weight.detach().clone())
    resumed = torch.optim.Adam([other], lr=0.5)
    through_json(optimizer, resumed)
    assert torch.equal(step(other, resumed), step(weight, optimizer))


def test_an_object_without_a_state_yet_accepts_the_saved_one() -> None:
    class Late(Kept):
        def state_dict(self) -> Any:
            return self.state["later"]

    late = Late(None)
    through_json(Kept({"n": 3}), late)
    assert late.state == {"n": 3}


def test_a_key_that_json_cannot_hold_is_rejected_by_name() -> None:
    with pytest.raises(CheckpointError, match=r"Cannot save user/it/a(.|\n)*a key that is a tuple"):
        tracked_shards("it", Kept({"a": {(1, 2): 3}}), (0, 1))


class Net(nn.Module):
    """Sizes that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Any:
        return self.outer(torch.tanh(self.inner(x)))


class Average:
    """An exponential moving average of a model's parameters, as a script writes it for one process."""

    def __init__(self, model: nn.Module) -> None:
        self.values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def update(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            self.values[name].lerp_(parameter.detach(), RATE)

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values, "rate": RATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in self.values.items():
            value.copy_(state["values"][name])

    def full_average(self) -> dict[str, Tensor]:
        return {n: v.full_tensor() if isinstance(v, DTensor) else v.clone() for n, v in self.values.items()}


def squared(model: nn.Module, batch: Any) -> Any:
    return (model(batch[0]) - batch[1]).square().sum(), len(batch[0])


def train(folder: Path, strategy: str, stop_at: int, expected: dict[str, Any] | None) -> dict[str, Any] | None:
    """Train to `stop_at`.

    The average of the complete weights, kept in plain tensors as well, equals the tracked one.
    """
    data = TensorDataset(torch.arange(36.0).reshape(12, 3).sin(), torch.arange(12.0)[:, None].cos())
    config = {"run": {"name": "it", "dir": str(folder), "steps": STEPS}, "strategy": {"name": strategy}}
    with disttrain.Engine(config, QUIET) as engine:
        model = engine.prepare("model", Net, lambda parameters: torch.optim.SGD(parameters, lr=0.5))
        average = Average(model)
        engine.track("average", average)
        plain = None if expected is None else {name: torch.tensor(value) for name, value in expected.items()}
        if plain is None:
            plain = engine.full_weights()
        for batches in engine.batches(data, global_batch=6, micro_batch=2):
            torch.testing.assert_close(average.full_average(), plain, rtol=0, atol=0)
            engine.accumulate("model", batches, squared)
            engine.step()
            average.update(model)
            plain = {name: value.lerp(engine.full_weights()[name], RATE) for name, value in plain.items()}
            engine.log()
            if engine.progress.steps == stop_at:
                break
        torch.testing.assert_close(average.full_average(), plain, rtol=0, atol=0)
        assert all(isinstance(value, DTensor) == (strategy == "fsdp") for value in average.values.values())
        return {name: value.tolist() for name, value in plain.items()}


@pytest.mark.parametrize(
    ("then", "now"), [(("fsdp", 2), ("fsdp", 3)), (("fsdp", 2), ("none", 1)), (("ddp", 2), ("fsdp", 2))]
)
def test_an_average_of_sharded_parameters_continues(
    then: tuple[str, int], now: tuple[str, int], tmp_path: Path
) -> None:
    half = run_world(then[1], train, tmp_path, then[0], HALF, None)[0]
    stored = Checkpoint.open(next((tmp_path / "it" / "checkpoints").iterdir())).tensors[
        "user/average/values/inner.weight"
    ]
    assert len(stored.boxes) == (2 if then[0] == "fsdp" else 1), "each rank writes its own part, and gathers none"
    run_world(now[1], train, tmp_path, now[0], STEPS, half)
