"""One order in which all ranks bring gradients to ZeRO's buckets, whatever the order in which they come.

DeepSpeed (0.19) fills a bucket as a backward goes and adds it up by place. Ranks whose backwards reach the same
parameters in another order (a packed LSTM of other lengths, experts called by load) would add up one parameter's
gradient with another's, without a word. Imports no deepspeed: it stands between its hooks and its buckets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from torch import nn


class BucketOrder:
    """Of one of DeepSpeed's optimizers: the last parameter first, which is about how a backward goes. Local.

    A gradient that comes before its turn stays with its parameter until those before it are there.
    """

    def __init__(self, zero: Any, parameters: Sequence[nn.Parameter]) -> None:
        self._turns = {id(parameter): turn for turn, parameter in enumerate(reversed(parameters))}
        self._due: deque[int] = deque()
        self._awaited: set[int] = set()
        self._early: dict[int, tuple[Any, ...]] = {}
        self._bring = zero.reduce_ready_partitions_and_remove_grads
        self._end = zero.independent_gradient_partition_epilogue
        zero.reduce_ready_partitions_and_remove_grads = self._came
        zero.independent_gradient_partition_epilogue = self._ended

    def expect(self, reached: set[int]) -> None:
        """Before a backward: the `id`s of what it reaches, the same parameters on all ranks."""
        self._awaited = reached & self._turns.keys()
        self._due = deque(sorted(self._awaited, key=self._turns.__getitem__))
        self._early.clear()

    def _came(self, parameter: nn.Parameter, *group: Any) -> None:
        if id(parameter) not in self._awaited:  # in a graph within the graph, or a second time
            self._bring(parameter, *group)
            return
        self._early[id(parameter)] = (parameter, *group)
        while self._due and self._due[0] in self._early:
            self._awaited.remove(self._due[0])
            self._bring(*self._early.pop(self._due.popleft()))

    def _ended(self) -> None:
        """The backward is through: what was waited for and did not come has no gradient."""
        for came in [one for one in self._due if one in self._early]:
            self._bring(*self._early.pop(came))
        self._due.clear()
        self._awaited.clear()
        self._end()
