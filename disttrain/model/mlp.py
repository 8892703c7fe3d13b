"""Implements `mlp` (`model.target: mlp`): linear layers with an activation and dropout between them.

The initial values are those of `nn.Linear`, drawn from the default generator. The model has no `init_weights`, so it is
built on the CPU like most models.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral

from torch import Tensor, nn

from disttrain.errors import ConfigError, explain

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


class MLP(nn.Module):
    """Maps vectors [..., inputs] to vectors [..., outputs].

    Raises ConfigError for an unknown activation, and for an invalid width or dropout.
    """

    def __init__(
        self, *, inputs: int, hidden: Sequence[int], outputs: int, activation: str = "relu", dropout: float = 0.0
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ConfigError(
                explain(
                    "The activation of mlp is unknown.",
                    repr(activation),
                    f"choose one of {', '.join(sorted(ACTIVATIONS))}",
                )
            )
        widths = [inputs, *hidden, outputs] if isinstance(hidden, Sequence) else []
        if not widths or not all(isinstance(width, Integral) and width > 0 for width in widths):
            raise ConfigError(
                explain(
                    "The layer widths of mlp are invalid.",
                    f"inputs={inputs!r}, hidden={hidden!r}, outputs={outputs!r}",
                    "set positive integers, and a list of them for hidden, such as [64, 64]",
                )
            )
        if not (isinstance(dropout, int | float) and 0.0 <= dropout < 1.0):
            raise ConfigError(
                explain("The dropout of mlp is invalid.", f"dropout={dropout!r}", "set a number from 0 to below 1")
            )
        layers: list[nn.Module] = []
        for before, after in pairwise(widths[:-1]):
            layers += [nn.Linear(before, after), ACTIVATIONS[activation]()]
            if dropout:
                layers.append(nn.Dropout(dropout))
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-2], outputs))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y
