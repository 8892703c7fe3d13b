"""Calls torch's kernels over lists of tensors, or loops with the same results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from disttrain.torch_internals.access import check, choose, private, small_tensor


def copy_each(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy each value into the target of the same place. Local."""
    _kernel("_foreach_copy_")(targets, values)


def zero_each(tensors: Sequence[Tensor]) -> None:
    """Set all elements of all tensors to zero. Local."""
    _kernel("_foreach_zero_")(tensors)


def multiply_each(tensors: Sequence[Tensor], factor: float | Tensor) -> None:
    """Multiply each tensor by a number or a 0-d tensor, in place. Local."""
    _kernel("_foreach_mul_")(tensors, factor)


def divide_each(tensors: Sequence[Tensor], divisor: Tensor) -> None:
    """Divide each tensor by a 0-d tensor, in place. Local."""
    _kernel("_foreach_div_")(tensors, divisor)


def norm_each(tensors: Sequence[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    """Return the 2-norm of each tensor as a 0-d tensor, computed in `dtype` or else in the tensor's dtype. Local."""
    norms: list[Tensor] = list(_kernel("_foreach_norm")(tensors, dtype=dtype))
    return norms


def _copy_loop(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


def _zero_loop(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        tensor.zero_()


def _multiply_loop(tensors: Sequence[Tensor], factor: float | Tensor) -> None:
    for tensor in tensors:
        # On a CPU the kernel first rounds a number to the tensor's dtype (torch 2.13), which bfloat16 shows.
        rounds = isinstance(factor, float) and tensor.device.type == "cpu"
        tensor.mul_(torch.tensor(factor, dtype=tensor.dtype, device="cpu") if rounds else factor)


def _divide_loop(tensors: Sequence[Tensor], divisor: Tensor) -> None:
    for tensor in tensors:
        tensor.div_(divisor)


def _norm_loop(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [torch.linalg.vector_norm(tensor, dtype=dtype) for tensor in tensors]


_LOOPS: dict[str, Callable[..., Any]] = {
    "_foreach_copy_": _copy_loop,
    "_foreach_zero_": _zero_loop,
    "_foreach_mul_": _multiply_loop,
    "_foreach_div_": _divide_loop,
    "_foreach_norm": _norm_loop,
}
"""The loops that replace torch's kernels where these are missing."""


@cache
def _kernel(name: str) -> Callable[..., Any]:
    """Return torch's kernel of that name, or the loop with the same results."""
    loop = _LOOPS[name]

    def probed() -> Callable[..., Any]:
        kernel: Callable[..., Any] = private(torch, name)
        values = [small_tensor(3.0, -4.0), small_tensor(0.1)]
        calls: dict[str, list[tuple[Any, ...]]] = {
            "_foreach_copy_": [([small_tensor(7.0, 8.0), small_tensor(9.0)],)],
            "_foreach_mul_": [(0.3,), (torch.tensor(0.3, device="cpu"),)],
            "_foreach_div_": [(torch.tensor(0.3, device="cpu"),)],
        }
        for arguments in calls.get(name, [()]):
            ours, theirs = [one.clone() for one in values], [one.clone() for one in values]
            results, expected = kernel(theirs, *arguments) or theirs, loop(ours, *arguments) or ours
            check(all(map(torch.equal, results, expected)), name)
        return kernel

    return choose(f"torch.{name}", loop, probed)


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Return all elements in one vector of the widest dtype. A lone tensor may share its memory with it. Local."""
    flat: Tensor = _flattening()[0](tensors)
    return flat


def unflatten(flat: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Cut a vector that `flatten` made into parts with the shapes of `tensors`, none of which is empty. Local."""
    parts: Sequence[Tensor] = _flattening()[1](flat, tensors)
    return parts


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _unflatten(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


@cache
def _flattening() -> tuple[Callable[..., Tensor], Callable[..., Sequence[Tensor]]]:
    def probed() -> tuple[Callable[..., Tensor], Callable[..., Sequence[Tensor]]]:
        join = private("torch._utils", "_flatten_dense_tensors")
        split = private("torch._utils", "_unflatten_dense_tensors")
        parts = [small_tensor(1.0, 2.0), small_tensor(3.0)[0], small_tensor(4.0, 5.0).view(2, 1)]
        flat = join(parts)
        check(torch.equal(flat, _flatten(parts)), "_flatten_dense_tensors")
        check(all(map(torch.equal, split(flat, parts), parts)), "_unflatten_dense_tensors")
        return join, split

    public: tuple[Callable[..., Tensor], Callable[..., Sequence[Tensor]]] = (_flatten, _unflatten)
    return choose("torch._utils._flatten_dense_tensors", public, probed)
