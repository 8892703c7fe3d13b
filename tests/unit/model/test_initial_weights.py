"""Initial values: equal to plain construction under the seed, equal when filled from shapes, and never unwritten."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from models.user_models import Awkward, Encoder, NanoGPT
from torch import Tensor, nn

from disttrain.errors import ConfigError
from disttrain.model import GPT, MLP, build_model, fill, fill_self, says_how
from disttrain.runtime.seeds import GeneratorFor, generators_for

TINY: dict[str, Any] = {"vocab": 11, "context": 8, "layers": 2, "heads": 4, "width": 16}


class WithInitWeights(nn.Module):
    """Defines `init_weights` for: a weight under two names, a scalar, a running buffer and a computed one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.empty(()))
        self.register_buffer("seen", torch.empty(2))
        self.register_buffer("table", torch.empty(4), persistent=False)
        self.leaves_out: tuple[str, ...] = ()
        self.tie = "first.weight"

    def init_weights(self, generator_for: GeneratorFor) -> Iterator[tuple[str, Tensor]]:
        values = {
            self.tie: torch.empty(3, 3).uniform_(generator=generator_for("tie")),
            "scale": torch.tensor(2.0),
            "seen": torch.zeros(2),
            "table": torch.arange(4.0),
        }
        yield from ((name, value) for name, value in values.items() if name not in self.leaves_out)


class Backwards(GPT):
    def init_weights(self, generator_for: GeneratorFor) -> Iterator[tuple[str, Tensor]]:
        yield from reversed(list(super().init_weights(generator_for)))


class Headed(GPT):
    """Adds to the constructor, but not to `init_weights`."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.value = nn.Linear(16, 1)


class HeadedAndSaid(Headed):
    def init_weights(self, generator_for: GeneratorFor) -> Iterator[tuple[str, Tensor]]:
        return iter(())


class InPlace(nn.Module):
    """Hugging Face's form: the same name with another meaning."""

    def init_weights(self) -> None:
        nn.init.zeros_(self.weight)


class DrawsEverywhere(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4) + float(np.random.rand()) + random.random())
        self.register_buffer("noise", torch.from_numpy(np.random.randn(3)))


def everything(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, persistent or not, under all their names."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def assert_bit_equal(module: nn.Module, other: nn.Module) -> None:
    assert everything(module).keys() == everything(other).keys()
    for name, value in everything(module).items():
        assert value.dtype == everything(other)[name].dtype
        assert torch.equal(value, everything(other)[name]), name


def filled_from_shapes(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    module = build_model(make, seed=seed, meta=True)
    assert all(value.is_meta for value in everything(module).values())
    module.to_empty(device="cpu")
    with torch.no_grad():
        for value in everything(module).values():
            value.fill_(float("nan"))  # so that unwritten values show
    places = everything(module)
    fill(module, generators_for(seed), lambda name, value: places[name].data.copy_(value))
    return module


@pytest.mark.parametrize("seed", [0, 1234, -1, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("sizes", [{}, {"tied": False}, {"kv_heads": 2, "hidden": 20}], ids=str)
def test_gpt_built_under_a_seed_is_bit_equal_to_its_shapes_filled(seed: int, sizes: dict[str, Any]) -> None:
    torch.manual_seed(seed)
    built = GPT(**TINY, **sizes)
    make = functools.partial(GPT, **TINY, **sizes)
    assert_bit_equal(built, filled_from_shapes(make, seed))
    if seed >= 0:
        assert_bit_equal(built, build_model(make, seed=seed, meta=False))


def test_another_seed_gives_other_weights_everywhere_but_norms_and_positions() -> None:
    one, two = (everything(build_model(lambda: GPT(**TINY), seed=seed, meta=False)) for seed in (1, 2))
    equal = {name for name in one if torch.equal(one[name], two[name])}
    assert equal == {name for name in one if "norm" in name or name == "rotary"}


def test_the_order_of_filling_does_not_matter() -> None:
    assert_bit_equal(filled_from_shapes(lambda: GPT(**TINY), 7), filled_from_shapes(lambda: Backwards(**TINY), 7))
    assert_bit_equal(
        build_model(lambda: GPT(**TINY), seed=7, meta=False), filled_from_shapes(lambda: Backwards(**TINY), 7)
    )


def test_gpts_values_are_complete_and_on_the_cpu_with_any_default_device() -> None:
    with torch.device("meta"):
        values = dict(GPT(**TINY).init_weights(generators_for(3)))
    assert {value.device.type for value in values.values()} == {"cpu"}
    torch.manual_seed(3)
    built = everything(GPT(**TINY))
    assert values.keys() == built.keys()
    assert all(torch.equal(values[name], built[name]) for name in built)


def test_both_ways_to_build_gpt_leave_the_generator_where_the_seed_put_it() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    for meta in (False, True):
        build_model(lambda: GPT(**TINY), seed=5, meta=meta)
        assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "make", [NanoGPT, Encoder, Awkward, DrawsEverywhere, lambda: MLP(inputs=3, hidden=[5], outputs=2)]
)
def test_a_users_module_equals_its_construction_in_a_plain_script(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(21)
    np.random.seed(21)
    random.seed(21)
    plain = make()
    after = torch.rand(2), np.random.rand(2).tolist(), random.random()
    assert_bit_equal(build_model(make, seed=21, meta=False), plain)
    assert torch.equal(torch.rand(2), after[0])
    assert (np.random.rand(2).tolist(), random.random()) == after[1:]


@pytest.mark.parametrize(
    ("make", "named"),
    [(lambda: None, "a NoneType"), (lambda: GPT, "a type"), (dict, "a dict"), (lambda: (MLP, 1), "a tuple")],
)
def test_a_model_that_is_no_module_is_rejected(make: Callable[[], Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"model.target .*torch.nn.Module(.|\n)*problem: it returned {named}"):
        build_model(make, seed=0, meta=False)


def wrapped_class(**sizes: Any) -> nn.Module:
    return GPT(**sizes)


functools.update_wrapper(wrapped_class, GPT)


@pytest.mark.parametrize(
    ("maker", "says"),
    [
        (GPT, True),
        (WithInitWeights, True),
        (WithInitWeights(), True),
        (functools.partial(GPT, layers=2), True),
        (functools.partial(functools.partial(GPT, layers=2), heads=2), True),
        (wrapped_class, True),
        (functools.partial(wrapped_class, layers=2), True),
        (Backwards, True),
        (HeadedAndSaid, True),
        (Headed, False),
        (InPlace, False),
        (NanoGPT, False),
        (nn.Linear(2, 2), False),
        (lambda: GPT(**TINY), False),
        (functools.partial(build_model, WithInitWeights, seed=0, meta=False), False),
    ],
    ids=lambda value: getattr(value, "__qualname__", str(type(value).__name__)) if not isinstance(value, bool) else "",
)
def test_only_a_class_that_yields_its_values_is_filled_from_shapes(maker: Any, says: bool) -> None:
    assert says_how(maker) is says


@pytest.mark.parametrize("tie", ["first.weight", "second.weight"])
def test_a_tied_weight_is_written_under_either_name(tie: str) -> None:
    module = WithInitWeights()
    module.tie = tie
    torch.manual_seed(6)
    fill_self(module)
    expected = torch.empty(3, 3).uniform_(generator=generators_for(6)("tie"))
    assert torch.equal(module.first.weight, expected)
    assert module.scale.item() == 2.0
    assert module.table.tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("left_out", "named"),
    [
        (("scale",), "no value for scale"),
        (("seen",), "no value for seen"),
        (("table",), "no value for table"),
        (("first.weight",), "no value for first.weight, second.weight"),
        (("table", "scale", "seen"), "no value for scale, seen, table"),
    ],
)
@pytest.mark.parametrize("meta", [False, True])
def test_an_unwritten_value_is_an_error_with_its_name(left_out: tuple[str, ...], named: str, meta: bool) -> None:
    module = build_model(WithInitWeights, seed=0, meta=meta)
    module.leaves_out = left_out
    with pytest.raises(
        ConfigError, match=f"WithInitWeights.init_weights must yield a value for every(.|\n)*problem: {named}\n"
    ):
        fill(module, generators_for(0), lambda name, value: None)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ([("wieght", torch.zeros(3, 2))], "'wieght' is not one of the model's"),
        ([("weight", torch.zeros(2, 3))], r"shape \(2, 3\) for 'weight', whose shape is \(3, 2\)"),
        ([("weight", torch.zeros(6))], r"shape \(6,\) for 'weight'"),
        ([("weight", 0.5)], "a float for 'weight'"),
        (None, "it returned a NoneType"),
    ],
)
def test_values_that_belong_to_no_tensor_are_rejected(values: Any, named: str) -> None:
    module = nn.Linear(2, 3, bias=False)
    module.init_weights = lambda generator_for: values
    with pytest.raises(ConfigError, match=f"Linear.init_weights(.|\n)*problem: {named}"):
        fill(module, generators_for(0), lambda name, value: None)
