"""`next_token`: cross entropy of each next token. Enters: configs (`objective.target: next_token`).

Per-token losses are added up, never averaged, so ragged items and padding weigh what they should.
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
    """Weight: the targets that are not `ignore_index`. Logits are [b, t, v].

    Reads `(inputs, targets)`, or the keys `inputs` and `targets`: token ids [b, t], targets already shifted by one.
    Or, as Hugging Face has it, `input_ids` and `labels`: labels are the tokens themselves and are shifted here; then
    `attention_mask`, `position_ids` and `token_type_ids` go to the model too, by name.
    Summarizes `perplexity`, `bits_per_byte` (for tokens of `bytes_per_token` bytes on average; None leaves it out) and,
    where it is not training, `accuracy`: the share of tokens that were the likeliest.
    """

    def __init__(self, *, ignore_index: int = -100, bytes_per_token: float | None = 1.0) -> None:
        if bytes_per_token is not None and not (isinstance(bytes_per_token, int | float) and bytes_per_token > 0):
            raise ConfigError(
                explain(
                    "next_token's bytes_per_token is what a token stands for on average.",
                    repr(bytes_per_token),
                    "give a positive number, or null to leave bits_per_byte out",
                )
            )
        self.ignore_index = ignore_index
        self.bytes_per_token = bytes_per_token

    def weigh(self, batch: Any) -> Tensor:
        """The number of targets that count, a 0-d tensor on the batch's device."""
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
                    "let the model return logits [batch, time, vocab] for targets [batch, time] of type int64",
                )
            )
        logits, targets = logits.flatten(0, -2), targets.flatten().long()
        total = F.cross_entropy(logits, targets, ignore_index=self.ignore_index, reduction="sum")
        # Another pass over all logits: paid where it is read, in evaluation.
        sums = {} if context.training else {"correct": ((logits.argmax(-1) == targets) & self._counts(targets)).sum()}
        return total, self._count(targets), sums

    def summarize(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        weight = float(sums["weight/loss"])
        if not weight:
            return {}
        nats = float(sums["total/loss"]) / weight
        found = {"perplexity": math.inf if nats > 700.0 else math.exp(nats)}
        if self.bytes_per_token is not None:
            found["bits_per_byte"] = nats / math.log(2.0) / self.bytes_per_token
        if "correct" in sums:
            found["accuracy"] = float(sums["correct"]) / weight
        return found

    def _targets(self, batch: Any) -> Tensor:
        targets: Tensor = batch["labels"][:, 1:] if _shifts(batch) else read_pair(batch, "next_token", _FORMS)[1]
        return targets

    def _counts(self, targets: Tensor) -> Tensor:
        return targets != self.ignore_index

    def _count(self, targets: Tensor) -> Tensor:
        return self._counts(targets).sum()


def _shifts(batch: Any) -> bool:
    return isinstance(batch, Mapping) and "input_ids" in batch and "labels" in batch
