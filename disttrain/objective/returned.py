"""What users' objectives return, read strictly: each wrong form is named with what was found and what to do.

Refuses in particular what would train in silence on other numbers: a mean for a sum, a vector for a scalar.
Enters: `Objective`. No check here waits for the device.
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
NONE: Mapping[str, Any] = {}
"""The sums of an objective that returns none."""


def unpack_loss(returned: Any, name: str, *, alone: bool) -> tuple[Any, Any, Any]:
    """(total, weight, sums) from what an objective returned; `alone` allows a total by itself. Raises TrainingError."""
    if isinstance(returned, tuple | list) and len(returned) in (2, 3):
        return returned[0], returned[1], returned[2] if len(returned) == 3 else NONE
    if alone and isinstance(returned, Tensor | Mapping):
        return returned, None, NONE
    mean = isinstance(returned, Tensor)
    raise TrainingError(
        explain(
            f"Objective {name} is to return {FORMS}" + (", or the total alone." if alone else "."),
            "a loss without its weight" if mean else describe(returned),
            "return the sum of the items' losses (reduction='sum') and their number"
            + ("" if alone else "; a total alone is allowed where the objective has weigh(batch)"),
        )
    )


def read_total(total: Any, name: str, what: str) -> Tensor:
    """A floating 0-d tensor, as given. Raises TrainingError."""
    if isinstance(total, Tensor) and total.dim() == 0 and total.is_floating_point():
        return total
    raise TrainingError(
        explain(
            f"Objective {name}: {what} is to be a scalar floating tensor, the sum of the batch's losses.",
            describe(total),
            "add the items' losses up, for instance with reduction='sum' or .sum()",
        )
    )


def read_weight(weight: Any, name: str, what: str) -> Tensor | float:
    """A number that is finite and not negative, or a detached 0-d tensor, unread. Raises TrainingError."""
    if isinstance(weight, Tensor):
        if weight.numel() == 1 and not weight.is_complex():
            return weight.detach().reshape(())
    elif _is_real(weight) and math.isfinite(number := float(weight)) and number >= 0:
        return number
    raise TrainingError(
        explain(
            f"Objective {name}: {what} is to be what the total is divided by: a number of samples or tokens.",
            describe(weight),
            "return one finite number that is not negative, or a 0-d tensor",
        )
    )


def read_sums(sums: Any, name: str) -> dict[str, Tensor]:
    """Named tensors to be added over batches and ranks, detached; numbers become tensors. Raises TrainingError."""
    if sums is NONE:
        return {}
    if isinstance(sums, Mapping) and all(isinstance(value, Tensor | Real) for value in sums.values()):
        return {
            str(key): value.detach() if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
            for key, value in sums.items()
        }
    found = {key: describe(value) for key, value in sums.items()} if isinstance(sums, Mapping) else describe(sums)
    raise TrainingError(
        explain(
            f"Objective {name}: sums is to map names to tensors or numbers, added up over batches and ranks.",
            str(found),
            "return a mapping such as {'correct': (predicted == targets).sum()}",
        )
    )


def read_summary(summary: Any, name: str, *, taken: Container[str]) -> dict[str, float]:
    """Names to floats from the user's summarize. Raises TrainingError, also for a name in `taken`."""
    if isinstance(summary, Mapping):
        wrong = [key for key, value in summary.items() if key in taken or not _is_scalar(value)]
        if not wrong:
            return {str(key): float(value) for key, value in summary.items()}
        found = ", ".join(
            f"{key!r}, which is reported already" if key in taken else f"{key!r}: {describe(summary[key])}"
            for key in wrong
        )
    else:
        found = describe(summary)
    raise TrainingError(
        explain(
            f"Objective {name}: summarize(sums) is to return new names, each with one number.",
            found,
            "return a mapping such as {'accuracy': correct / count}",
        )
    )


def describe(value: Any) -> str:
    """A value in a few words, without reading a device's memory."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}: {', '.join(type(item).__name__ for item in value)}"
    if isinstance(value, Real):
        return f"{type(value).__name__} {value}"
    return "None" if value is None else f"a {type(value).__qualname__}"


def _is_real(value: Any) -> bool:
    return type(value) in (int, float) or isinstance(value, Real)  # an abstract class takes a microsecond to ask


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
