"""Provides `StrategyContract`, the contract suite as a class of pytest tests.

The author of a strategy derives from it and names the strategy. One world per size runs all cases. There is one test
for each size, model and precision, and for each size of a sample.
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
"""After so many failed cases of one strategy and size, the remaining cases are not run."""

_SAMPLE = "sample"


class StrategyContract:
    """Runs real processes on the CPU of this machine, and prints the largest differences (`pytest -s`).

    Attributes:
        overrides: the config overrides that select the strategy.
        sizes: the world sizes to run.
        models, precisions: the ones that the strategy supports.
        every_case: whether to run all cases. If false, a sample covers each option of the cases.
        turn: another value selects another sample.
        timeout_s: the time limit of a world, in seconds.
    """

    overrides: ClassVar[Sequence[str]] = ()
    sizes: ClassVar[Sequence[int]] = (1, 2, 3, 4)
    models: ClassVar[Sequence[str]] = ("gpt", "tied-frozen", "unused", "odd")
    precisions: ClassVar[Sequence[str]] = ("fp32", "fp64", "bf16")
    every_case: ClassVar[bool] = True
    turn: ClassVar[int] = 0
    timeout_s: ClassVar[float] = 600.0
    _found: ClassVar[dict[int, list[Verdict]]]

    @classmethod
    def overrides_at(cls, size: int) -> Sequence[str]:
        """Returns the overrides for a world of `size`, for meshes that depend on it."""
        return cls.overrides

    @classmethod
    def cases(cls, size: int) -> list[Case]:
        """Returns the cases to run in a world of `size`."""
        some = EVERY if cls.every_case else sample(size, cls.sizes, cls.turn, models=cls.models)
        return [case for case in some if case.model in cls.models and case.precision in cls.precisions]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Generates a test for each size, model and precision, or for each size of a sample. Called by pytest."""
        if {"size", "group"} <= set(metafunc.fixturenames):
            found = [(size, group) for size in self.sizes for group in self._groups(size)]
            metafunc.parametrize(("size", "group"), found, ids=[f"{size}-{group}" for size, group in found])

    @classmethod
    def _groups(cls, size: int) -> list[str]:
        """Returns the groups of cases. A sample is one group, so that pytest workers never repeat its world."""
        return list(dict.fromkeys(case.group for case in cls.cases(size))) if cls.every_case else [_SAMPLE]

    @classmethod
    def setup_class(cls) -> None:
        """Prepares the results of the class. Called by pytest."""
        cls._found = {}

    @classmethod
    def teardown_class(cls) -> None:
        """Prints the largest differences. Called by pytest."""
        found = [verdict for verdicts in cls._found.values() for verdict in verdicts]
        print(f"\n{cls.__name__}: {' '.join(cls.overrides)}, {cls.sizes} rank(s)\n{table(found)}")

    def test_equals_the_plain_loop(self, size: int, group: str, tmp_path: Path) -> None:
        """The initial weights are bit-equal. Losses, gradient norms and final weights are within the bounds."""
        overrides = self.overrides_at(size)
        if size not in self._found:
            self._found[size] = hold(overrides, self.cases(size), size, tmp_path, timeout_s=self.timeout_s)
        faults = [
            f"{' '.join(overrides)} at {size} rank(s), {verdict.case}: {fault}"
            for verdict in self._found[size]
            if group in (verdict.case.group, _SAMPLE)
            for fault in verdict.faults
        ]
        assert not faults, "\n".join(["the strategy contract does not hold:", *faults])


def hold(
    overrides: Sequence[str], cases: Sequence[Case], size: int, folder: Path, *, timeout_s: float = 600.0
) -> list[Verdict]:
    """Runs `cases` under a strategy in worlds of `size` and judges them. Local.

    A case that fails ends its world, and a new world runs the remaining cases, at most `_PATIENCE` times. If a world
    dies or does not answer, all remaining cases fail.
    """
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
            lost = f"the world died or did not answer in this case or another one\n{error}"
            return verdicts + [Verdict(case, [lost]) for case in rest]
        ended = min(map(len, ranks))
        verdicts += [judge(case, [rank[place] for rank in ranks]) for place, case in enumerate(rest[:ended])]
    return verdicts + [
        Verdict(case, [f"not run, because {_PATIENCE} earlier cases failed"]) for case in cases[len(verdicts) :]
    ]


def table(verdicts: Sequence[Verdict]) -> str:
    """Returns the largest differences by precision as a Markdown table, followed by the undetermined entries."""
    lines = ["| | runs | loss | gradient norm | final parameters |", "|---|---|---|---|---|"]
    for precision in dict.fromkeys(verdict.case.precision for verdict in verdicts):
        chosen: list[Any] = [verdict for verdict in verdicts if verdict.case.precision == precision]
        largest = [max(getattr(one, what) for one in chosen) for what in ("loss", "norm", "parameters")]
        lines.append(" | ".join([f"| {precision}", str(len(chosen)), *(f"{number:.1e}" for number in largest)]) + " |")
    left_out: dict[str, int] = {}
    for verdict in verdicts:
        for name, count in verdict.undetermined.items():
            key = f"{name} of {verdict.case.model}"
            left_out[key] = max(count, left_out.get(key, 0))
    if left_out:
        listed = ", ".join(f"{count} entries of {name}" for name, count in left_out.items())
        lines.append(f"Undetermined, because their gradient is rounding error: {listed}")
    return "\n".join(lines)
