"""Whether an optimizer treats every element by itself, found by trying: strategies that flatten parameters need it.

An optimizer that looks at a parameter as a whole (Adafactor's row means, Muon's orthogonal updates, LAMB's norms) would
train on other numbers in flat parts, and raise nothing.
"""

from __future__ import annotations

import torch
from torch import nn

from disttrain.optim.named import MakeOptimizer, NamedParameter

_SHAPE = torch.Size([6, 4])
_CUT = 9
"""Not at the end of a row, as flat partitions are not."""


def is_elementwise(make: MakeOptimizer) -> bool:
    """Whether three steps on a small matrix equal those on its flat parts. Local; builds and drops two optimizers.

    A factory that cannot be called on other parameters than the model's own is trusted.
    """
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(_SHAPE, generator=generator)
    gradients = [torch.randn(_SHAPE, generator=generator) for _ in range(3)]
    whole = [nn.Parameter(first.clone())]
    parts = [nn.Parameter(part.clone()) for part in _cut(first)]
    try:
        for parameters in (whole, parts):
            optimizer = make([NamedParameter("probe", parameter, _SHAPE) for parameter in parameters])
            for gradient in gradients:
                for parameter, own in zip(
                    parameters, _cut(gradient) if parameters is parts else (gradient,), strict=True
                ):
                    parameter.grad = own.clone()
                optimizer.step()
    except Exception:  # noqa: BLE001 - the factory is the user's and may want anything
        return True
    return torch.allclose(whole[0].detach().reshape(-1), torch.cat([part.detach() for part in parts]), rtol=1e-5)


def _cut(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    flat = tensor.reshape(-1)
    return flat[:_CUT], flat[_CUT:]
