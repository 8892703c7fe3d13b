"""An optimizer's capabilities are determined by its behaviour, not by its name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from world import run_world

from disttrain.errors import ConfigError
from disttrain.optim import optimizer_factory
from disttrain.optim.combined import Part, SeveralFactory
from disttrain.optim.named import MakeOptimizer
from disttrain.optim.trials import has_early_state, is_elementwise, is_exact_on_shards, kind_of, reject_closures


def factory(make: Any, **args: Any) -> MakeOptimizer:
    return lambda named: make([one.parameter for one in named], **args)


class NormedSGD(torch.optim.SGD):
    """Each parameter's step has length lr, as in LARS. A shard of a parameter would get another length."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad /= parameter.grad.norm()
        super().step()


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "NAdam", "RAdam", "Rprop"])
def test_torchs_elementwise_optimizers_are_recognized(name: str) -> None:
    assert is_elementwise(factory(getattr(torch.optim, name), lr=0.1))


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "NAdam", "RAdam", "Rprop"])
def test_only_adagrad_makes_state_before_its_first_step(name: str) -> None:
    assert has_early_state(factory(getattr(torch.optim, name), lr=0.1)) == (name == "Adagrad")


@pytest.mark.parametrize("make", [torch.optim.Adafactor, torch.optim.Muon, NormedSGD])
def test_optimizers_that_read_complete_parameters_are_detected(make: Any) -> None:
    assert not is_elementwise(factory(make, lr=0.1))


@pytest.mark.parametrize("options", [{}, {"no_decay": ["norm.*"]}, {"decay_vectors": True}], ids=str)
def test_weight_decay_in_a_config_does_not_affect_the_result(options: dict[str, Any]) -> None:
    args = {"lr": 0.1, "weight_decay": 0.1}
    assert is_elementwise(optimizer_factory(torch.optim.AdamW, args, **options))
    assert not is_elementwise(optimizer_factory(torch.optim.Adafactor, args, **options))


def test_a_factory_bound_to_given_parameters_is_trusted() -> None:
    own = torch.nn.Parameter(torch.zeros(3))
    assert is_elementwise(lambda named: torch.optim.SGD([own], lr=0.1))
    assert is_elementwise(lambda named: torch.optim.SGD([named[7].parameter], lr=0.1))


def test_several_are_elementwise_if_each_is() -> None:
    sgd, muon = factory(torch.optim.SGD, lr=0.1), factory(torch.optim.Muon, lr=0.1)
    assert is_elementwise(SeveralFactory((Part(sgd, ("a",), "optim.0"), Part(sgd, ("b",), "optim.1"))))
    assert not is_elementwise(SeveralFactory((Part(sgd, ("a",), "optim.0"), Part(muon, ("b",), "optim.1"))))


class SAM(torch.optim.SGD):
    """As people write it: a closure that is required despite its default (arXiv 2010.01412)."""

    def step(self, closure: Any = None) -> None:
        assert closure is not None, "sharpness-aware minimization requires closure"
        closure()
        super().step()


@pytest.mark.parametrize("make", [torch.optim.LBFGS, SAM])
def test_optimizers_that_need_a_closure_are_rejected_by_name(make: Any) -> None:
    message = f"Cannot use optim.target, which is stepped without(.|\n)*{make.__name__}.*closure"
    with pytest.raises(ConfigError, match=message):
        reject_closures(factory(make, lr=0.1), "optim.target")


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Muon, torch.optim.Adafactor, NormedSGD])
def test_optimizers_with_an_optional_closure_are_accepted(make: Any) -> None:
    assert kind_of(factory(make, lr=0.1)) is make, "it was tried"
    reject_closures(factory(make, lr=0.1), "optim.target")  # raises nothing


def test_an_optimizer_that_cannot_be_tried_is_trusted() -> None:
    picky = lambda named: SAM([named[7].parameter], lr=0.1)  # noqa: E731
    assert kind_of(picky) is None, "it could not be tried"
    reject_closures(picky, "optim.target")  # raises nothing


class Masked(torch.optim.SGD):
    """Elementwise, with an operation that torch's DTensor does not support."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad[parameter.grad.abs() < 0.1] = 0.0
        super().step()


def on_shards(names: list[str]) -> list[bool]:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    kinds = {"NormedSGD": NormedSGD, "Masked": Masked}
    found = [is_exact_on_shards(factory(kinds.get(name) or getattr(torch.optim, name), lr=0.1), mesh) for name in names]
    dist.destroy_process_group()
    return found


def test_optimizers_that_are_correct_on_shards_are_detected_by_measurement() -> None:
    """A norm over a DTensor is global, so LAMB-like optimizers are correct there, though not elementwise."""
    expected = {"AdamW": True, "SGD": True, "NormedSGD": True, "Muon": False, "Masked": False, "Rprop": False}
    assert run_world(2, on_shards, list(expected)) == [list(expected.values())] * 2


def test_an_optimizer_that_groups_by_position_is_not_mistaken_for_one_that_reads_complete_parameters() -> None:
    def make(parameters: Any) -> Any:
        values = [one.parameter for one in parameters]
        groups = [{"params": values[::2], "lr": 0.2}, {"params": values[1::2], "momentum": 0.5}]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)

    assert is_elementwise(make)
