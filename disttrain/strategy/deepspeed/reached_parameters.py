"""Which parameters a backward will reach, read from its graph before it runs, and whether that is so on all ranks.

DeepSpeed reduces gradients bucket by bucket: ranks that reach other parameters hang, abort in C++, or add up one
parameter's gradient with another's. Those that reach the same ones in another order are zero_order.py's.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from torch import Tensor

from disttrain.optim.named import NamedParameter
from disttrain.strategy.call_agreement import agree_on_way


def agree_on_reached(total: Tensor, named: Sequence[NamedParameter]) -> set[int]:
    """What `reached` says, the same parameters on all ranks. Collective, one small all-reduce.

    Raises TrainingError on every rank where they reach others.
    """
    found = reached(total)
    names = [one.name for one in named if id(one.parameter) in found]
    agree_on_way(zlib.crc32(repr(names).encode()), names)
    return found


def reached(total: Tensor) -> set[int]:
    """The `id` of every leaf that a backward from `total` accumulates into. Local; a walk over the graph's nodes."""
    leaves: set[int] = set()
    stack = [total.grad_fn]
    visited = set(stack)
    while stack:
        node = stack.pop()
        if node is None:
            continue
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves.add(id(variable))
        for following, _ in node.next_functions:
            if following not in visited:
                visited.add(following)
                stack.append(following)
    return leaves
