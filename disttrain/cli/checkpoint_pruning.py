"""`disttrain ckpt prune`: which checkpoints of a run may go, and letting them go.

Nothing goes before all that is to stay was read and found whole. What is damaged is neither counted nor removed. Only
one process at a time writes to a run's folder: refused while a run holds its lock.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disttrain.checkpoint import prune
from disttrain.cli.checkpoint_pages import size_text
from disttrain.cli.checkpoint_survey import Survey, find_place, size_on_disk, surveys
from disttrain.errors import CheckpointError, explain
from disttrain.report import RunFolder


@dataclass(frozen=True)
class Plan:
    """`kept` were verified, `left` are damaged (with a fault), `gone` may be removed; each oldest first."""

    kept: tuple[Survey, ...]
    left: tuple[tuple[Survey, str], ...]
    gone: tuple[Survey, ...]


def plan_prune(found: Sequence[Survey], *, keep_last: int, keep_every: int | None) -> Plan:
    """Keep the newest `keep_last` that are whole and those whose step is a multiple of `keep_every`. Local.

    Reads every chunk of what is kept. `found` is oldest first.
    """
    kept: list[Survey] = []
    left: list[tuple[Survey, str]] = []
    gone: list[Survey] = []
    newest = 0
    for one in reversed(found):
        milestone = keep_every is not None and one.step is not None and one.step % keep_every == 0
        wanted = newest < keep_last or milestone
        fault = one.faults[0] if one.faults else next(one.content_faults(), None) if wanted else None
        if fault is not None:
            left.append((one, fault))
        elif wanted:
            newest += newest < keep_last
            kept.append(one)
        else:
            gone.append(one)
    return Plan(tuple(reversed(kept)), tuple(reversed(left)), tuple(reversed(gone)))


def prune_run(path: str, *, keep_last: int, keep_every: int | None, dry_run: bool) -> dict[str, Any]:
    """Plan, and without `dry_run` remove; what happened. Local. CheckpointError where nothing whole would stay."""
    place = find_place(path)
    if place.root is None:
        do = "name the run's folder"
        raise CheckpointError(explain(f"{path} is to be pruned.", "one checkpoint, not the checkpoints of a run", do))
    with _sole_writer(place.root, asked=f"{path} is to be pruned.", needed=not dry_run):
        found = list(surveys(find_place(path)))  # once more: what lies there now that nobody else writes
        plan = plan_prune(found, keep_last=keep_last, keep_every=keep_every)
        if not plan.kept:
            faults = "; ".join(f"{one.path.name}: {fault}" for one, fault in plan.left[:3])
            raise CheckpointError(explain(f"{path} is to be pruned.", f"none is whole: {faults}", "mend one first"))
        freed = sum(size_on_disk(one.path) for one in plan.gone)
        if plan.gone and not dry_run:
            _remove(place.root, plan)
    return {
        "path": path,
        "dry_run": dry_run,
        "kept": [one.path.name for one in plan.kept],
        "left": [{"name": one.path.name, "fault": fault} for one, fault in plan.left],
        "removed": [one.path.name for one in plan.gone],
        "bytes": freed,
    }


def render_pruning(found: dict[str, Any]) -> str:
    """A line a checkpoint. Pure."""
    verb = "would remove" if found["dry_run"] else "removed"
    lines = [f"kept {name}: whole" for name in found["kept"]]
    lines += [f"left {one['name']}: {one['fault']}" for one in found["left"]]
    lines += [f"{verb} {name}" for name in found["removed"]]
    return "\n".join([*lines, f"{verb} {len(found['removed'])}, {size_text(found['bytes'])}"])


def _remove(root: Path, plan: Plan) -> None:
    """Through the room that owns the order of it: a rename first, so that a kill leaves no half checkpoint."""
    staying = [*(one.path for one in plan.kept), *(one.path for one, _ in plan.left)]
    asked = f"{len(plan.gone)} checkpoints in {root} are to be removed."
    try:
        prune(root, 1, protect=staying)
    except OSError as error:
        raise CheckpointError(
            explain(asked, f"{error.strerror} ({error.filename})", "allow writing there; what is left is whole")
        ) from error
    still = [one.path.name for one in plan.gone if one.path.exists()]
    if still:
        raise CheckpointError(explain(asked, f"{', '.join(still)} still there", "see the warnings above"))


@contextmanager
def _sole_writer(root: Path, *, asked: str, needed: bool) -> Iterator[None]:
    """Hold the run's lock. A folder of another name than a run's `checkpoints/` is nobody's to write to."""
    own = root.resolve()
    run = RunFolder(own.parent)
    if not needed or own.name != run.checkpoints.name:
        yield
        return
    try:
        run.lock(wait_s=0.0)
    except CheckpointError as error:
        raise CheckpointError(f"{asked}\n  {error}") from error
    try:
        yield
    finally:
        run.unlock()
