"""An optimizer is elementwise or not by what it does, not by its name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from disttrain.optim import optimizer_factory
from disttrain.optim.named import MakeOptimizer
from disttrain.optim.trials import is_elementwise


def factory(make: Any, **args: Any) -> MakeOptimizer:
    return lambda named: make([one.parameter for one in named], **args)


class NormedSGD(torch.optim.SGD):
    """Each parameter's step has length lr, as in LARS: another length for each part of a cut parameter."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad /= parameter.grad.norm()
        super().step()


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "NAdam", "RAdam", "Rprop"])
def test_torchs_elementwise_optimizers_are_seen_as_such(name: str) -> None:
    assert is_elementwise(factory(getattr(torch.optim, name), lr=0.1))


@pytest.mark.parametrize("make", [torch.optim.Adafactor, torch.optim.Muon, NormedSGD])
def test_those_that_look_at_a_whole_parameter_are_found(make: Any) -> None:
    assert not is_elementwise(factory(make, lr=0.1))


@pytest.mark.parametrize("options", [{}, {"no_decay": ["norm.*"]}, {"decay_vectors": True}], ids=str)
def test_what_a_config_says_of_weight_decay_hides_nothing(options: dict[str, Any]) -> None:
    args = {"lr": 0.1, "weight_decay": 0.1}
    assert is_elementwise(optimizer_factory(torch.optim.AdamW, args, **options))
    assert not is_elementwise(optimizer_factory(torch.optim.Adafactor, args, **options))


def test_a_factory_bound_to_its_own_parameters_is_trusted() -> None:
    own = torch.nn.Parameter(torch.zeros(3))
    assert is_elementwise(lambda named: torch.optim.SGD([own], lr=0.1))
    assert is_elementwise(lambda named: torch.optim.SGD([named[7].parameter], lr=0.1))
