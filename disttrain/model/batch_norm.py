"""Computes batch norm statistics over the micro-batches of all ranks (`model.sync_batch_norm`).

torch.nn.SyncBatchNorm runs only on GPUs and counts replayed micro-batches. This module runs on any device. Its result
equals plain batch norm in one process over the concatenated micro-batches of all ranks, even if their sizes differ.
Strategies use it when they build models and replay batches. A custom training loop calls `synchronize_batch_norm` in
its `make_model`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from disttrain.errors import ConfigError, explain
from disttrain.torch_internals.modules import batch_norm_classes


class _AllReduceSum(torch.autograd.Function):
    """Sums a tensor over ranks, and sums its gradient, of which every rank has a part. Collective."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Synchronized(nn.Module):
    """Batch norm with statistics over all ranks.

    Collective in training: the forward and the backward run one all-reduce each, so every rank must call the module
    equally often.
    """

    group: Any = None
    counts = True
    dims: tuple[int, ...] = ()
    eps: float
    momentum: float | None
    affine: bool
    track_running_stats: bool
    weight: Any
    bias: Any
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        alone = not dist.is_initialized() or dist.get_world_size(self.group) == 1
        if alone or not self.training:
            plain: Tensor = super().forward(input)
            return plain
        if input.dim() not in self.dims:
            raise ValueError(f"expected {'D or '.join(map(str, self.dims))}D input (got {input.dim()}D input)")
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        number, mean, variance = self._statistics(wide)
        if self.track_running_stats:
            self._update_running_statistics(number, mean, variance)
        shape = (1, -1) + (1,) * (input.dim() - 2)
        output = (wide - mean.view(shape)) * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            output = output * self.weight.view(shape) + self.bias.view(shape)
        return output.to(input.dtype)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the number of values per channel, their mean and their biased variance, over all ranks. Collective.

        Chan's formula (parallel variance, 1979) combines the statistics of the ranks, so that squares of large values
        lose no digits.
        """
        rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        dims = [0, *range(2, x.dim())]
        local_mean = x.mean(dims)
        squares = (x - local_mean.view(1, -1, *[1] * (x.dim() - 2))).square().sum(dims)
        number = x.new_full((1,), x.numel() / x.shape[1] if self.counts else 0.0)
        row = torch.cat([number, local_mean * self.counts, squares * self.counts])
        table = torch.cat([row.new_zeros(rank, len(row)), row[None], row.new_zeros(size - rank - 1, len(row))])
        summed: Tensor = _AllReduceSum.apply(table, self.group)  # type: ignore[no-untyped-call]
        numbers, means, squares = torch.split(summed, [1, len(local_mean), len(local_mean)], dim=1)
        total = numbers.sum()
        mean = (numbers * means).sum(0) / total
        return total, mean, (squares + numbers * (means - mean).square()).sum(0) / total

    @torch.no_grad()
    def _update_running_statistics(self, number: Tensor, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1.0 / self.num_batches_tracked.to(mean.dtype)
        unbiased = variance * (number / (number - 1).clamp(min=1))
        for running, value in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.add_(share * (value.to(running.dtype) - running))


class SyncBatchNorm1d(_Synchronized, nn.BatchNorm1d):
    """Synchronized batch norm for inputs of shape (batch, channels) or (batch, channels, length)."""

    dims = (2, 3)


class SyncBatchNorm2d(_Synchronized, nn.BatchNorm2d):
    """Synchronized batch norm for inputs of shape (batch, channels, height, width)."""

    dims = (4,)


class SyncBatchNorm3d(_Synchronized, nn.BatchNorm3d):
    """Synchronized batch norm for inputs of shape (batch, channels, depth, height, width)."""

    dims = (5,)


_SYNCHRONIZED: dict[type[nn.Module], type[_Synchronized]] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
}


def synchronize_batch_norm(model: nn.Module, group: Any = None) -> nn.Module:
    """Make every batch norm of `model` compute its statistics over `group` (None: all ranks). In place. Local.

    Names, weights and buffers do not change. Raises ConfigError if the model has no batch norm, or a batch norm of a
    custom class.
    """
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, batch_norm_classes())]
    failed = "Cannot synchronize batch norms over all ranks (model.sync_batch_norm)."
    if not norms:
        raise ConfigError(explain(failed, f"{type(model).__qualname__} has no batch norm", "remove the key"))
    for name, module in norms:
        kind = type(module)
        if not isinstance(module, _Synchronized) and kind not in _SYNCHRONIZED:
            problem = f"{name!r} is a {kind.__module__}.{kind.__qualname__}, which has a custom forward"
            raise ConfigError(explain(failed, problem, "use torch.nn.BatchNorm1d, 2d or 3d, or remove the key"))
    for _, module in norms:
        if not isinstance(module, _Synchronized):
            module.__class__ = _SYNCHRONIZED[type(module)]
        # The group of all ranks is stored as None, because a model that holds a process group cannot be copied.
        vars(module)["group"] = None if group is dist.group.WORLD else group
    return model


def synchronized(make_model: Callable[[], nn.Module], group: Any = None) -> Callable[[], nn.Module]:
    """Return a factory that makes the models of `make_model` with synchronized batch norms. Local."""

    def make() -> nn.Module:
        return synchronize_batch_norm(make_model(), group)

    make.__wrapped__ = make_model  # type: ignore[attr-defined]  # `says_how` looks for a class's `init_weights` here
    return make


def explain_single_value(error: ValueError) -> None:
    """Raise ConfigError if `error` is torch's error about the batch norm of a single value. Local."""
    if "more than 1 value per channel" in str(error):
        raise ConfigError(
            explain(
                "A batch norm needs more than one value per channel to compute a variance.",
                f"a micro-batch has only one: {error}",
                "set data.last=drop if it is the last of an epoch, or choose a data.micro_batch that leaves no single "
                "sample over, or set model.sync_batch_norm=true to compute the statistics over all ranks",
            )
        ) from error


def synchronized_norms(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the synchronized batch norms in `modules`. Their running statistics cover all ranks. Local."""
    return [norm for module in modules for norm in module.modules() if isinstance(norm, _Synchronized)]


@contextmanager
def left_out(norms: Sequence[nn.Module]) -> Iterator[None]:
    """Exclude this rank's values from the statistics of all ranks, for a replay. Local."""
    for norm in norms:
        vars(norm)["counts"] = False
    try:
        yield
    finally:
        for norm in norms:
            vars(norm).pop("counts")
