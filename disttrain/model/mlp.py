"""`mlp`: linear layers with an activation and dropout between them. Enters: configs (`model.target: mlp`).

Initial values are torch's own (`nn.Linear`), from the default generator: it is built on the host, like most models.
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
    """Vectors [..., inputs] to vectors [..., outputs]. Raises ConfigError for unknown activations and for widths or a
    dropout that no layer can have."""

    def __init__(
        self, *, inputs: int, hidden: Sequence[int], outputs: int, activation: str = "relu", dropout: float = 0.0
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ConfigError(
                explain(
                    "mlp's activation is to be one it knows.",
                    repr(activation),
                    f"choose one of {', '.join(sorted(ACTIVATIONS))}",
                )
            )
        widths = [inputs, *hidden, outputs] if isinstance(hidden, Sequence) else []
        if not widths or not all(isinstance(width, Integral) and width > 0 for width in widths):
            raise ConfigError(
                explain(
                    "mlp's layers are to have at least one unit.",
                    f"inputs={inputs!r}, hidden={hidden!r}, outputs={outputs!r}",
                    "give positive whole numbers, and a list of them for hidden: [64, 64]",
                )
            )
        if not (isinstance(dropout, int | float) and 0.0 <= dropout < 1.0):
            raise ConfigError(
                explain("mlp's dropout is a share.", f"dropout={dropout!r}", "choose one from 0 to below 1")
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
