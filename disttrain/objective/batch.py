"""Reads batches and model outputs for the built-in objectives, by position or by the documented names.

A batch without the names that an objective needs is rejected with an error that lists the names it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from disttrain.errors import TrainingError, explain
from disttrain.objective.return_values import describe

PAIR = "(inputs, targets), or a mapping with 'inputs' and 'targets'"


def read_pair(batch: Any, name: str, forms: str = PAIR) -> tuple[Any, Tensor]:
    """Return (inputs, targets) of a pair or of a mapping with these names. Raises TrainingError for other batches.

    A pair is a tuple or a list, because torch's default collate function makes lists.
    """
    if isinstance(batch, Mapping) and "inputs" in batch and "targets" in batch:
        inputs, targets = batch["inputs"], batch["targets"]
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, targets = batch
    else:
        _reject_batch(batch, name, forms)
    if not isinstance(targets, Tensor):
        _reject_batch(targets, name, "(inputs, targets), where targets is a tensor", what="targets: ")
    return inputs, targets


def _reject_batch(batch: Any, name: str, forms: str, *, what: str = "") -> NoReturn:
    """Raise TrainingError with a description of `batch`. `what` names the part of the batch that is described."""
    problem = f"a mapping with {', '.join(map(repr, batch))}" if isinstance(batch, Mapping) else describe(batch)
    raise TrainingError(
        explain(
            f"{name} needs batches of the form {forms}.",
            f"{what}{problem}",
            "return items of this form from the dataset, set data.collate, or write a custom objective",
        )
    )


def call_model(model: Any, inputs: Any) -> Any:
    """Call the model on its inputs: a mapping becomes keyword arguments, and anything else the only argument."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def read_output(output: Any, name: str) -> Tensor:
    """Return the tensor of predictions: the output itself, its `logits`, or its first element.

    bf16 and fp16 predictions become float32, so that the loss is computed in float32. float64 stays float64. Raises
    TrainingError for an output without a floating-point tensor.
    """
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise TrainingError(
            explain(
                f"{name} needs the model's predictions as a floating-point tensor, or as `logits` of the output.",
                f"the model returned {describe(output)}",
                "return a tensor from the model, or write a custom objective",
            )
        )
    return output if output.dtype in (torch.float32, torch.float64) else output.float()
