"""`mlp` compared with its layers written out, and its invalid arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from disttrain.errors import ConfigError
from disttrain.model import MLP


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("relu", lambda x: x.clamp(min=0)),
        ("gelu", lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5))),
        ("silu", lambda x: x / (1 + torch.exp(-x))),
        ("tanh", torch.tanh),
        ("sigmoid", lambda x: 1 / (1 + torch.exp(-x))),
    ],
)
def test_the_activation_is_between_the_layers_and_not_after_the_last(activation: str, function: Any) -> None:
    model = MLP(inputs=3, hidden=[5, 4], outputs=2, activation=activation).double()
    (a, b), (c, d), (e, f) = ((one.weight, one.bias) for one in model.modules() if isinstance(one, nn.Linear))
    x = torch.randn(7, 6, 3, dtype=torch.float64)
    expected = function(function(x @ a.T + b) @ c.T + d) @ e.T + f
    # float64, a few roundings of numbers around 1
    torch.testing.assert_close(model(x), expected, rtol=1e-13, atol=1e-13)


def test_without_hidden_layers_it_is_one_linear_layer() -> None:
    model = MLP(inputs=3, hidden=[], outputs=2)
    (weight, bias), x = model.parameters(), torch.randn(4, 3)
    assert torch.equal(model(x), F.linear(x, weight, bias))


def test_its_weights_equal_those_of_torchs_layers_built_in_order() -> None:
    torch.manual_seed(4)
    model = MLP(inputs=3, hidden=[5], outputs=2, dropout=0.5)
    torch.manual_seed(4)
    plain = nn.ModuleList([nn.Linear(3, 5), nn.Linear(5, 2)])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_dropout_is_active_in_training_only() -> None:
    model, x = MLP(inputs=3, hidden=[50], outputs=2, dropout=0.5), torch.randn(4, 3)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"activation": "rleu"}, "'rleu'\n.*gelu, relu, sigmoid, silu, tanh"),
        ({"inputs": 0}, "inputs=0"),
        ({"hidden": [4, 0]}, r"hidden=\[4, 0\]"),
        ({"hidden": 4}, r"hidden=4(.|\n)*list"),
        ({"hidden": "44"}, "hidden='44'"),
        ({"outputs": 2.0}, "outputs=2.0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": -1}, "dropout=-1"),
    ],
    ids=str,
)
def test_impossible_layers_are_rejected(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        MLP(**{"inputs": 3, "hidden": [4], "outputs": 2, **change})
