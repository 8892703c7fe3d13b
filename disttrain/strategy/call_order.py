"""The order in which ranks call the modules that are gathered when they are called, agreed on before each gather.

Ranks that call other modules would pair the gather of one with that of another: wait for ever, abort in C++, or get a
mixture. To ask costs a small all-reduce a module: models that call every module in a process's first forward are asked
no further, and others, which choose among theirs, for so many more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from disttrain.strategy.call_agreement import Trail, agree_on_way

_END = "the end of the forward"


class CallOrder:
    """Watches modules by their names. Made after the hooks that gather are there."""

    def __init__(self, named: Iterable[tuple[str, nn.Module]], forwards: int = 1000) -> None:
        self._left = forwards
        self._trail: Trail | None = None
        self._hooks = {
            name: module.register_forward_pre_hook(lambda module, args, name=name: self._note(name), prepend=True)
            for name, module in named
        }

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around a forward. Collective the first times; then TrainingError on every rank where ranks differ."""
        if not self._hooks:
            yield
            return
        self._trail = trail = Trail()
        try:
            yield
            self._note(_END)
        finally:
            self._trail = None
        self._left -= 1
        if self._left == 0 or self._hooks.keys() <= trail.seen:
            for hook in self._hooks.values():
                hook.remove()
            self._hooks.clear()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _note(self, name: str) -> None:
        if self._trail is not None:
            self._trail.note(name)
            agree_on_way(self._trail.digest, sorted(self._trail.seen))
