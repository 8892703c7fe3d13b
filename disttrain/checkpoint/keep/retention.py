"""Chooses which checkpoints a run keeps: the newest, one every so many steps, and the best by a metric.

Checkpoints are removed only after a commit. Only checkpoints that this process wrote or verified are counted, so that
an unverified checkpoint never causes the removal of another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from disttrain.checkpoint.keep.discovery import list_checkpoints, prune
from disttrain.checkpoint.read.reader import Checkpoint
from disttrain.checkpoint.storage.location import Location
from disttrain.errors import CheckpointError
from disttrain.logs import package_logger

_log = package_logger("checkpoint")


@dataclass(frozen=True)
class Best:
    """Keep the `keep` checkpoints with the smallest (`mode` "min") or largest ("max") value of `metric`."""

    metric: str
    mode: str = "min"
    keep: int = 1


def choose_kept(
    scores: Mapping[int, float | None], *, keep_last: int, keep_every: int | None = None, best: Best | None = None
) -> set[int]:
    """Return the steps to keep, given the existing steps with their metric, or None without a metric. Pure.

    Of equal metrics, the earlier step is the better one. NaN counts as no metric.
    """
    steps = sorted(scores)
    kept = set(steps[-keep_last:])
    if keep_every is not None:
        kept |= {step for step in steps if step % keep_every == 0}
    if best is not None:
        sign = 1 if best.mode == "min" else -1
        known = {step: value for step in steps if (value := scores[step]) is not None and value == value}
        kept |= set(sorted(known, key=lambda step: (sign * known[step], step))[: best.keep])
    return kept


@dataclass
class Retention:
    """Manages the checkpoints in `root` on rank 0. `verified` are the checkpoints known to be intact."""

    root: Location
    keep_last: int
    keep_every: int | None = None
    best: Best | None = None
    verified: dict[Location, float | None] = field(default_factory=dict)
    _damaged: set[Location] = field(default_factory=set)

    def committed(self, path: Location) -> list[Location]:
        """Record a finished checkpoint, remove the checkpoints no longer needed, and return those. Local.

        A checkpoint that cannot be removed stays, with a warning. This is not a failure of the new checkpoint.
        """
        try:
            self.verified[path] = self._score(path)
            there = list_checkpoints(self.root)
            # Verify one checkpoint per commit, the newest first, because the other ranks wait meanwhile. Until then, it
            # is not counted and not removed.
            unknown = [one for one in there if one not in self.verified and one not in self._damaged]
            if unknown:
                self._verify(unknown.pop())
            steps = {int(one.name.removeprefix("step-")): one for one in there if one in self.verified}
            scores = {step: self.verified[one] for step, one in steps.items()}
            kept = choose_kept(scores, keep_last=self.keep_last, keep_every=self.keep_every, best=self.best)
            return prune(self.root, 1, protect=[*(steps[step] for step in kept), *unknown, *self._damaged])
        except (OSError, CheckpointError) as error:
            _log.warning("Old checkpoints in %s were not removed: %s", self.root, error)
            return []

    def mark_intact(self, path: Location) -> None:
        """Record that a checkpoint was verified, by this process or another."""
        self.verified[path] = self._score(path)

    def _verify(self, path: Location) -> None:
        try:
            Checkpoint.open(path).verify()
        except CheckpointError as error:
            self._damaged.add(path)
            _log.warning("%s is neither counted nor removed. %s", path, error)
        else:
            self.verified[path] = self._score(path)

    def _score(self, path: Location) -> float | None:
        if self.best is None:
            return None
        document = Checkpoint.open(path, verify=False).document
        evaluation = document.get("evaluation") or {}
        value = evaluation.get(self.best.metric)
        return float(value) if value is not None else None
