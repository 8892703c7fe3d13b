"""Reads from an autograd graph which parameters its backward will reach, and checks that all ranks reach the same.

DeepSpeed reduces gradients bucket by bucket. Ranks that reach other parameters hang, abort in C++, or add one
parameter's gradient to another's. Ranks that reach the same ones in another order are handled by gradient_order.py.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from torch import Tensor

from disttrain.optim.named import NamedParameter
from disttrain.strategy.call_order import check_same_calls


def agree_on_reached(total: Tensor, named: Sequence[NamedParameter]) -> set[int]:
    """Returns what `reached` does, after a check that all ranks reach the same parameters.

    Collective, one small all-reduce. Raises TrainingError on every rank where they differ.
    """
    found = reached(total)
    names = [one.name for one in named if id(one.parameter) in found]
    check_same_calls(zlib.crc32(repr(names).encode()), names)
    return found


def reached(total: Tensor) -> set[int]:
    """The `id` of every leaf tensor that a backward from `total` accumulates into. Local; visits each node once."""
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
