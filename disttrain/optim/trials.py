"""What an optimizer can do, found by trying it on a small matrix, not by its name.

Strategies that cut parameters ask: one that looks at a parameter as a whole (Adafactor's row means, Muon's orthogonal
updates, LAMB's norms) would train on other numbers in flat parts, and raise nothing. Everyone asks whether it steps
without a closure. A factory that cannot be called on other parameters than the model's own is trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer

from disttrain.errors import ConfigError, explain
from disttrain.optim.build import check_step
from disttrain.optim.combined import factories_of
from disttrain.optim.named import PROBE, MakeOptimizer, NamedParameter

_ROWS, _COLUMNS = 6, 4
_CUT = 9
"""Not at the end of a row, as flat partitions are not."""


def is_elementwise(make: MakeOptimizer) -> bool:
    """Whether three steps on a small matrix equal those on its flat parts. Local; builds and drops two optimizers."""
    return _is_exact(make, _ROWS, _cut)


def is_exact_on_shards(make: MakeOptimizer, mesh: DeviceMesh) -> bool:
    """Whether three steps on a small matrix equal those on a DTensor, cut by rows over a mesh of one axis. Collective.

    Every rank holds rows of it: one that raises does so on all of them.
    """
    return _is_exact(
        make, 2 * mesh.size(), lambda tensor: [distribute_tensor(tensor, mesh, [Shard(0)])], mesh.device_type
    )


def kind_of(make: MakeOptimizer) -> type[Optimizer] | None:
    """The class that a factory of one optimizer makes, None where only the model's own parameters would tell. Local."""
    try:
        return type(make([_named(torch.ones(_ROWS, _COLUMNS))]))
    except Exception:  # noqa: BLE001 - the factory is the user's and may want anything
        return None


def refuse_closures(make: MakeOptimizer, what: str) -> None:
    """Raise ConfigError for an optimizer that only steps with a closure, as LBFGS or SAM do. Local.

    Found in its signature, or by trying: it steps with one, and not without.
    """
    for one in factories_of(make):
        kind = kind_of(one)
        if kind is None:
            continue
        check_step(kind, what)
        if not _steps(one, with_closure=False) and _steps(one, with_closure=True):
            found = f"{kind.__qualname__}, which steps with a closure only: it computes the loss several times a step"
            do = "choose one that steps on the gradients at hand, such as AdamW or SGD"
            raise ConfigError(explain(f"{what} is stepped without arguments, once a step.", found, do))


def _steps(make: MakeOptimizer, *, with_closure: bool) -> bool:
    try:
        named = _named(torch.ones(_ROWS, _COLUMNS))
        optimizer = make([named])
        named.parameter.grad = torch.ones_like(named.parameter)

        def loss() -> Tensor:
            with torch.enable_grad():
                optimizer.zero_grad()
                total = named.parameter.square().sum()
                total.backward()  # type: ignore[no-untyped-call]
            return total

        optimizer.step(*([loss] if with_closure else []))  # type: ignore[arg-type]
    except Exception:  # noqa: BLE001 - whatever it is: it does not step so
        return False
    return True


def _is_exact(make: MakeOptimizer, rows: int, cut: Callable[[Tensor], Sequence[Tensor]], device: str = "cpu") -> bool:
    generator = torch.Generator().manual_seed(0)
    first, *gradients = (torch.randn(rows, _COLUMNS, generator=generator).to(device) for _ in range(4))
    for one in factories_of(make):
        try:
            whole = _trained(one, first, gradients)
        except Exception:  # noqa: BLE001 - the factory is the user's and may want anything
            continue
        try:
            # Each by an optimizer of its own: one that groups by position would give two parts other settings.
            cuts = zip(cut(first), *map(cut, gradients), strict=True)
            parts = torch.cat([_trained(one, value, own) for value, *own in cuts])
        except Exception:  # noqa: BLE001 - as Muon, which refuses vectors
            return False
        if not torch.allclose(whole, parts, rtol=1e-5):
            return False
    return True


def _trained(make: MakeOptimizer, value: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    """The value in a row, after a step on each of `gradients`."""
    named = _named(value)
    optimizer = make([named])
    for gradient in gradients:
        named.parameter.grad = gradient.clone()
        optimizer.step()
    return _whole(named.parameter.detach()).reshape(-1)


def _named(value: Tensor) -> NamedParameter:
    return NamedParameter(PROBE, nn.Parameter(value.clone()), torch.Size((_ROWS, _COLUMNS)))


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _cut(tensor: Tensor) -> tuple[Tensor, Tensor]:
    flat = tensor.reshape(-1)
    return flat[:_CUT], flat[_CUT:]
