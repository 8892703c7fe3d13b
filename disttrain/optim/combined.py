"""Several optimizers as one: each of the parameters whose names it matches, all of them stepped in one act.

Owns who gets which parameter. Refuses a parameter that nothing matches, a pattern that matches nothing and an
optimizer that is left without parameters.
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
    """Optimizers of different parameters behind torch's one face.

    Its groups are the parts' own mappings, so that a schedule, or a strategy that puts other tensors into them, reaches
    the parts; its state is one mapping that all parts share.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = tuple(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})
        for part in parts:
            self.state.update(part.state)  # what some make room for at once, as Adagrad does
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self.parts:
            part.state, part.param_groups = self.state, [next(groups) for _ in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Every part's step, in their order. Local, or as collective as the parts are."""
        if closure is not None:
            raise TypeError("several optimizers are stepped without a closure")
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's own: state and groups are replaced, for the parts too. Local."""
        super().load_state_dict(state_dict)
        self._share()


@dataclass(frozen=True)
class Part:
    """One of several: its factory, the patterns of names that it takes, and the config's key for it."""

    make: MakeOptimizer
    match: tuple[str, ...]
    key: str


@dataclass(frozen=True)
class SeveralFactory:
    """Makes one optimizer of several; a parameter goes to the first part that matches its name."""

    parts: tuple[Part, ...]

    def __call__(self, named: Sequence[NamedParameter]) -> Several:
        """Local; raises ConfigError where parameters and patterns do not cover each other."""
        taken = self.share_out(named)
        return Several([part.make(own) for part, own in zip(self.parts, taken, strict=True)])

    def share_out(self, named: Sequence[NamedParameter]) -> list[list[NamedParameter]]:
        """The parameters of each part, in their order. Pure; raises ConfigError as the call does."""
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
                    "Each trainable parameter is that of one of the optimizers under optim.",
                    f"{_listed(unmatched)}, which no match names",
                    "name them, or end the list with an optimizer of match: '*'",
                )
            )
        for part, own in zip(self.parts, taken, strict=True):
            for pattern in part.match:
                if not any(_matches(one, [pattern]) for one in named):
                    found = f"{pattern!r}, which none of {len(named)} matches"
                    do = f"name some of them: {_listed([one.name for one in named])}"
                    raise ConfigError(explain(f"{part.key}.match names trainable parameters.", found, do))
            if not own:
                found = f"{', '.join(part.match)}: optimizers before it take all that these match"
                do = "put it before them, or take it out"
                raise ConfigError(explain(f"{part.key} steps the parameters that it matches.", found, do))
        return taken


def factories_of(make: MakeOptimizer) -> tuple[MakeOptimizer, ...]:
    """The factories that each make one optimizer: those of several, or `make` itself. Pure."""
    return tuple(part.make for part in make.parts) if isinstance(make, SeveralFactory) else (make,)


def _matches(one: NamedParameter, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(one.name, pattern) for pattern in patterns)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if names[20:] else "")
