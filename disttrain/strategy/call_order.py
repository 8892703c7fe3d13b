"""Checks that all ranks call the parts of a model in the same order.

Collectives are paired by the order in which ranks start them. Where ranks call different parts (experts that only some
ranks call), the collective of one part is paired with that of another. The ranks then hang, or abort in C++, or compute
with a mixture of both parts without an error. So ranks compare a digest of their calls before a step changes anything.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from disttrain.errors import TrainingError, explain

_END = "the end of the forward"


class CallSequence:
    """The names of the parts that this rank has called since `restart`, and a 32-bit digest of their order. Local."""

    def __init__(self) -> None:
        self.digest = 0
        self.names: set[str] = set()

    def restart(self) -> None:
        """Forget all calls."""
        self.digest = 0
        self.names.clear()

    def append(self, name: str) -> None:
        """Add a call of the part `name`."""
        self.digest = zlib.crc32(name.encode(), self.digest)
        self.names.add(name)


class CallOrderCheck:
    """Checks the order of calls before each gather of modules that are gathered when they are called.

    The check costs a small all-reduce per module. It ends after a forward that called every module, or after the number
    of forwards given: a model that chooses among its modules is checked for that long.

    Args:
        named: the modules by name. Their hooks that gather exist already, since this check must run before them.
        forwards: the largest number of forwards to check.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Module]], forwards: int = 1000) -> None:
        self._left = forwards
        self._calls: CallSequence | None = None
        self._hooks = {
            name: module.register_forward_pre_hook(lambda module, args, name=name: self._append(name), prepend=True)
            for name, module in named
        }

    @contextmanager
    def checked(self) -> Iterator[None]:
        """Surround a forward. Collective while the check lasts.

        Raises TrainingError on every rank where the order of calls differs between ranks.
        """
        if not self._hooks:
            yield
            return
        self._calls = calls = CallSequence()
        try:
            yield
            self._append(_END)
        finally:
            self._calls = None
        self._left -= 1
        if self._left == 0 or self._hooks.keys() <= calls.names:
            for hook in self._hooks.values():
                hook.remove()
            self._hooks.clear()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _append(self, name: str) -> None:
        if self._calls is not None:
            self._calls.append(name)
            check_same_calls(self._calls.digest, sorted(self._calls.names))


def check_same_calls(digest: int, names: Sequence[str]) -> None:
    """Compare digests of all ranks' calls. Collective: one small all-reduce.

    Raises TrainingError on every rank where they differ. `names` are the parts that this rank called, for the message.
    """
    ends = torch.tensor([digest, -digest])  # on the host, so that nothing waits for the device
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    if ends[0] == -ends[1]:
        return
    everyone: list[tuple[int, Sequence[str]]] = [(0, [])] * dist.get_world_size()
    dist.all_gather_object(everyone, (digest, names))
    rank = next(rank for rank, (other, _) in enumerate(everyone) if other != everyone[0][0])
    raise TrainingError(explain_other_calls(everyone[0][1], rank, everyone[rank][1]))


def explain_other_calls(first: Sequence[str], rank: int, other: Sequence[str]) -> str:
    """Return the message for rank 0 and another rank whose calls differ. Pure."""
    only = [", ".join(sorted(set(a) - set(b))[:5]) for a, b in ((first, other), (other, first))]
    problem = f"only rank 0 calls {only[0] or 'nothing'}, only rank {rank} calls {only[1] or 'nothing'}"
    if not any(only):
        problem = f"rank 0 and rank {rank} call the same parts in another order or another number of times"
    return explain(
        "Cannot train: ranks call different parts of the model in one step, and collectives are paired by call order.",
        problem,
        "use strategy ddp, or fsdp with strategy.fsdp.blocks: larger blocks that every rank calls, or [] for no blocks",
    )
