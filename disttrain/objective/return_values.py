"""Checks the return values of users' objectives, and names the actual value of every invalid form.

In particular, the checks reject values that would silently train on other numbers: a mean instead of a sum, or a vector
instead of a scalar. No check waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from disttrain.errors import TrainingError, explain

FORMS = "(total, weight) or (total, weight, sums)"
NO_SUMS: Mapping[str, Any] = {}
"""The sums of an objective that returns no sums."""


def unpack_loss(returned: Any, name: str, *, alone: bool) -> tuple[Any, Any, Any]:
    """Return (total, weight, sums) of an objective's return value. Raises TrainingError for other forms.

    `alone` also accepts the total without a weight.
    """
    if isinstance(returned, tuple | list) and len(returned) in (2, 3):
        return returned[0], returned[1], returned[2] if len(returned) == 3 else NO_SUMS
    if alone and isinstance(returned, Tensor | Mapping):
        return returned, None, NO_SUMS
    mean = isinstance(returned, Tensor)
    raise TrainingError(
        explain(
            f"Objective {name} must return {FORMS}" + (", or the total alone." if alone else "."),
            "it returned a loss without a weight" if mean else f"it returned {describe(returned)}",
            "return the sum of the items' losses (reduction='sum') and the number of items"
            + ("" if alone else "; an objective with weigh(batch) may return the total alone"),
        )
    )


def read_total(total: Any, name: str, what: str) -> Tensor:
    """Return `total` if it is a 0-d floating-point tensor. Raises TrainingError otherwise."""
    if isinstance(total, Tensor) and total.dim() == 0 and total.is_floating_point():
        return total
    raise TrainingError(
        explain(
            f"Objective {name}: {what} must be a scalar floating-point tensor, the sum of the batch's losses.",
            f"it is {describe(total)}",
            "sum the losses of the items, for example with reduction='sum' or .sum()",
        )
    )


def read_weight(weight: Any, name: str, what: str) -> Tensor | float:
    """Return a finite number that is not negative, or a detached 0-d tensor, whose value is not read.

    Raises TrainingError for other values.
    """
    if isinstance(weight, Tensor):
        if weight.numel() == 1 and not weight.is_complex():
            return weight.detach().reshape(())
    elif _is_real(weight) and math.isfinite(number := float(weight)) and number >= 0:
        return number
    raise TrainingError(
        explain(
            f"Objective {name}: {what} must be the divisor of the total, such as a number of samples or tokens.",
            f"it is {describe(weight)}",
            "return one finite number that is not negative, or a 0-d tensor",
        )
    )


def read_sums(sums: Any, name: str) -> dict[str, Tensor]:
    """Return the named tensors to sum over batches and ranks, detached. Numbers become tensors.

    Raises TrainingError for other values.
    """
    if sums is NO_SUMS:
        return {}
    if isinstance(sums, Mapping) and all(isinstance(value, Tensor | Real) for value in sums.values()):
        return {
            str(key): value.detach() if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
            for key, value in sums.items()
        }
    actual = {key: describe(value) for key, value in sums.items()} if isinstance(sums, Mapping) else describe(sums)
    raise TrainingError(
        explain(
            f"Objective {name}: sums must map names to tensors or numbers, which are summed over batches and ranks.",
            f"it is {actual}",
            "return a mapping such as {'correct': (predicted == targets).sum()}",
        )
    )


def read_summary(summary: Any, name: str, *, taken: Container[str]) -> dict[str, float]:
    """Return the names and floats of the user's summary. Raises TrainingError, also for a name in `taken`."""
    if isinstance(summary, Mapping):
        wrong = [key for key, value in summary.items() if key in taken or not _is_scalar(value)]
        if not wrong:
            return {str(key): float(value) for key, value in summary.items()}
        problem = ", ".join(
            f"{key!r} is already reported" if key in taken else f"{key!r} is {describe(summary[key])}" for key in wrong
        )
    else:
        problem = f"it returned {describe(summary)}"
    raise TrainingError(
        explain(
            f"Objective {name}: summarize(sums) must return new names, each with one number.",
            problem,
            "return a mapping such as {'accuracy': correct / count}",
        )
    )


def describe(value: Any) -> str:
    """Describe a value in a few words, without reading device memory."""
    if isinstance(value, Tensor):
        return f"a tensor of type {str(value.dtype).removeprefix('torch.')} and shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}: {', '.join(type(item).__name__ for item in value)}"
    if isinstance(value, Real):
        return f"{type(value).__name__} {value}"
    return "None" if value is None else f"a {type(value).__qualname__}"


def _is_real(value: Any) -> bool:
    return type(value) in (int, float) or isinstance(
        value, Real
    )  # the check against the abstract class takes a microsecond


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
