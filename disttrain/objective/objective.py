"""What a model is trained for: one form for whatever the user gave, a plain callable or a fuller object.

Owns the reading of the user's forms and the checks on what they return. Refuses anything whose sum over ranks and
micro-batches would not be exact: means instead of sums, terms without weights, totals that are not scalars.
Enters: strategy (one call a micro-batch), engine (summaries), parity (`couples_items`).
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from disttrain.errors import ConfigError, TrainingError, explain
from disttrain.objective.returned import read_summary, read_sums, read_total, read_weight, unpack_loss

Number = Tensor | float
SINGLE = "loss"
"""The term's name where there is only one."""


@dataclass
class Loss:
    """What one micro-batch adds to the step, by term: sums of losses, sums of weights, and the objective's own sums.

    Read before its backward: what hooks of a backward fill in comes too late.
    """

    totals: dict[str, Tensor]
    weights: dict[str, Number]
    sums: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """Where in the run a call happens; handed only to what takes a parameter named `context`.

    `micro_batch` is the index in the global batch, `group` the data-parallel process group. `generator` lives on the
    step's device, keyed by (seed, step, micro_batch), and is made at first use: most objectives never draw.
    """

    step: int
    training: bool
    micro_batch: int
    make_generator: Callable[[], torch.Generator]
    group: Any = None

    @cached_property
    def generator(self) -> torch.Generator:
        """The one generator of this call: the same object at each reading."""
        return self.make_generator()


class Objective:
    """The user's objective behind one face. Raises ConfigError for what can be no objective at all."""

    def __init__(self, user: Any) -> None:
        self.user: Any = user
        named = user.func if isinstance(user, functools.partial) else user
        self._name = getattr(named, "__qualname__", type(named).__qualname__)
        self._loss = _loss_method(user)
        if isinstance(user, type) or (self._loss is None and not callable(user)):
            raise ConfigError(
                explain(
                    "An objective is a callable (model, batch), or an object with forward(model, batch) and "
                    "loss(output, batch).",
                    f"the class {self._name}, not yet built" if isinstance(user, type) else f"a {self._name}",
                    "give an instance of it, or a function" if isinstance(user, type) else "give one of the two forms",
                )
            )
        if str(getattr(named, "__module__", None)).startswith("torch.nn."):
            raise ConfigError(
                explain(
                    "An objective is called with (model, batch).",
                    f"torch's own {self._name}, which knows neither",
                    "take cross_entropy, mse or next_token, or a function (model, batch) that calls it with "
                    "reduction='sum' and returns (total, weight)",
                )
            )
        # A module is called, so that its hooks run; what it takes is written at its forward.
        spoken = user.forward if self._loss is not None or isinstance(user, nn.Module) else user
        self._forward: Callable[..., Any] = user if isinstance(user, nn.Module) else spoken
        self._weigh = _method(user, "weigh")
        self._summarize = _method(user, "summarize")
        self._forward_takes_context = _read_signature(spoken, self._name, "model", "batch")
        self._loss_takes_context = _read_signature(self._loss, f"{self._name}.loss", "output", "batch")
        _read_signature(self._weigh, f"{self._name}.weigh", "batch")
        _read_signature(self._summarize, f"{self._name}.summarize", "sums")

    def __repr__(self) -> str:
        return f"Objective({self._name})"

    @property
    def has_weigh(self) -> bool:
        """Whether a batch's weights are known before its forward."""
        return self._weigh is not None

    @property
    def couples_items(self) -> bool:
        """Whether an item's loss depends on the other items of its batch, which no split of the batch can preserve."""
        return bool(getattr(self.user, "couples_items", False))

    @property
    def module(self) -> nn.Module | None:
        """The user's object where it holds parameters or buffers: to be moved, trained and saved with the model."""
        if not isinstance(self.user, nn.Module):
            return None
        holds = any(True for _ in self.user.parameters()) or any(True for _ in self.user.buffers())
        return self.user if holds else None

    def weigh(self, batch: Any) -> dict[str, Number]:
        """The batch's weight for each term, as numbers or 0-d tensors; never a wait for the device. Needs `has_weigh`.

        One unnamed weight is the term `loss`; a mapping names the terms, and then the loss must bring the same.
        """
        return self._weights_of(batch)[0]

    def __call__(self, model: Any, batch: Any, context: Context) -> Loss:
        """Forward and loss of one batch. Local, unless the user's code is not. Raises TrainingError for a wrong return.

        Where there is a `weigh`, its weights are the ones that count.
        """
        extra = {"context": context}
        output = self._forward(model, batch, **(extra if self._forward_takes_context else {}))
        if self._loss is not None:
            output = self._loss(output, batch, **(extra if self._loss_takes_context else {}))
        total, weight, sums = unpack_loss(output, self._name, alone=self.has_weigh)
        known, named = self._weights_of(batch) if self.has_weigh else ({}, False)
        if named or (not isinstance(total, Tensor) and isinstance(total, Mapping)):
            totals = self._read_terms(total, known, named)
            return Loss(totals, known, read_sums(sums, self._name))
        weights = known or {SINGLE: read_weight(weight, self._name, "weight")}
        return Loss({SINGLE: read_total(total, self._name, "total")}, weights, read_sums(sums, self._name))

    def summarize(
        self, sums: Mapping[str, Tensor], totals: Mapping[str, Number], weights: Mapping[str, Number]
    ) -> dict[str, float]:
        """What people read of added-up sums: `loss`, `loss/TERM` where there are several, and the user's own figures.

        The user's `summarize` gets its sums and `total/TERM`, `weight/TERM` as float64 0-d tensors. Without one, each
        scalar sum is reported over the weight where there is one term, as it stands where there are several.
        A loss of weight zero is nan. Local.
        """
        parts = {t: float(totals[t]) / float(w) if float(w) else math.nan for t, w in weights.items()}
        counted = [part for part, weight in zip(parts.values(), weights.values(), strict=True) if float(weight)]
        found = {SINGLE: sum(counted) if counted else math.nan}
        if len(parts) > 1:
            found.update({f"{SINGLE}/{term}": part for term, part in parts.items()})
        if self._summarize is None:
            over = float(next(iter(weights.values()))) if len(weights) == 1 else 1.0
            own = {
                n: float(v) / over if over else math.nan for n, v in sums.items() if v.numel() == 1 and n not in found
            }
        else:
            given = {**sums, **_scalars("total", totals), **_scalars("weight", weights)}
            own = read_summary(self._summarize(given), self._name, taken=found)
        return {**found, **own}

    def _weights_of(self, batch: Any) -> tuple[dict[str, Number], bool]:
        assert self._weigh is not None, "ask has_weigh first"
        weight = self._weigh(batch)
        if isinstance(weight, Mapping) and weight:
            return {str(t): read_weight(w, self._name, f"weigh(batch)[{t!r}]") for t, w in weight.items()}, True
        return {SINGLE: read_weight(weight, self._name, "weigh(batch)")}, False

    def _read_terms(self, total: Any, known: Mapping[str, Number], named: bool) -> dict[str, Tensor]:
        terms = set(total) if isinstance(total, Mapping) else set()
        if not named or terms != set(known):
            weighed = f"weigh(batch) names {sorted(known)}" if named else "a weight without terms"
            raise TrainingError(
                explain(
                    f"Objective {self._name}: a loss of several terms needs weigh(batch) -> {{term: weight}} with the "
                    "same terms, so that each is divided by its own sum.",
                    f"{f'totals {sorted(terms)}' if terms else 'one unnamed total'} and "
                    f"{weighed if self.has_weigh else 'no weigh'}",
                    "return the same names from both, or one summed total and one weight",
                )
            )
        # In the order of weigh(batch), whatever the loss names first.
        return {term: read_total(total[term], self._name, f"total[{term!r}]") for term in known}


def _method(user: Any, name: str) -> Callable[..., Any] | None:
    """A method the user wrote. On a module a submodule or buffer of that name is not one."""
    found = getattr(type(user) if isinstance(user, nn.Module) else user, name, None)
    return getattr(user, name) if callable(found) else None


def _loss_method(user: Any) -> Callable[..., Any] | None:
    """`loss` makes the fuller form, but `self.loss = nn.MSELoss()` inside a callable module does not."""
    return _method(user, "loss") if _method(user, "forward") is not None else None


def _read_signature(function: Callable[..., Any] | None, name: str, *takes: str) -> bool:
    """Whether `function` takes `context`. Raises ConfigError where it could not be called with what it is to take."""
    try:
        signature = inspect.signature(function) if function is not None else None
    except (TypeError, ValueError):  # a callable written in C shows no signature, and so names no `context`
        signature = None
    if signature is None:
        return False
    takes_context = "context" in signature.parameters
    try:
        signature.bind(*takes, **({"context": None} if takes_context else {}))
    except TypeError as error:
        asked = f"Objective {name} is called with ({', '.join(takes)}), and with context= where it names that."
        raise ConfigError(explain(asked, f"{name}{signature}: {error}", "let it take exactly these")) from None
    return takes_context


def _scalars(kind: str, numbers: Mapping[str, Number]) -> dict[str, Tensor]:
    return {f"{kind}/{term}": torch.tensor(float(value), dtype=torch.float64) for term, value in numbers.items()}
