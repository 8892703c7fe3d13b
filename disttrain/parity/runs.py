"""The runs of one proof: outcomes by key, references by micro-batch, and how far two of them are apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from disttrain.config import Config
from disttrain.errors import DisttrainError, explain
from disttrain.parity.compare import Difference, Rounding, bounds_for, compare_runs
from disttrain.parity.launch import Failed, Outcome, run_tasks
from disttrain.parity.recorded import Recorded
from disttrain.parity.report import Row
from disttrain.parity.task import Job, Task

ALONE = ("strategy.name=none", "mesh.replicate=1", "mesh.shard=-1", "mesh.tensor=1")


class ReferenceError(DisttrainError):
    """There is nothing to compare with; `exit_code` is that of the reference's own failure."""

    def __init__(self, failed: Failed) -> None:
        do = "mend it: `disttrain.run` with strategy.name=none fails alike"
        super().__init__(explain("The config is to train in one process first.", failed.text, do))
        self.exit_code = failed.exit_code


@dataclass(eq=False)
class Pair:
    """A row on its way: what is compared with which reference. `base` is the reference's micro-batch."""

    row: Row
    key: str
    overrides: tuple[str, ...]
    base: int

    @property
    def is_case(self) -> bool:
        """Whether this is a run of the engine, and not the reference at another micro-batch."""
        return self.key.startswith("case-")


class Runs:
    """`probe` is what trying the user's parts showed, `rounding` that of gradients, by the reference's micro-batch."""

    def __init__(self, own: Config, job: Job, limit_s: float, say: Callable[[str], None]) -> None:
        self.job = job
        self._limit_s, self._say = limit_s, say
        self.bounds = bounds_for(own.precision.compute, own.precision.master)
        self.plain = own.precision.compute != "fp16"  # loss scaling has state, which a plain loop would only copy
        self.outcomes: dict[str, Outcome] = {}
        self.probe: Mapping[str, Any] = {}
        self.rounding: dict[int, Rounding] = {}

    def run(self, tasks: Sequence[Task], world_size: int, titles: Mapping[str, str]) -> None:
        """Run tasks in one world; their outcomes are kept by key. `titles` are what is said as each begins."""
        self.outcomes |= run_tasks(
            self.job, tasks, world_size, limit_s=self._limit_s, tell=lambda task: self._say(titles[task.key])
        )

    def reference(self, size: int, overrides: Sequence[str] = (), *, key: str | None = None, **more: Any) -> Task:
        """The reference at a micro-batch of `size`, under further overrides."""
        given = (*ALONE, f"data.micro_batch={size}", *overrides)
        return Task(key or reference_key(size), given, size, reference=self.plain, **more)

    def found(self, key: str) -> Recorded:
        """A reference that everything rests on. Raises ReferenceError where it did not come to its end."""
        outcome = self.outcomes[key]
        if isinstance(outcome, Failed):
            raise ReferenceError(outcome)
        return outcome

    def compare(self, found: str, expected: str, rounding: Rounding | None = None) -> Difference | None:
        """None where either did not come to its end."""
        ours, theirs = self.outcomes.get(found), self.outcomes.get(expected)
        if not isinstance(ours, Recorded) or not isinstance(theirs, Recorded):
            return None
        return compare_runs(ours, theirs, self.bounds, rounding)


def reference_key(size: int) -> str:
    """The key of the reference at this micro-batch."""
    return f"reference-{size}"
