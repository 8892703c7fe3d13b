"""Names torch's base classes of layers, and ends the worker processes of a data loader."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

from disttrain.torch_internals.access import check, choose, private


@cache
def batch_norm_classes() -> tuple[type[nn.Module], ...]:
    """Return the classes that every batch norm of torch is an instance of. Local."""

    def probed() -> tuple[type[nn.Module], ...]:
        base = private("torch.nn.modules.batchnorm", "_BatchNorm")
        check(all(issubclass(kind, base) for kind in public), "_BatchNorm")
        check(not issubclass(nn.InstanceNorm1d, base), "_BatchNorm")
        return (base,)

    public: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return choose("torch.nn.modules.batchnorm._BatchNorm", public, probed)


@cache
def dropout_classes() -> tuple[type[nn.Module], ...]:
    """Return the classes that every dropout layer of torch is an instance of. Local."""

    def probed() -> tuple[type[nn.Module], ...]:
        base = private("torch.nn.modules.dropout", "_DropoutNd")
        check(all(issubclass(kind, base) for kind in public), "_DropoutNd")
        return (base,)

    public: tuple[type[nn.Module], ...] = (
        nn.Dropout,
        nn.Dropout1d,
        nn.Dropout2d,
        nn.Dropout3d,
        nn.AlphaDropout,
        nn.FeatureAlphaDropout,
    )
    return choose("torch.nn.modules.dropout._DropoutNd", public, probed)


def end_workers(batches: Iterator[Any] | None) -> None:
    """End the worker processes of a data loader's iterator, if it has any. Local.

    Without the private method they end when the iterator is garbage collected, which takes 5 s per iterator.
    """
    try:
        shut_down = private(batches, "_shutdown_workers")
    except AttributeError:  # an iterator without workers, or without the method
        return
    shut_down()
