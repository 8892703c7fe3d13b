"""Combines several optimizers into one. Each steps the parameters whose names it matches.

This module distributes the parameters. It rejects a parameter that no pattern matches, a pattern that matches no
parameter, and an optimizer without parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch.optim import Optimizer

from disttrain.errors import ConfigError, explain
from disttrain.optim.named import MakeOptimizer, NamedParameter


class Several(Optimizer):
    """Optimizers of different parameters as one torch optimizer.

    Its groups are the same objects as the parts' groups. A schedule, or a strategy that replaces their tensors,
    therefore changes the parts. All parts share one state mapping.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = tuple(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})
        for part in parts:
            self.state.update(part.state)  # state that some optimizers make when they are built, as Adagrad does
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self.parts:
            part.state, part.param_groups = self.state, [next(groups) for _ in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step every part, in order. Local, unless a part's step is collective. Raises TypeError for a closure."""
        if closure is not None:
            raise TypeError("Several.step takes no closure")
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Replace state and groups, for the parts too, as in torch's optimizers. Local."""
        super().load_state_dict(state_dict)
        self._share()


@dataclass(frozen=True)
class Part:
    """An optimizer among several: its factory, the patterns of its parameters' names, and its key in the config."""

    make: MakeOptimizer
    match: tuple[str, ...]
    key: str


@dataclass(frozen=True)
class SeveralFactory:
    """Builds several optimizers as one. A parameter belongs to the first part that matches its name."""

    parts: tuple[Part, ...]

    def __call__(self, named: Sequence[NamedParameter]) -> Several:
        """Build the optimizer. Local; raises ConfigError for an unmatched parameter or an unused pattern."""
        taken = self.share_out(named)
        return Several([part.make(own) for part, own in zip(self.parts, taken, strict=True)])

    def share_out(self, named: Sequence[NamedParameter]) -> list[list[NamedParameter]]:
        """The parameters of each part, in order. Pure; raises the ConfigErrors of the call."""
        taken: list[list[NamedParameter]] = [[] for _ in self.parts]
        unmatched = []
        for one in named:
            places = [at for at, part in enumerate(self.parts) if _matches(one, part.match)]
            if places:
                taken[places[0]].append(one)
            else:
                unmatched.append(one.name)
        if unmatched:
            raise ConfigError(
                explain(
                    "Cannot assign every trainable parameter to an optimizer under optim.",
                    f"no match names {_listed(unmatched)}",
                    "name them, or end the list with an optimizer with match: '*'",
                )
            )
        for part, own in zip(self.parts, taken, strict=True):
            for pattern in part.match:
                if not any(_matches(one, [pattern]) for one in named):
                    problem = f"{pattern!r} matches none of {len(named)} trainable parameters"
                    fix = f"name some of them: {_listed([one.name for one in named])}"
                    raise ConfigError(explain(f"Cannot use {part.key}.match.", problem, fix))
            if not own:
                problem = f"earlier optimizers take all parameters that {', '.join(part.match)} matches"
                fix = "move it before them, or remove it"
                raise ConfigError(explain(f"Cannot build {part.key}: it has no parameters.", problem, fix))
        return taken


def factories_of(make: MakeOptimizer) -> tuple[MakeOptimizer, ...]:
    """The factories that each build one optimizer: the parts of a SeveralFactory, or `make` itself. Pure."""
    return tuple(part.make for part in make.parts) if isinstance(make, SeveralFactory) else (make,)


def _matches(one: NamedParameter, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(one.name, pattern) for pattern in patterns)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if names[20:] else "")
