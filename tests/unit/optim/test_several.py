"""Several optimizers as one: which parameters each gets, one state, one step, shared groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from disttrain.config import load_config
from disttrain.errors import ConfigError
from disttrain.optim import NamedParameter
from disttrain.optim.combined import Part, Several, SeveralFactory, factories_of

NAMES = ("a.weight", "a.bias", "b.weight")


def named() -> list[NamedParameter]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3, 2, generator=generator)) for _ in NAMES]
    return [NamedParameter(name, one, one.shape) for name, one in zip(NAMES, parameters, strict=True)]


def adagrad(own: Any) -> torch.optim.Optimizer:
    return torch.optim.Adagrad([one.parameter for one in own], lr=0.1)


def momentum(own: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([one.parameter for one in own], lr=0.1, momentum=0.9)


def factory(*patterns: tuple[str, ...]) -> SeveralFactory:
    makes = (adagrad, momentum, momentum)
    parts = [Part(makes[at], match, f"optim.{at}") for at, match in enumerate(patterns)]
    return SeveralFactory(tuple(parts))


def step_on_noise(optimizers: list[torch.optim.Optimizer], parameters: list[Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()


def test_each_steps_its_parameters_and_the_first_match_wins() -> None:
    mine, plain = named(), named()
    several = factory(("*.weight",), ("a.*",))(mine)
    step_on_noise([several], [one.parameter for one in mine])
    alone = [adagrad([plain[0], plain[2]]), momentum([plain[1]])]
    step_on_noise(alone, [one.parameter for one in plain])
    for found, expected in zip(mine, plain, strict=True):
        assert torch.equal(found.parameter, expected.parameter), found.name


def test_state_and_groups_are_joined_and_belong_to_the_parts() -> None:
    mine = named()
    several = factory(("*.weight",), ("a.*",))(mine)
    assert set(several.state[mine[0].parameter]) == {"step", "sum"}, "Adagrad makes room when it is built"
    step_on_noise([several], [one.parameter for one in mine])
    assert {*map(id, several.state)} == {id(one.parameter) for one in mine}
    assert set(several.state[mine[1].parameter]) == {"momentum_buffer"}
    assert [id(one) for one in several.param_groups] == [id(one) for p in several.parts for one in p.param_groups]
    schedule = torch.optim.lr_scheduler.LambdaLR(several, lambda step: 0.5**step)
    several.step()
    schedule.step()
    assert [part.param_groups[0]["lr"] for part in several.parts] == [0.05, 0.05]


def test_a_state_dict_loads_into_another_of_its_kind_and_continues() -> None:
    first, second = named(), named()
    whole, begun = factory(("*.weight",), ("a.*",))(first), factory(("*.weight",), ("a.*",))(second)
    for optimizer, mine in ((whole, first), (begun, second)):
        step_on_noise([optimizer], [one.parameter for one in mine])
    other = factory(("*.weight",), ("a.*",))(second)
    other.load_state_dict(begun.state_dict())
    step_on_noise([whole], [one.parameter for one in first])
    step_on_noise([other], [one.parameter for one in second])
    for found, expected in zip(second, first, strict=True):
        assert torch.equal(found.parameter, expected.parameter), found.name


@pytest.mark.parametrize(
    ("patterns", "told"),
    [
        ([("a.*",), ("c.*", "b.*")], r"use optim\.1\.match(.|\n)*'c\.\*' matches none of 3 trainable parameters"),
        ([("a.*",), ("a.bias",)], "no match names b.weight"),
        ([("*",), ("a.*",)], r"optim\.1(.|\n)*earlier optimizers take all parameters that a\.\* matches"),
    ],
)
def test_parameters_and_patterns_must_match_completely(patterns: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        factory(*patterns)(named())


def test_a_closure_is_not_accepted() -> None:
    with pytest.raises(TypeError, match="takes no closure"):
        Several([momentum(named())]).step(lambda: 1.0)


def test_each_has_a_separate_factory() -> None:
    assert factories_of(factory(("a.*",), ("*",))) == (adagrad, momentum)
    assert factories_of(momentum) == (momentum,)


# ---------------------------------------------------------------------- in a config

A = {"match": "a.*", "target": "torch.optim.SGD", "args": {"lr": 0.1}}
REST = {"match": ["*"], "target": "torch.optim.AdamW"}


@pytest.mark.parametrize(
    ("said", "clip"), [([None, None], None), ([None, 2.0], 2.0), ([0.5, 0.5], 0.5), ([0, None], 0)]
)
def test_one_clipping_for_all(said: list[Any], clip: Any) -> None:
    config = load_config({"optim": [{**A, "clip_norm": said[0]}, {**REST, "clip_norm": said[1]}]})
    assert config.clip_norm == clip
    assert load_config(config.to_dict()).clip_norm == clip, "a saved config says the same"


@pytest.mark.parametrize(
    ("optim", "told"),
    [
        (
            [{**A, "clip_norm": 1.0}, {**REST, "clip_norm": 2.0}],
            r"optim\.1\.clip_norm(.|\n)*2\.0, but 1\.0 in item 0",
        ),
        ([A, {"mach": "*", "target": "torch.optim.SGD"}], r"optim\.1\.mach(.|\n)*did you mean 'match'"),
        ([A, {"target": "torch.optim.SGD"}], r"optim\.1\.match(.|\n)*add the key 'match'"),
        ([A, {**REST, "target": "AdamW"}], r"optim\.1\.target(.|\n)*write an import path"),
        ([{**A, "match": []}], r"optim\.0\.match(.|\n)*no pattern"),
        ([], "an empty list"),
        (A, r"optim\.match(.|\n)*write a list"),
    ],
)
def test_a_fault_in_a_list_is_reported_with_its_position(optim: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config({"optim": optim})


def test_overrides_change_one_of_the_list_and_leave_the_users_mapping_unchanged() -> None:
    given = {"optim": [A, REST]}
    config = load_config(given, ["optim.0.args.lr=0.5", "optim.1.target=torch.optim.SGD", "optim.1.args.lr=2"])
    assert [one.args for one in config.optim] == [{"lr": 0.5}, {"lr": 2}]
    assert given == {"optim": [A, REST]} and A["args"] == {"lr": 0.1}
    with pytest.raises(ConfigError, match="has no key '2'"):
        load_config(given, ["optim.2.args.lr=1"])
