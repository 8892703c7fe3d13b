"""The order in which ranks call the modules that stage 3 gathers on the way, agreed on before each gather.

Ranks that call other modules would pair the gather of one with that of another, and wait for ever. To ask costs a small
all-reduce a module, so only a process's first forwards do: a model that calls modules by its data mostly shows there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from disttrain.strategy.trail import Trail, agree_on_way

_END = "the end of the forward"


class CallOrder:
    """Watches the modules below `root` that have parameters of their own. Made after DeepSpeed has put its hooks."""

    def __init__(self, root: nn.Module, forwards: int = 16) -> None:
        self._left = forwards
        self._trail: Trail | None = None
        self._hooks = [
            one.register_forward_pre_hook(lambda module, args, name=name: self._note(name), prepend=True)
            for name, one in root.named_modules()
            if next(one.parameters(recurse=False), None) is not None
        ]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around a forward. Collective the first times; then TrainingError on every rank where ranks differ."""
        if self._left == 0:
            yield
            return
        self._left -= 1
        self._trail = Trail()
        try:
            yield
            self._note(_END)
        finally:
            self._trail = None
            if self._left == 0:
                for hook in self._hooks:
                    hook.remove()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _note(self, name: str) -> None:
        if self._trail is not None:
            self._trail.note(name)
            agree_on_way(self._trail.digest, sorted(self._trail.seen))
