"""Tries optimizers on a small matrix, to learn whether they can step parts of parameters and need no closure.

An optimizer that uses a complete parameter (Adafactor's row means, Muon's orthogonal updates, LAMB's norms) computes
other numbers on flat parts, and raises no error. Strategies that shard parameters therefore try it first. A factory
that only accepts the model's own parameters cannot be tried, and is trusted.
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
"""Inside a row, because flat partitions do not end at rows either."""


def is_elementwise(make: MakeOptimizer) -> bool:
    """Whether three steps on a small matrix equal those on its flat parts. Local."""
    return _is_exact(make, _ROWS, _cut)


def is_exact_on_shards(make: MakeOptimizer, mesh: DeviceMesh) -> bool:
    """Whether three steps on a small matrix equal those on a DTensor, sharded by rows over a mesh with one axis.

    Collective. Every rank holds rows of the matrix, so that an optimizer that raises does so on all ranks.
    """
    return _is_exact(
        make, 2 * mesh.size(), lambda tensor: [distribute_tensor(tensor, mesh, [Shard(0)])], mesh.device_type
    )


def has_early_state(make: MakeOptimizer) -> bool:
    """Whether an optimizer makes state for its parameters before its first step, as Adagrad does. Local."""
    try:
        optimizer = make([_named(torch.ones(_ROWS, _COLUMNS))])
    except Exception:  # noqa: BLE001 - the factory is the user's and may raise anything
        return False
    return any(isinstance(key, Tensor) and state for key, state in optimizer.state.items())


def kind_of(make: MakeOptimizer) -> type[Optimizer] | None:
    """The class of a factory's optimizer, or None if the factory only accepts the model's own parameters. Local."""
    try:
        return type(make([_named(torch.ones(_ROWS, _COLUMNS))]))
    except Exception:  # noqa: BLE001 - the factory is the user's and may raise anything
        return None


def reject_closures(make: MakeOptimizer, what: str) -> None:
    """Raise ConfigError for an optimizer that only steps with a closure, as LBFGS or SAM do. Local.

    Its signature shows that, or a trial: it steps with a closure and fails without.
    """
    for one in factories_of(make):
        kind = kind_of(one)
        if kind is None:
            continue
        check_step(kind, what)
        if not _steps(one, with_closure=False) and _steps(one, with_closure=True):
            problem = f"{kind.__qualname__} only steps with a closure: it computes the loss several times in a step"
            fix = "choose an optimizer that steps on computed gradients, such as AdamW or SGD"
            raise ConfigError(explain(f"Cannot use {what}, which is stepped without arguments.", problem, fix))


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
    except Exception:  # noqa: BLE001 - any exception means that it cannot be stepped in this way
        return False
    return True


def _is_exact(make: MakeOptimizer, rows: int, cut: Callable[[Tensor], Sequence[Tensor]], device: str = "cpu") -> bool:
    generator = torch.Generator().manual_seed(0)
    first, *gradients = (torch.randn(rows, _COLUMNS, generator=generator).to(device) for _ in range(4))
    for one in factories_of(make):
        try:
            whole = _trained(one, first, gradients)
        except Exception:  # noqa: BLE001 - the factory is the user's and may raise anything
            continue
        try:
            # Separate optimizers, because one that groups by position would give the two parts different settings.
            cuts = zip(cut(first), *map(cut, gradients), strict=True)
            parts = torch.cat([_trained(one, value, own) for value, *own in cuts])
        except Exception:  # noqa: BLE001 - for example Muon, which rejects vectors
            return False
        if not torch.allclose(whole, parts, rtol=1e-5):
            return False
    return True


def _trained(make: MakeOptimizer, value: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    """The flattened value after one step on each of `gradients`."""
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
