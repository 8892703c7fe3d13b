"""Whether an optimizer treats every element by itself, found by trying: strategies that flatten parameters need it.

An optimizer that looks at a parameter as a whole (Adafactor's row means, Muon's orthogonal updates, LAMB's norms) would
train on other numbers in flat parts, and raise nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from disttrain.optim.named import PROBE, MakeOptimizer, NamedParameter

_SHAPE = torch.Size([6, 4])
_CUT = 9
"""Not at the end of a row, as flat partitions are not."""


def is_elementwise(make: MakeOptimizer) -> bool:
    """Whether three steps on a small matrix equal those on its flat parts. Local; builds and drops two optimizers.

    A factory that cannot be called on other parameters than the model's own is trusted; one that only fails on the
    parts is not.
    """
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(_SHAPE, generator=generator)
    gradients = [torch.randn(_SHAPE, generator=generator) for _ in range(3)]
    try:
        whole = _trained(make, [first], [[gradient] for gradient in gradients])
    except Exception:  # noqa: BLE001 - the factory is the user's and may want anything
        return True
    try:
        parts = _trained(make, _cut(first), [_cut(gradient) for gradient in gradients])
    except Exception:  # noqa: BLE001 - as Muon, which refuses vectors
        return False
    return torch.allclose(whole, parts, rtol=1e-5)


def _trained(make: MakeOptimizer, values: Sequence[Tensor], gradients: Sequence[Sequence[Tensor]]) -> Tensor:
    """All values in a row, after a step on each of `gradients`."""
    parameters = [nn.Parameter(value.clone()) for value in values]
    optimizer = make([NamedParameter(PROBE, parameter, _SHAPE) for parameter in parameters])
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return torch.cat([parameter.detach().reshape(-1) for parameter in parameters])


def _cut(tensor: Tensor) -> tuple[Tensor, Tensor]:
    flat = tensor.reshape(-1)
    return flat[:_CUT], flat[_CUT:]
