"""Optimizers compared with torch's, built and stepped plainly; groups compared by their effect on a weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer

from disttrain.config import resolve_target
from disttrain.errors import ConfigError
from disttrain.optim import NamedParameter, decay_groups, optimizer_factory

SHAPES = {"embed.weight": (5, 4), "block.weight": (4, 4), "block.bias": (4,), "norm.weight": (4,), "scale": ()}


def named_parameters(dtype: torch.dtype = torch.float64, **shapes: tuple[int, ...]) -> list[NamedParameter]:
    """Equal values at each call. Each parameter's shape is its global shape."""
    generator = torch.Generator().manual_seed(0)
    return [
        NamedParameter(name, nn.Parameter(torch.randn(shape, dtype=dtype, generator=generator)), torch.Size(shape))
        for name, shape in (shapes or SHAPES).items()
    ]


def step_on_noise(optimizer: Optimizer, parameters: list[Tensor], steps: int = 12) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
        optimizer.step()


def parameters_of(named: list[NamedParameter]) -> list[Tensor]:
    return [one.parameter for one in named]


def decayed(optimizer_or_groups: Any, named: list[NamedParameter], default: float = 0.1) -> set[str]:
    """The names in groups that decay."""
    groups = getattr(optimizer_or_groups, "param_groups", optimizer_or_groups)
    names = {id(one.parameter): one.name for one in named}
    found = [(names[id(p)], group.get("weight_decay", default)) for group in groups for p in group["params"]]
    assert len(found) == len(named), "every parameter is in one group"
    return {name for name, decay in found if decay}


# ---------------------------------------------------------------------- weight decay


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"embed.weight", "block.weight"}),
        ({"decay_vectors": True}, set(SHAPES)),
        ({"no_decay": ["embed.*"]}, {"block.weight"}),
        ({"no_decay": ["*.weight"]}, set()),
        ({"no_decay": ["norm.*", "scale"], "decay_vectors": True}, {"embed.weight", "block.weight", "block.bias"}),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),  # the same in every process
)
def test_weights_shrink_by_their_decay_and_excluded_ones_do_not(options: dict[str, Any], expected: set[str]) -> None:
    named = named_parameters()
    before = {one.name: one.parameter.detach().clone() for one in named}
    optimizer = optimizer_factory(torch.optim.SGD, {"lr": 0.5, "weight_decay": 0.1}, **options)(named)
    for one in named:
        one.parameter.grad = torch.zeros_like(one.parameter)
    optimizer.step()
    for one in named:
        factor = 1 - 0.5 * 0.1 if one.name in expected else 1.0
        # one rounding of the product, another where the kernel multiplies first
        torch.testing.assert_close(one.parameter.detach(), before[one.name] * factor, rtol=1e-15, atol=1e-16)


@pytest.mark.parametrize(
    ("make", "args", "expected"),
    [
        (torch.optim.AdamW, {}, {"embed.weight", "block.weight"}),  # decays by 0.01 by default
        (torch.optim.AdamW, {"weight_decay": 0.0}, set()),
        (torch.optim.Adam, {}, set()),
        (torch.optim.Rprop, {}, set()),  # has no decay
    ],
)
def test_the_optimizers_default_applies_to_omitted_settings(
    make: Any, args: dict[str, Any], expected: set[str]
) -> None:
    named = named_parameters()
    optimizer = optimizer_factory(make, args)(named)
    assert decayed(optimizer, named, default=0.0) == expected
    assert len(optimizer.param_groups) == (2 if expected else 1)


def test_the_global_shape_decides_what_is_a_vector() -> None:
    cut = [
        NamedParameter("matrix", nn.Parameter(torch.zeros(6)), torch.Size((3, 4))),  # a flat shard of a matrix
        NamedParameter("vector", nn.Parameter(torch.zeros(1, 2)), torch.Size((2,))),
        NamedParameter("empty", nn.Parameter(torch.zeros(0)), torch.Size((3, 4))),  # this rank holds no element of it
    ]
    assert decayed(decay_groups(cut, 0.1), cut) == {"matrix", "empty"}


def test_names_keep_their_order_within_a_group() -> None:
    named = named_parameters()
    groups = decay_groups(named, 0.1)
    order = {id(one.parameter): place for place, one in enumerate(named)}
    places = [[order[id(parameter)] for parameter in group["params"]] for group in groups]
    assert places == [[0, 1], [2, 3, 4]]


@pytest.mark.parametrize("decay", [0.1, 0.0])
def test_a_pattern_that_matches_nothing_is_rejected(decay: float) -> None:
    build = optimizer_factory(torch.optim.AdamW, {"weight_decay": decay}, no_decay=["norm.*", "emebd.*"])
    message = r"problem: 'emebd.\*' matches none of 5 trainable parameters\n.*embed.weight, block.weight"
    with pytest.raises(ConfigError, match=message):
        build(named_parameters())


@pytest.fixture
def world_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("decay", "groups"), [(0.1, 4), (0.0, 2)])
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop])
def test_sharded_and_replicated_tensors_have_separate_groups_and_train(
    world_of_one: None, make: Any, decay: float, groups: int
) -> None:
    mesh = init_device_mesh("cpu", (1,))
    whole, plain = named_parameters(), named_parameters()
    mixed = [
        NamedParameter(one.name, nn.Parameter(distribute_tensor(one.parameter.data, mesh, [Shard(0)])), one.shape)
        if one.name in ("embed.weight", "norm.weight")
        else one
        for one in whole
    ]
    optimizer = optimizer_factory(make, {"lr": 0.01, "weight_decay": decay})(mixed)
    reference = make(decay_groups(plain, decay), lr=0.01, weight_decay=decay, foreach=False)
    assert len(optimizer.param_groups) == groups
    for a, b in zip(mixed, plain, strict=True):
        b.parameter.grad = torch.ones_like(b.parameter)
        cut = isinstance(a.parameter, DTensor)
        a.parameter.grad = distribute_tensor(b.parameter.grad, mesh, [Shard(0)]) if cut else b.parameter.grad
    optimizer.step()
    reference.step()
    for a, b in zip(mixed, plain, strict=True):
        found = a.parameter.full_tensor() if isinstance(a.parameter, DTensor) else a.parameter
        # one float64 step by another kernel
        torch.testing.assert_close(found.detach(), b.parameter.detach(), rtol=1e-14, atol=1e-15)


# ---------------------------------------------------------------------- kernels


@pytest.mark.parametrize(
    ("path", "args"),
    [
        ("torch.optim.AdamW", {"lr": 0.01}),
        ("torch.optim.AdamW", {"lr": 0.01, "amsgrad": True, "maximize": True, "betas": [0.5, 0.9]}),
        ("torch.optim.Adam", {"lr": 0.01, "weight_decay": 0.1}),
        ("torch.optim.SGD", {"lr": 0.01}),
        ("torch.optim.SGD", {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        ("torch.optim.SGD", {"lr": 0.01, "momentum": 0.9, "dampening": 0.3, "maximize": True}),
        ("torch.optim.Adagrad", {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1}),
    ],
    ids=str,
)
def test_the_fused_kernel_is_used_and_gives_the_numbers_of_the_plain_loop(path: str, args: dict[str, Any]) -> None:
    make = resolve_target(path, section="optim", folder=None)
    named, plain = named_parameters(), named_parameters()
    optimizer = optimizer_factory(make, args, decay_vectors=True)(named)
    assert all(group["fused"] is True for group in optimizer.param_groups)
    reference = make(parameters_of(plain), **args, fused=False, foreach=False)
    step_on_noise(optimizer, parameters_of(named))
    step_on_noise(reference, parameters_of(plain))
    # The same float64 formulas, partly rounded in another order, over twelve steps.
    for a, b in zip(named, plain, strict=True):
        torch.testing.assert_close(a.parameter.detach(), b.parameter.detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "Adafactor"])
def test_optimizers_without_a_fused_kernel_do_not_get_the_argument(name: str) -> None:
    make = resolve_target(f"torch.optim.{name}", section="optim", folder=None)
    named, plain = named_parameters(), named_parameters()
    optimizer = optimizer_factory(make, {"lr": 0.01})(named)
    assert optimizer.defaults.get("fused") is None
    reference = make(parameters_of(plain), lr=0.01)
    step_on_noise(optimizer, parameters_of(named))
    step_on_noise(reference, parameters_of(plain))
    for a, b in zip(named, plain, strict=True):
        # all at once instead of one by one, in float64
        torch.testing.assert_close(a.parameter.detach(), b.parameter.detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("given", [{"fused": False}, {"fused": None}, {"foreach": True}, {"foreach": False}], ids=str)
def test_the_users_choice_of_kernel_is_kept(given: dict[str, Any]) -> None:
    optimizer = optimizer_factory(torch.optim.AdamW, given)(named_parameters())
    assert {key: optimizer.defaults[key] for key in given} == given
    assert not optimizer.defaults["fused"]


class InheritedFused(torch.optim.AdamW):
    """A user's optimizer, which inherits `fused` without any promise about it."""


def test_a_users_optimizer_is_built_as_configured() -> None:
    optimizer = optimizer_factory(InheritedFused, {"lr": 0.01})(named_parameters())
    assert (optimizer.defaults["fused"], optimizer.defaults["foreach"]) == (None, None)


@pytest.mark.parametrize("parameter", [torch.zeros(2, 2, dtype=torch.complex64), torch.zeros(2, 2, device="meta")])
def test_parameters_without_a_kernel_request_none(parameter: Tensor) -> None:
    named = [NamedParameter("odd", nn.Parameter(parameter), parameter.shape)]
    assert optimizer_factory(torch.optim.AdamW, {})(named).defaults["fused"] is None


# ---------------------------------------------------------------------- import paths and rejected arguments

LION = """
import torch

class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr=0.1, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(p.grad.sign(), alpha=-group["lr"])

def build(params, speed):
    return Lion(params, lr=speed)

def breaks(params):
    raise ValueError("a bug of its own")
"""


def test_an_optimizer_from_a_users_file_trains(tmp_path: Path) -> None:
    (tmp_path / "lion_for_test.py").write_text(LION)
    make = resolve_target("lion_for_test:Lion", section="optim", folder=tmp_path)
    named = named_parameters(weight=(2, 2), bias=(2,))
    before = [one.parameter.detach().clone() for one in named]
    optimizer = optimizer_factory(make, {"lr": 0.25, "weight_decay": 0.5})(named)
    for one in named:
        one.parameter.grad = torch.full_like(one.parameter, 3.0)
    optimizer.step()
    for one, old, shrunk in zip(named, before, (1 - 0.125, 1.0), strict=True):
        # two float64 roundings
        torch.testing.assert_close(one.parameter.detach(), old * shrunk - 0.25, rtol=1e-15, atol=1e-15)
    function = resolve_target("lion_for_test:build", section="optim", folder=tmp_path)
    assert optimizer_factory(function, {"speed": 0.5})(named).param_groups[0]["lr"] == 0.5
    with pytest.raises(ValueError, match="a bug of its own"):
        optimizer_factory(resolve_target("lion_for_test:breaks", section="optim", folder=tmp_path), {})(named)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"learning_rate": 1.0}, "'learning_rate'(.|\n)*lr"),
        ({"weight_decy": 1.0}, "did you mean 'weight_decay'"),
        ({"params": []}, "multiple values for argument 'params'"),
    ],
    ids=str,
)
def test_unknown_arguments_are_rejected_before_there_is_a_model(args: Mapping[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        optimizer_factory(torch.optim.AdamW, args)


@pytest.mark.parametrize(
    ("make", "args", "named"),
    [
        (torch.optim.AdamW, {"lr": -1.0}, r"Invalid learning rate: -1.0 \(lr=-1.0\)"),
        (torch.optim.AdamW, {"lr": "3e-3"}, r"\(lr='3e-3'\)"),
        (torch.optim.AdamW, {"betas": [0.9]}, r"\(betas=\[0.9\]\)"),
        (torch.optim.SGD, {"lr": 0.1, "nesterov": True}, "Nesterov momentum .*nesterov=True"),
        (torch.optim.Muon, {}, "2D"),  # vectors need another optimizer
    ],
    ids=str,
)
def test_values_that_torch_rejects_are_config_errors(make: Any, args: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"optim.args(.|\n)*problem: .*{named}"):
        optimizer_factory(make, args)(named_parameters())


def test_objects_that_make_no_optimizer_are_rejected() -> None:
    with pytest.raises(ConfigError, match="problem: it returns a dict"):
        optimizer_factory(lambda params: {"params": params}, {})(named_parameters())


def test_an_optimizer_that_needs_a_closure_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"LBFGS\.step needs closure"):
        optimizer_factory(torch.optim.LBFGS, {"lr": 1.0})
