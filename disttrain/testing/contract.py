"""`StrategyContract`: the suite as a class of tests. An author derives from it, names the strategy, and runs pytest.

One world a size runs all cases; then there is one test for each size, model and precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from disttrain.testing.cases import EVERY, Case, sample
from disttrain.testing.ranks import Ran, run_cases
from disttrain.testing.verdict import Verdict, judge
from disttrain.testing.world import WorldError, run_world

_PATIENCE = 3
"""How many cases of one strategy and size may fail before the rest is not run: by then it is told what is wrong."""


class StrategyContract:
    """Runs real worlds of processes on this machine's CPU; prints its largest differences (`pytest -s`).

    `overrides` are what a user writes after the config; `sizes` the worlds the strategy runs in; `models` and
    `precisions` those it knows. Not `whole`, a sample of the cases is run that covers each of their options; another
    `turn` deals it otherwise.
    """

    overrides: ClassVar[Sequence[str]] = ()
    sizes: ClassVar[Sequence[int]] = (1, 2, 3, 4)
    models: ClassVar[Sequence[str]] = ("gpt", "tied-frozen", "unused", "odd")
    precisions: ClassVar[Sequence[str]] = ("fp32", "fp64", "bf16")
    whole: ClassVar[bool] = True
    turn: ClassVar[int] = 0
    timeout_s: ClassVar[float] = 600.0
    _found: ClassVar[dict[int, list[Verdict]]]

    @classmethod
    def overrides_at(cls, size: int) -> Sequence[str]:
        """`overrides` in a world of `size`, where degrees of a mesh depend on it."""
        return cls.overrides

    @classmethod
    def cases(cls, size: int) -> list[Case]:
        """What is run in a world of `size`."""
        some = EVERY if cls.whole else sample(size, cls.sizes, cls.turn, models=cls.models)
        return [case for case in some if case.model in cls.models and case.precision in cls.precisions]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """pytest's own hook: a test for each size, model and precision."""
        if {"size", "group"} <= set(metafunc.fixturenames):
            found = [(size, group) for size in self.sizes for group in dict.fromkeys(c.group for c in self.cases(size))]
            metafunc.parametrize(("size", "group"), found, ids=[f"{size}-{group}" for size, group in found])

    @classmethod
    def setup_class(cls) -> None:
        """pytest's own hook: nothing is known yet."""
        cls._found = {}

    @classmethod
    def teardown_class(cls) -> None:
        """pytest's own hook: print the largest differences."""
        found = [verdict for verdicts in cls._found.values() for verdict in verdicts]
        print(f"\n{cls.__name__}: {' '.join(cls.overrides)}, {cls.sizes} rank(s)\n{table(found)}")

    def test_equals_the_plain_loop(self, size: int, group: str, tmp_path: Path) -> None:
        """Initial weights bit-equal; each step's loss and gradient norm, and the final weights, within the bounds."""
        overrides = self.overrides_at(size)
        if size not in self._found:
            self._found[size] = hold(overrides, self.cases(size), size, tmp_path, timeout_s=self.timeout_s)
        faults = [
            f"{' '.join(overrides)} at {size} rank(s), {verdict.case}: {fault}"
            for verdict in self._found[size]
            if verdict.case.group == group
            for fault in verdict.faults
        ]
        assert not faults, "\n".join(["the strategy contract does not hold:", *faults])


def hold(
    overrides: Sequence[str], cases: Sequence[Case], size: int, folder: Path, *, timeout_s: float = 600.0
) -> list[Verdict]:
    """Run `cases` under a strategy in worlds of `size` and judge them. A case that fails costs its world; the rest go
    on in a new one, unless `_PATIENCE` worlds are gone. A world that dies or does not answer takes the rest along."""
    verdicts: list[Verdict] = []
    for _ in range(_PATIENCE):
        rest = cases[len(verdicts) :]
        if not rest:
            return verdicts
        try:
            ranks: list[list[Ran]] = run_world(
                size, run_cases, list(overrides), rest, folder / str(len(verdicts)), timeout_s=timeout_s
            )
        except WorldError as error:
            lost = f"the world died or did not answer, in this case or another\n{error}"
            return verdicts + [Verdict(case, [lost]) for case in rest]
        ended = min(map(len, ranks))
        verdicts += [judge(case, [rank[place] for rank in ranks]) for place, case in enumerate(rest[:ended])]
    return verdicts + [
        Verdict(case, [f"not run: {_PATIENCE} cases before it failed"]) for case in cases[len(verdicts) :]
    ]


def table(verdicts: Sequence[Verdict]) -> str:
    """Largest differences by precision, as a Markdown table; what was undetermined below it."""
    lines = ["| | runs | loss | gradient norm | final parameters |", "|---|---|---|---|---|"]
    for precision in dict.fromkeys(verdict.case.precision for verdict in verdicts):
        those: list[Any] = [verdict for verdict in verdicts if verdict.case.precision == precision]
        largest = [max(getattr(one, what) for one in those) for what in ("loss", "norm", "parameters")]
        lines.append(" | ".join([f"| {precision}", str(len(those)), *(f"{number:.1e}" for number in largest)]) + " |")
    left_out: dict[str, int] = {}
    for verdict in verdicts:
        for name, count in verdict.undetermined.items():
            key = f"{name} of {verdict.case.model}"
            left_out[key] = max(count, left_out.get(key, 0))
    if left_out:
        told = ", ".join(f"{count} entries of {name}" for name, count in left_out.items())
        lines.append(f"Undetermined, because their gradient is rounding: {told}")
    return "\n".join(lines)
