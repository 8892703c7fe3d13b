"""Wraps a user's objective, a plain callable or an object with methods, in one interface.

The wrapper reads the form of the objective and checks its return values. It rejects everything whose sum over ranks and
micro-batches would not be exact: means instead of sums, terms without weights, and totals that are not scalars.
Strategies call it once per micro-batch, and the engine calls it for summaries.
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
from disttrain.objective.return_values import read_summary, read_sums, read_total, read_weight, unpack_loss

Number = Tensor | float
SINGLE = "loss"
"""The name of the term of an objective with only one."""


@dataclass
class Loss:
    """A micro-batch's contribution to the step: by term, the sums of losses and of weights, and the objective's `sums`.

    All values are read before the backward of the micro-batch. Values that backward hooks fill in come too late.
    """

    totals: dict[str, Tensor]
    weights: dict[str, Number]
    sums: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """Describes where in the run a call happens. Only functions with a parameter named `context` receive it.

    `micro_batch` is the index in the global batch, and `group` is the data-parallel process group. `generator` is on
    the step's device and keyed by (seed, step, micro_batch). It is made at first use, because most objectives never
    draw random numbers.
    """

    step: int
    training: bool
    micro_batch: int
    make_generator: Callable[[], torch.Generator]
    group: Any = None

    @cached_property
    def generator(self) -> torch.Generator:
        """The random generator of this call, the same object at each access."""
        return self.make_generator()


class Objective:
    """Wraps the user's objective. Raises ConfigError for an object that cannot be an objective."""

    def __init__(self, user: Any) -> None:
        self.user: Any = user
        named = user.func if isinstance(user, functools.partial) else user
        self._name = getattr(named, "__qualname__", type(named).__qualname__)
        self._loss = _loss_method(user)
        if isinstance(user, type) or (self._loss is None and not callable(user)):
            raise ConfigError(
                explain(
                    "An objective must be a callable (model, batch), or an object with forward(model, batch) and "
                    "loss(output, batch).",
                    f"the class {self._name}, not an instance of it" if isinstance(user, type) else f"a {self._name}",
                    "pass an instance or a function" if isinstance(user, type) else "pass one of the two forms",
                )
            )
        if str(getattr(named, "__module__", None)).startswith("torch.nn."):
            raise ConfigError(
                explain(
                    "An objective must accept (model, batch).",
                    f"torch's {self._name} accepts neither a model nor a batch",
                    "use cross_entropy, mse or next_token, or write a function (model, batch) that calls it with "
                    "reduction='sum' and returns (total, weight)",
                )
            )
        # A module is called instead of its forward, so that its hooks run. Its forward has the signature.
        signed = user.forward if self._loss is not None or isinstance(user, nn.Module) else user
        self._forward: Callable[..., Any] = user if isinstance(user, nn.Module) else signed
        self._weigh = _method(user, "weigh")
        self._summarize = _method(user, "summarize")
        self._forward_takes_context = _read_signature(signed, self._name, "model", "batch")
        self._loss_takes_context = _read_signature(self._loss, f"{self._name}.loss", "output", "batch")
        _read_signature(self._weigh, f"{self._name}.weigh", "batch")
        _read_signature(self._summarize, f"{self._name}.summarize", "sums")

    def __repr__(self) -> str:
        return f"Objective({self._name})"

    @property
    def has_weigh(self) -> bool:
        """Whether the weights of a batch are known before its forward."""
        return self._weigh is not None

    @property
    def couples_items(self) -> bool:
        """Whether the loss of an item depends on the other items of its batch. No split of a batch preserves that."""
        return bool(getattr(self.user, "couples_items", False))

    @property
    def module(self) -> nn.Module | None:
        """The user's object if it has parameters or buffers, which are moved, trained and saved with the model."""
        if not isinstance(self.user, nn.Module):
            return None
        holds = any(True for _ in self.user.parameters()) or any(True for _ in self.user.buffers())
        return self.user if holds else None

    def weigh(self, batch: Any) -> dict[str, Number]:
        """Return the weight of the batch for each term, as numbers or 0-d tensors. Requires `has_weigh`. Local.

        It never waits for the device. A single unnamed weight belongs to the term `loss`. A mapping names the terms,
        and the loss must then have the same terms.
        """
        return self._weights_of(batch)[0]

    def __call__(self, model: Any, batch: Any, context: Context) -> Loss:
        """Compute the forward and the loss of one batch. Local, unless the user's code is collective.

        The weights of `weigh` are used if the objective has it. Raises TrainingError for an invalid return value.
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
        """Return the reported values: `loss`, `loss/TERM` if there are several terms, and the user's values. Local.

        The user's `summarize` receives its sums, and `total/TERM` and `weight/TERM` as float64 0-d tensors. Without
        `summarize`, each scalar sum is divided by the weight if there is only one term, and reported unchanged if there
        are several. A loss of weight zero is nan.
        """
        parts = {t: float(totals[t]) / float(w) if float(w) else math.nan for t, w in weights.items()}
        counted = [part for part, weight in zip(parts.values(), weights.values(), strict=True) if float(weight)]
        losses = {SINGLE: sum(counted) if counted else math.nan}
        if len(parts) > 1:
            losses.update({f"{SINGLE}/{term}": part for term, part in parts.items()})
        if self._summarize is None:
            over = float(next(iter(weights.values()))) if len(weights) == 1 else 1.0
            values = {
                n: float(v) / over if over else math.nan for n, v in sums.items() if v.numel() == 1 and n not in losses
            }
        else:
            given = {**sums, **_scalars("total", totals), **_scalars("weight", weights)}
            values = read_summary(self._summarize(given), self._name, taken=losses)
        return {**losses, **values}

    def _weights_of(self, batch: Any) -> tuple[dict[str, Number], bool]:
        assert self._weigh is not None, "ask has_weigh first"
        weight = self._weigh(batch)
        if isinstance(weight, Mapping) and weight:
            return {str(t): read_weight(w, self._name, f"weigh(batch)[{t!r}]") for t, w in weight.items()}, True
        return {SINGLE: read_weight(weight, self._name, "weigh(batch)")}, False

    def _read_terms(self, total: Any, known: Mapping[str, Number], named: bool) -> dict[str, Tensor]:
        terms = set(total) if isinstance(total, Mapping) else set()
        if not named or terms != set(known):
            weighed = f"weigh(batch) names {sorted(known)}" if named else "weigh(batch) names no terms"
            raise TrainingError(
                explain(
                    f"Objective {self._name}: a loss of several terms needs weigh(batch) -> {{term: weight}} with the "
                    "same terms, so that each term is divided by its own weight.",
                    f"the loss returned {f'the totals {sorted(terms)}' if terms else 'one unnamed total'}, and "
                    f"{weighed if self.has_weigh else 'there is no weigh'}",
                    "return the same names from both, or return one summed total and one weight",
                )
            )
        # Use the order of weigh(batch), which does not depend on the order of the loss's mapping.
        return {term: read_total(total[term], self._name, f"total[{term!r}]") for term in known}


def _method(user: Any, name: str) -> Callable[..., Any] | None:
    """Return the user's method `name`, or None. A submodule or buffer of a module with this name does not count."""
    method = getattr(type(user) if isinstance(user, nn.Module) else user, name, None)
    return getattr(user, name) if callable(method) else None


def _loss_method(user: Any) -> Callable[..., Any] | None:
    """Return the method `loss` of an object with `forward`. `self.loss = nn.MSELoss()` in a module does not count."""
    return _method(user, "loss") if _method(user, "forward") is not None else None


def _read_signature(function: Callable[..., Any] | None, name: str, *arguments: str) -> bool:
    """Return whether `function` has a parameter `context`. Raises ConfigError if it does not accept `arguments`."""
    try:
        signature = inspect.signature(function) if function is not None else None
    except (TypeError, ValueError):  # a callable written in C has no signature, and no parameter `context`
        signature = None
    if signature is None:
        return False
    takes_context = "context" in signature.parameters
    try:
        signature.bind(*arguments, **({"context": None} if takes_context else {}))
    except TypeError as error:
        failed = f"Objective {name} must accept ({', '.join(arguments)}), and may accept context=."
        raise ConfigError(explain(failed, f"{name}{signature}: {error}", "change its parameters to these")) from None
    return takes_context


def _scalars(kind: str, numbers: Mapping[str, Number]) -> dict[str, Tensor]:
    return {f"{kind}/{term}": torch.tensor(float(value), dtype=torch.float64) for term, value in numbers.items()}
