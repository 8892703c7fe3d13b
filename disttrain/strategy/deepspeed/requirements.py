"""Imports DeepSpeed, quiet, and rejects environments and models that it cannot train."""

from __future__ import annotations

import importlib
import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from disttrain.errors import ConfigError, LaunchError, explain
from disttrain.runtime import export_for_libraries, read_launch
from disttrain.strategy.deepspeed.deepspeed_internals import build_no_kernels


def import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for the accelerator of `device`, and lower its log level. Local.

    Raises ConfigError with the install line where the package is missing.
    """
    export_for_libraries(read_launch(), {"DS_ACCELERATOR": device.type, "DS_BUILD_OPS": "0"})
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            module = importlib.import_module("deepspeed")
    except ImportError as error:
        raise ConfigError(
            explain(
                "Cannot use strategy deepspeed: the package deepspeed cannot be imported.",
                str(error),
                "pip install --no-build-isolation 'disttrain[deepspeed]'",
            )
        ) from error
    logger.setLevel(logging.WARNING)  # the import sets it to INFO
    logger.addFilter(_is_worth_a_line)
    # At every step DeepSpeed 0.19 calls collectives by names that torch 2.13 deprecates. Users cannot change that.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    build_no_kernels()
    return module


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """Drop DeepSpeed's warning of an untested optimizer, which every rank would repeat: `optim.trials` tests it."""
    return "untested optimizer" not in record.getMessage()


def reject_nvme(deepspeed: Any) -> None:
    """Reject offload to disk: LaunchError where DeepSpeed's asynchronous file access is missing, else ConfigError."""
    failed = "Cannot offload to nvme under strategy deepspeed."
    builder = importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        problem = "libaio with its headers or a C++ compiler is missing: DeepSpeed cannot build its async_io"
        raise LaunchError(explain(failed, problem, "apt-get install libaio-dev g++ ninja-build, or use offload=cpu"))
    problem = f"checkpoints cannot read state on disk yet (deepspeed {deepspeed.__version__} has its async_io)"
    raise ConfigError(explain(failed, problem, "use strategy.deepspeed.offload=cpu until a later release"))


def reject_early_state(optimizer: Optimizer) -> None:
    """Raise ConfigError for an optimizer that has state for its parameters before its first step. Local.

    DeepSpeed replaces the parameters by flat parts, for which that state has the wrong shape. Of torch's optimizers
    only Adagrad makes such state, and DeepSpeed 0.19 would replace it by an Adagrad with one group and no schedule.
    """
    if any(isinstance(key, Tensor) and state for key, state in optimizer.state.items()):
        raise early_state_error(type(optimizer).__qualname__)


def early_state_error(kind: str) -> ConfigError:
    """The error for an optimizer class that makes state before its first step. Pure."""
    return ConfigError(
        explain(
            "Cannot use this optimizer under strategy deepspeed, which replaces its parameters by flat parts.",
            f"{kind} makes state for its parameters before its first step",
            "use strategy ddp or fsdp, or an optimizer that makes state at its first step, such as AdamW",
        )
    )


def reject_parameters(model: nn.Module, *, stage: int) -> None:
    """Raise ConfigError for parameters that DeepSpeed 0.19 cannot train correctly. Local.

    DeepSpeed views every parameter as bytes, which torch cannot do with 0 dimensions. It silently drops the imaginary
    part of a complex parameter, and works in one dtype. Stage 3 waits forever for a parameter without elements.
    """
    dtypes = {parameter.dtype: name for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    several = [f"{name} of {str(dtype).removeprefix('torch.')}" for dtype, name in dtypes.items()]
    named = list(model.named_parameters())
    for kind, names in (
        ("several dtypes", several if len(several) > 1 else []),
        ("0-d", [name for name, parameter in named if parameter.dim() == 0]),
        ("complex", [name for name, parameter in named if parameter.is_complex()]),
        ("empty", [name for name, parameter in named if stage == 3 and not parameter.numel()]),
    ):
        if names:
            raise ConfigError(
                explain(
                    "Cannot train this model under strategy deepspeed: it takes real parameters of one dtype with at "
                    "least one dimension, and in stage 3 at least one element.",
                    f"{kind} parameters: {', '.join(names)}",
                    "use strategy ddp, which takes these parameters, or change their shape or dtype",
                )
            )
