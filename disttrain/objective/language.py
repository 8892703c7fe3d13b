"""Implements `next_token` (`objective.target: next_token`), the cross entropy of each next token.

The losses of tokens are summed, not averaged, so that items of different length and padding get the correct weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor

from disttrain.errors import ConfigError, TrainingError, explain
from disttrain.objective.batch import PAIR, call_model, read_output, read_pair
from disttrain.objective.objective import Context

_FORMS = f"{PAIR} or with 'input_ids' and 'labels'"
_MODEL_READS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


class NextToken:
    """Cross entropy of logits [b, t, v]. The weight is the number of targets that are not `ignore_index`.

    A batch has one of two forms:

    - `(inputs, targets)`, or the keys `inputs` and `targets`: token ids [b, t] with targets already shifted by one.
    - The keys `input_ids` and `labels`, as in Hugging Face: the labels are the tokens, and the objective shifts them.
      The model also receives `attention_mask`, `position_ids` and `token_type_ids`, by name.

    The summary has `perplexity`, `bits_per_byte`, and in evaluation `accuracy`, the share of targets that were the most
    likely token.

    Args:
        ignore_index: targets with this value do not count.
        bytes_per_token: the average number of bytes per token. None leaves `bits_per_byte` out.
    """

    def __init__(self, *, ignore_index: int = -100, bytes_per_token: float | None = 1.0) -> None:
        if bytes_per_token is not None and not (isinstance(bytes_per_token, int | float) and bytes_per_token > 0):
            raise ConfigError(
                explain(
                    "The bytes_per_token of next_token is invalid.",
                    repr(bytes_per_token),
                    "set a positive number of bytes, or null to leave bits_per_byte out",
                )
            )
        self.ignore_index = ignore_index
        self.bytes_per_token = bytes_per_token

    def weigh(self, batch: Any) -> Tensor:
        """Return the number of targets that count, as a 0-d tensor on the batch's device."""
        return self._count(self._targets(batch))

    def forward(self, model: Any, batch: Any) -> Any:
        if isinstance(batch, Mapping) and "input_ids" in batch:
            return call_model(model, {name: batch[name] for name in _MODEL_READS if name in batch})
        return call_model(model, read_pair(batch, "next_token", _FORMS)[0])

    def loss(self, output: Any, batch: Any, context: Context) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        targets = self._targets(batch)
        logits = read_output(output, "next_token")
        if _shifts(batch):
            logits = logits[:, :-1]
        if logits.shape[:-1] != targets.shape or targets.is_floating_point():
            raise TrainingError(
                explain(
                    "next_token needs one row of logits for each target.",
                    f"logits {tuple(logits.shape)} for targets {tuple(targets.shape)} of {targets.dtype}",
                    "return logits [batch, time, vocab] from the model, for targets [batch, time] of type int64",
                )
            )
        logits, targets = logits.flatten(0, -2), targets.flatten().long()
        total = F.cross_entropy(logits, targets, ignore_index=self.ignore_index, reduction="sum")
        # The accuracy costs another pass over all logits, so it is computed only in evaluation.
        sums = {} if context.training else {"correct": ((logits.argmax(-1) == targets) & self._counts(targets)).sum()}
        return total, self._count(targets), sums

    def summarize(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        weight = float(sums["weight/loss"])
        if not weight:
            return {}
        nats = float(sums["total/loss"]) / weight
        summary = {"perplexity": math.inf if nats > 700.0 else math.exp(nats)}
        if self.bytes_per_token is not None:
            summary["bits_per_byte"] = nats / math.log(2.0) / self.bytes_per_token
        if "correct" in sums:
            summary["accuracy"] = float(sums["correct"]) / weight
        return summary

    def _targets(self, batch: Any) -> Tensor:
        targets: Tensor = batch["labels"][:, 1:] if _shifts(batch) else read_pair(batch, "next_token", _FORMS)[1]
        return targets

    def _counts(self, targets: Tensor) -> Tensor:
        return targets != self.ignore_index

    def _count(self, targets: Tensor) -> Tensor:
        return self._counts(targets).sum()


def _shifts(batch: Any) -> bool:
    return isinstance(batch, Mapping) and "input_ids" in batch and "labels" in batch
