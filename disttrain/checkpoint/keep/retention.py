"""Which checkpoints a run keeps: the newest, every so many steps, the best by a metric. Removes only after a commit.

What is counted was written or read whole by this process: a checkpoint that nobody has verified never lets another go.
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
    """Keep the `keep` checkpoints with the least (`mode` min) or greatest (max) `metric`."""

    metric: str
    mode: str = "min"
    keep: int = 1


def choose_kept(
    scores: Mapping[int, float | None], *, keep_last: int, keep_every: int | None = None, best: Best | None = None
) -> set[int]:
    """The steps to keep of those that are there, each with its metric where it has one. Pure.

    Of equal metrics the earlier step is the better. A metric that is no number counts as none.
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
    """Rank 0's hand on the checkpoints in `root`. `verified` are the folders known to be whole."""

    root: Location
    keep_last: int
    keep_every: int | None = None
    best: Best | None = None
    verified: dict[Location, float | None] = field(default_factory=dict)
    _damaged: set[Location] = field(default_factory=set)

    def committed(self, path: Location) -> list[Location]:
        """A checkpoint was written whole: let go of what need not be kept any more; returns that. Local.

        What cannot be removed stays, with a warning: it is no fault of the checkpoint.
        """
        try:
            self.verified[path] = self._score(path)
            there = list_checkpoints(self.root)
            # One a commit, the newest first: the other ranks wait meanwhile. Until then it is not counted, and stays.
            unknown = [one for one in there if one not in self.verified and one not in self._damaged]
            if unknown:
                self._verify(unknown.pop())
            steps = {int(one.name.removeprefix("step-")): one for one in there if one in self.verified}
            scores = {step: self.verified[one] for step, one in steps.items()}
            kept = choose_kept(scores, keep_last=self.keep_last, keep_every=self.keep_every, best=self.best)
            return prune(self.root, 1, protect=[*(steps[step] for step in kept), *unknown, *self._damaged])
        except (OSError, CheckpointError) as error:
            _log.warning("checkpoints of %s that need not be kept stay: %s", self.root, error)
            return []

    def mark_intact(self, path: Location) -> None:
        """One that was read whole, by whom it matters not."""
        self.verified[path] = self._score(path)

    def _verify(self, path: Location) -> None:
        try:
            Checkpoint.open(path).verify()
        except CheckpointError as error:
            self._damaged.add(path)
            _log.warning("%s is neither counted nor removed: %s", path, error)
        else:
            self.verified[path] = self._score(path)

    def _score(self, path: Location) -> float | None:
        if self.best is None:
            return None
        document = Checkpoint.open(path, verify=False).document
        evaluation = document.get("evaluation") or {}
        value = evaluation.get(self.best.metric)
        return float(value) if value is not None else None
