"""How the built-in objectives read a batch and a model's output: by position, or by the names they document.

Refuses a batch without the names it needs, saying which are there. Enters: the built-in objectives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from disttrain.errors import TrainingError, explain
from disttrain.objective.returned import describe

PAIR = "(inputs, targets), or a mapping with 'inputs' and 'targets'"


def read_pair(batch: Any, name: str, forms: str = PAIR) -> tuple[Any, Tensor]:
    """(inputs, targets) of a pair (tuple or list: torch's collate makes lists) or of a mapping with these names."""
    if isinstance(batch, Mapping) and "inputs" in batch and "targets" in batch:
        inputs, targets = batch["inputs"], batch["targets"]
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, targets = batch
    else:
        refuse_batch(batch, name, forms)
    if not isinstance(targets, Tensor):
        refuse_batch(targets, f"The targets of {name}: it", "(inputs, targets), where targets is a tensor")
    return inputs, targets


def refuse_batch(batch: Any, name: str, forms: str) -> NoReturn:
    """Raise TrainingError naming what the batch has."""
    found = f"a mapping with {', '.join(map(repr, batch))}" if isinstance(batch, Mapping) else describe(batch)
    raise TrainingError(
        explain(
            f"{name} reads batches of the form {forms}.",
            found,
            "let the dataset give items of that form, set data.collate, or bring an objective of your own",
        )
    )


def call_model(model: Any, inputs: Any) -> Any:
    """The model on its inputs: a mapping as keyword arguments, anything else as the one argument."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def read_output(output: Any, name: str) -> Tensor:
    """The tensor of predictions: the output itself, its `logits`, or the first of several; at least float32.

    Losses of bf16 and fp16 outputs are computed in float32; float64 stays float64.
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
                f"{name} reads the model's predictions from a floating tensor, or from `logits` of the output.",
                describe(output),
                "let the model return a tensor, or bring an objective of your own",
            )
        )
    return output if output.dtype in (torch.float32, torch.float64) else output.float()
