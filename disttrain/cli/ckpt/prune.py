"""Implements `disttrain ckpt prune`, which removes the older checkpoints of a run.

Nothing is removed before every checkpoint to keep was read and is intact. `choose_kept` selects these checkpoints, as
in a run. Damaged checkpoints do not count and are not removed. The content of other checkpoints is not read. Only one
process at a time writes to a run's folder, so the command is rejected while a run holds the lock. The address of a
store has no lock.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disttrain.checkpoint import Best, Location, prune, storage_of
from disttrain.checkpoint.keep.retention import choose_kept
from disttrain.cli.ckpt.find import CheckpointStatus, Listing, find_checkpoints, problem_of, statuses
from disttrain.cli.ckpt.formatting import size_text
from disttrain.errors import CheckpointError, ConfigError, explain
from disttrain.report import RunFolder


@dataclass(frozen=True)
class PrunePlan:
    """The verified checkpoints to keep, the damaged ones with a fault each, and those to remove, in order of steps."""

    kept: tuple[CheckpointStatus, ...]
    damaged: tuple[tuple[CheckpointStatus, str], ...]
    removed: tuple[CheckpointStatus, ...]


@dataclass(frozen=True)
class RetentionRule:
    """The checkpoints to keep: the newest, the multiples of a step, and the best by a metric, as in `checkpoint`."""

    keep_last: int
    keep_every: int | None = None
    best: Best | None = None


def plan_prune(checkpoints: Sequence[CheckpointStatus], rule: RetentionRule) -> PrunePlan:
    """Plan which of the checkpoints, in order of steps, to keep. Reads every chunk of those to keep. Local."""
    damaged = {one.path: one.faults[0] for one in checkpoints if one.faults}
    verified: set[Location] = set()
    while True:
        by_step = {one.required().step: one for one in checkpoints if one.path not in damaged}
        scores = {step: _score(one, rule.best) for step, one in by_step.items()}
        chosen = choose_kept(scores, keep_last=rule.keep_last, keep_every=rule.keep_every, best=rule.best)
        unread = [by_step[step] for step in sorted(chosen, reverse=True) if by_step[step].path not in verified]
        if not unread:  # all chosen checkpoints are intact
            kept = {by_step[step].path for step in chosen}
            return PrunePlan(
                kept=tuple(one for one in checkpoints if one.path in kept),
                damaged=tuple((one, damaged[one.path]) for one in checkpoints if one.path in damaged),
                removed=tuple(one for one in checkpoints if one.path not in kept and one.path not in damaged),
            )
        for one in unread:
            fault = next(one.content_faults(), None)
            if fault is None:
                verified.add(one.path)
            else:
                damaged[one.path] = fault  # the next round chooses another checkpoint instead


def _score(one: CheckpointStatus, best: Best | None) -> float | None:
    """Return the metric of the evaluation at this step, or None without an evaluation."""
    evaluation = one.required().document.get("evaluation")
    value = evaluation.get(best.metric) if best and isinstance(evaluation, dict) else None
    return float(value) if isinstance(value, int | float) else None


def prune_run(path: str, rule: RetentionRule, *, dry_run: bool) -> dict[str, Any]:
    """Remove the checkpoints that `rule` does not keep, or with `dry_run` only plan it. Return the result. Local.

    Raises CheckpointError if no intact checkpoint would remain, and if a run holds the lock of the folder.
    """
    failed = f"Cannot prune {path}."
    listing = find_checkpoints(path)
    if listing.root is None:
        problem = "it is one checkpoint, not the checkpoints of a run"
        raise CheckpointError(explain(failed, problem, "name the run's folder"))
    with _sole_writer(listing, failed=failed, needed=not dry_run):
        checkpoints = list(statuses(find_checkpoints(path)))  # list again, because a run may have saved before the lock
        if rule.best is not None:
            _reject_unknown_metric(checkpoints, rule.best)
        plan = plan_prune(checkpoints, rule)
        if not plan.kept:
            faults = "; ".join(f"{one.path.name}: {fault}" for one, fault in plan.damaged[:3])
            raise CheckpointError(explain(failed, f"no checkpoint is intact: {faults}", "repair a checkpoint first"))
        freed = sum(storage_of(one.path).bytes_at(one.path) for one in plan.removed)
        if plan.removed and not dry_run:
            _remove(listing.root, plan)
    return {
        "path": path,
        "dry_run": dry_run,
        "kept": [one.path.name for one in plan.kept],
        "damaged": [{"name": one.path.name, "fault": fault} for one, fault in plan.damaged],
        "removed": [one.path.name for one in plan.removed],
        "bytes": freed,
    }


def _reject_unknown_metric(checkpoints: Sequence[CheckpointStatus], best: Best) -> None:
    """Raise ConfigError if no checkpoint has the metric. A misspelled name would otherwise keep no best checkpoint."""
    evaluations = [one.manifest.document.get("evaluation") for one in checkpoints if one.manifest is not None]
    known = sorted({name for one in evaluations if isinstance(one, dict) for name in one})
    if best.metric not in known:
        problem = f"the checkpoints have {'the metrics ' + ', '.join(known) if known else 'no metrics'}"
        fix = "name one of these" if known else "leave --keep-best out"
        raise ConfigError(explain(f"Cannot select checkpoints by --keep-best {best.metric}.", problem, fix))


def render_pruning(pruned: dict[str, Any]) -> str:
    """Return a line per checkpoint and the total. Pure."""
    verb = "would remove" if pruned["dry_run"] else "removed"
    lines = [f"kept {name}: intact" for name in pruned["kept"]]
    lines += [f"kept {one['name']}: damaged: {one['fault']}" for one in pruned["damaged"]]
    lines += [f"{verb} {name}" for name in pruned["removed"]]
    return "\n".join([*lines, f"{verb} {len(pruned['removed'])}, {size_text(pruned['bytes'])}"])


def _remove(root: Location, plan: PrunePlan) -> None:
    """Remove checkpoints. `prune` renames each one first, so that a kill leaves no partial checkpoint."""
    staying = [*(one.path for one in plan.kept), *(one.path for one, _ in plan.damaged)]
    failed = f"Cannot remove {len(plan.removed)} checkpoints in {root}."
    try:
        prune(root, 1, protect=staying)
    except OSError as error:
        fix = "grant write permission there; the remaining checkpoints are intact"
        raise CheckpointError(explain(failed, f"{error.strerror} ({error.filename})", fix)) from error
    remaining = [one.path.name for one in plan.removed if storage_of(one.path).taken(one.path)]
    if remaining:
        problem = f"{', '.join(remaining)} could not be removed"
        raise CheckpointError(explain(failed, problem, "see the warnings above"))


@contextmanager
def _sole_writer(listing: Listing, *, failed: str, needed: bool) -> Iterator[None]:
    """Hold the locks that a run would hold: of its folder, and of its storage if the storage is a folder."""
    with ExitStack() as held:
        for folder in _locked_by_runs(listing) if needed else ():
            try:
                folder.lock(wait_s=0.0)
            except CheckpointError as error:
                problem = f"cannot lock {folder.path}: {problem_of(error)}"
                fix = "wait for the run that uses the folder or stop it, or correct the folder's permissions"
                raise CheckpointError(explain(failed, problem, fix)) from error
            held.callback(folder.unlock)
        yield


def _locked_by_runs(listing: Listing) -> Iterator[RunFolder]:
    """Yield the folders that a run would lock.

    A folder of checkpoints that no run has written to is left out, so that no lock file is created in it.
    """
    root = listing.root
    if isinstance(root, Path):
        resolved = root.resolve()
        folder = RunFolder(resolved.parent if resolved.name == RunFolder(resolved).checkpoints.name else resolved)
        if resolved != folder.path or folder.lock_file.exists():
            yield folder
    if isinstance(listing.path, Path) and listing.path != root and RunFolder(listing.path).checkpoints != root:
        yield RunFolder(listing.path)  # the checkpoints of this run are in a storage
