"""Batch norm whose statistics are those of all ranks' micro-batches together: `model.sync_batch_norm`.

torch's own SyncBatchNorm runs on GPUs alone and counts what a rank only replays. This one runs anywhere, and equals
plain batch norm over the ranks' micro-batches of one round, put together in one process, however uneven they are.
Enters: strategy (building, replays), scripts with an own loop (`synchronize_batch_norm` in their `make_model`).
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


class _Added(torch.autograd.Function):
    """A tensor added up over ranks; so is its gradient, which every rank has a part of."""

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
    """In training one collective in the forward and one in the backward, so every rank calls it equally often."""

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
            self._follow(number, mean, variance)
        shape = (1, -1) + (1,) * (input.dim() - 2)
        found = (wide - mean.view(shape)) * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            found = found * self.weight.view(shape) + self.bias.view(shape)
        return found.to(input.dtype)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Number of values a channel, their mean and biased variance, over all ranks.

        From every rank's own by Chan's formula (parallel variance, 1979): squares of large values lose no digits.
        """
        rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        axes = [0, *range(2, x.dim())]
        own = x.mean(axes)
        squares = (x - own.view(1, -1, *[1] * (x.dim() - 2))).square().sum(axes)
        number = x.new_full((1,), x.numel() / x.shape[1] if self.counts else 0.0)
        row = torch.cat([number, own * self.counts, squares * self.counts])
        table = torch.cat([row.new_zeros(rank, len(row)), row[None], row.new_zeros(size - rank - 1, len(row))])
        added: Tensor = _Added.apply(table, self.group)  # type: ignore[no-untyped-call]
        numbers, means, squares = torch.split(added, [1, len(own), len(own)], dim=1)
        total = numbers.sum()
        mean = (numbers * means).sum(0) / total
        return total, mean, (squares + numbers * (means - mean).square()).sum(0) / total

    @torch.no_grad()
    def _follow(self, number: Tensor, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1.0 / self.num_batches_tracked.to(mean.dtype)
        unbiased = variance * (number / (number - 1).clamp(min=1))
        for running, value in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.add_(share * (value.to(running.dtype) - running))


class SyncBatchNorm1d(_Synchronized, nn.BatchNorm1d):
    """Over inputs of shape (batch, channels) or (batch, channels, length)."""

    dims = (2, 3)


class SyncBatchNorm2d(_Synchronized, nn.BatchNorm2d):
    """Over inputs of shape (batch, channels, height, width)."""

    dims = (4,)


class SyncBatchNorm3d(_Synchronized, nn.BatchNorm3d):
    """Over inputs of shape (batch, channels, depth, height, width)."""

    dims = (5,)


_SYNCHRONIZED: dict[type[nn.Module], type[_Synchronized]] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
}


def synchronize_batch_norm(model: nn.Module, group: Any = None) -> nn.Module:
    """Let every batch norm of `model`, in place, take its statistics over `group` (None: over all ranks). Local.

    Names, weights and buffers stay what they are. Raises ConfigError where there is none, or one of a class of its own.
    """
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, batch_norm_classes())]
    asked = "model.sync_batch_norm is to let batch norms take their statistics over all ranks."
    if not norms:
        raise ConfigError(explain(asked, f"none in {type(model).__qualname__}", "take the key out"))
    for name, module in norms:
        kind = type(module)
        if not isinstance(module, _Synchronized) and kind not in _SYNCHRONIZED:
            found = f"{name!r}, a {kind.__module__}.{kind.__qualname__}, whose forward is its own"
            raise ConfigError(explain(asked, found, "use torch.nn.BatchNorm1d, 2d or 3d, or take the key out"))
    for _, module in norms:
        if not isinstance(module, _Synchronized):
            module.__class__ = _SYNCHRONIZED[type(module)]
        # A group of all ranks is left unsaid: a model that holds a group cannot be copied.
        vars(module)["group"] = None if group is dist.group.WORLD else group
    return model


def synchronized(make_model: Callable[[], nn.Module], group: Any = None) -> Callable[[], nn.Module]:
    """The same factory, of models with synchronized batch norms."""

    def make() -> nn.Module:
        return synchronize_batch_norm(make_model(), group)

    make.__wrapped__ = make_model  # type: ignore[attr-defined]  # a class that says how to fill it is still seen
    return make


def explain_single_value(error: ValueError) -> None:
    """Raise ConfigError where this is torch's about the batch norm of a single value: what a config can do. Local."""
    if "more than 1 value per channel" in str(error):
        raise ConfigError(
            explain(
                "A batch norm needs more than one value a channel to have a variance.",
                f"a micro-batch with one: {error}",
                "set data.last=drop if it is an epoch's last, a data.micro_batch that leaves no sample alone, or "
                "model.sync_batch_norm=true, which takes the statistics over all ranks",
            )
        ) from error


def synchronized_norms(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The synchronized batch norms in `modules`: their buffers follow all ranks, not this one alone. Local."""
    return [one for module in modules for one in module.modules() if isinstance(one, _Synchronized)]


@contextmanager
def left_out(norms: Sequence[nn.Module]) -> Iterator[None]:
    """Meanwhile what this rank puts in counts nothing in the statistics of all: it only replays. Local."""
    for norm in norms:
        vars(norm)["counts"] = False
    try:
        yield
    finally:
        for norm in norms:
            vars(norm).pop("counts")
