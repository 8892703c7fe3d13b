"""Passes gradients to ZeRO's buckets in one order on all ranks, whatever the order in which a backward computes them.

DeepSpeed (0.19) fills a bucket in the order of a backward, and reduces it by position. Ranks may compute the
same gradients in another order (a packed LSTM of other lengths, experts called by load). DeepSpeed then adds one
parameter's gradient to another's and reports nothing. Imports no deepspeed. It works between DeepSpeed's hooks and its
buckets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from torch import nn

from disttrain.strategy.deepspeed.deepspeed_internals import intercept_gradients


class BucketOrder:
    """Holds the gradients of one optimizer of DeepSpeed's back until it is their turn. Local.

    The order is the reverse of the parameters', close to that of most backwards. A gradient that comes early stays with
    its parameter until all earlier ones have come.
    """

    def __init__(self, zero: Any, parameters: Sequence[nn.Parameter]) -> None:
        self._turns = {id(parameter): turn for turn, parameter in enumerate(reversed(parameters))}
        self._due: deque[int] = deque()
        self._awaited: set[int] = set()
        self._early: dict[int, tuple[Any, ...]] = {}
        self._add_to_bucket, self._reduce_last = intercept_gradients(zero, self._on_gradient, self._on_end)

    def expect(self, reached: set[int]) -> None:
        """Before a backward: the `id`s of the parameters that it reaches, which are the same on all ranks."""
        self._awaited = reached & self._turns.keys()
        self._due = deque(sorted(self._awaited, key=self._turns.__getitem__))
        self._early.clear()

    def _on_gradient(self, parameter: nn.Parameter, *group: Any) -> None:
        if id(parameter) not in self._awaited:  # in a graph within the graph, or a second time
            self._add_to_bucket(parameter, *group)
            return
        self._early[id(parameter)] = (parameter, *group)
        while self._due and self._due[0] in self._early:
            self._awaited.remove(self._due[0])
            self._add_to_bucket(*self._early.pop(self._due.popleft()))

    def _on_end(self) -> None:
        """The backward is complete: a parameter that was expected and did not come has no gradient."""
        for came in [key for key in self._due if key in self._early]:
            self._add_to_bucket(*self._early.pop(came))
        self._due.clear()
        self._awaited.clear()
        self._reduce_last()
