"""Parts of a model made quiet for a trial: dropout that drops nothing, batch norm on its kept statistics."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

KINDS: dict[str, type[nn.Module] | tuple[type[nn.Module], ...]] = {
    "dropout": _DropoutNd,
    "batch_norm": (_BatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    "everything": nn.Module,
}


def silence(model: nn.Module, kinds: Sequence[str]) -> None:
    """Put the model's modules of these kinds into evaluation mode, in place. Local."""
    for kind in kinds:
        for module in model.modules():
            if isinstance(module, KINDS[kind]):
                module.training = False


def batch_norms(model: nn.Module) -> list[str]:
    """The names of modules whose output depends on the whole micro-batch, or that keep statistics of it."""
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
