"""`disttrain ckpt prune`: which checkpoints of a run may go, and letting them go.

Nothing goes before all that is to stay was read and found whole; which those are is `choose_kept`'s word, as in a run.
What is found damaged on the way is neither counted nor removed; what nobody wishes to keep is not read. Only one
process at a time writes to a run's folder: refused while a run holds its lock. The address of a store has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disttrain.checkpoint import Best, Location, prune, storage_of
from disttrain.checkpoint.keep.retention import choose_kept
from disttrain.cli.ckpt.pages import size_text
from disttrain.cli.ckpt.survey import Listing, Survey, find_checkpoints, surveys
from disttrain.errors import CheckpointError, ConfigError, explain
from disttrain.report import RunFolder


@dataclass(frozen=True)
class Plan:
    """`kept` were verified, `left` are damaged (with a fault), `gone` may be removed; each oldest first."""

    kept: tuple[Survey, ...]
    left: tuple[tuple[Survey, str], ...]
    gone: tuple[Survey, ...]


@dataclass(frozen=True)
class Wish:
    """What is to be kept: the newest, every so many steps, the best by a metric, as in a config's `checkpoint`."""

    keep_last: int
    keep_every: int | None = None
    best: Best | None = None


def plan_prune(found: Sequence[Survey], wish: Wish) -> Plan:
    """Divide the checkpoints, given oldest first, by what is wished. Reads every chunk of what is to be kept. Local."""
    left = {one.path: one.faults[0] for one in found if one.faults}
    verified: set[Location] = set()
    while True:
        there = {one.required().step: one for one in found if one.path not in left}
        scores = {step: _score(one, wish.best) for step, one in there.items()}
        chosen = choose_kept(scores, keep_last=wish.keep_last, keep_every=wish.keep_every, best=wish.best)
        unread = [there[step] for step in sorted(chosen, reverse=True) if there[step].path not in verified]
        if not unread:  # all that is chosen is whole
            kept = {there[step].path for step in chosen}
            return Plan(
                kept=tuple(one for one in found if one.path in kept),
                left=tuple((one, left[one.path]) for one in found if one.path in left),
                gone=tuple(one for one in found if one.path not in kept and one.path not in left),
            )
        for one in unread:
            fault = next(one.content_faults(), None)
            if fault is None:
                verified.add(one.path)
            else:
                left[one.path] = fault  # another is chosen in its stead


def _score(one: Survey, best: Best | None) -> float | None:
    """The metric as it was evaluated at this step; None where it was not."""
    evaluation = one.required().document.get("evaluation")
    value = evaluation.get(best.metric) if best and isinstance(evaluation, dict) else None
    return float(value) if isinstance(value, int | float) else None


def prune_run(path: str, wish: Wish, *, dry_run: bool) -> dict[str, Any]:
    """Plan, and without `dry_run` remove; what happened. Local. CheckpointError where nothing whole would stay."""
    listing = find_checkpoints(path)
    if listing.root is None:
        do = "name the run's folder"
        raise CheckpointError(explain(f"{path} is to be pruned.", "one checkpoint, not the checkpoints of a run", do))
    with _sole_writer(listing, asked=f"{path} is to be pruned.", needed=not dry_run):
        found = list(surveys(find_checkpoints(path)))  # once more: what lies there now that nobody else writes
        if wish.best is not None:
            _refuse_unknown_metric(found, wish.best)
        plan = plan_prune(found, wish)
        if not plan.kept:
            faults = "; ".join(f"{one.path.name}: {fault}" for one, fault in plan.left[:3])
            raise CheckpointError(explain(f"{path} is to be pruned.", f"none is whole: {faults}", "mend one first"))
        freed = sum(storage_of(one.path).bytes_at(one.path) for one in plan.gone)
        if plan.gone and not dry_run:
            _remove(listing.root, plan)
    return {
        "path": path,
        "dry_run": dry_run,
        "kept": [one.path.name for one in plan.kept],
        "left": [{"name": one.path.name, "fault": fault} for one, fault in plan.left],
        "removed": [one.path.name for one in plan.gone],
        "bytes": freed,
    }


def _refuse_unknown_metric(found: Sequence[Survey], best: Best) -> None:
    """ConfigError where no checkpoint was evaluated by it: a name in another spelling would keep none of the best."""
    documents = [one.manifest.document.get("evaluation") for one in found if one.manifest is not None]
    known = sorted({name for one in documents if isinstance(one, dict) for name in one})
    if best.metric not in known:
        asked = f"--keep-best {best.metric} is to pick checkpoints."
        raise ConfigError(explain(asked, f"evaluated were {', '.join(known) or 'none'}", "name one of these"))


def render_pruning(found: dict[str, Any]) -> str:
    """A line a checkpoint. Pure."""
    verb = "would remove" if found["dry_run"] else "removed"
    lines = [f"kept {name}: whole" for name in found["kept"]]
    lines += [f"left {one['name']}: {one['fault']}" for one in found["left"]]
    lines += [f"{verb} {name}" for name in found["removed"]]
    return "\n".join([*lines, f"{verb} {len(found['removed'])}, {size_text(found['bytes'])}"])


def _remove(root: Location, plan: Plan) -> None:
    """Through the room that owns the order of it: a rename first, so that a kill leaves no half checkpoint."""
    staying = [*(one.path for one in plan.kept), *(one.path for one, _ in plan.left)]
    asked = f"{len(plan.gone)} checkpoints in {root} are to be removed."
    try:
        prune(root, 1, protect=staying)
    except OSError as error:
        raise CheckpointError(
            explain(asked, f"{error.strerror} ({error.filename})", "allow writing there; what is left is whole")
        ) from error
    still = [one.path.name for one in plan.gone if storage_of(one.path).taken(one.path)]
    if still:
        raise CheckpointError(explain(asked, f"{', '.join(still)} still there", "see the warnings above"))


@contextmanager
def _sole_writer(listing: Listing, *, asked: str, needed: bool) -> Iterator[None]:
    """Hold the locks that a run there would hold: its folder's, and that of a storage which is a folder."""
    with ExitStack() as held:
        for folder in _locked_by_runs(listing) if needed else ():
            try:
                folder.lock(wait_s=0.0)
            except CheckpointError as error:
                raise CheckpointError(f"{asked}\n  {error}") from error
            held.callback(folder.unlock)
        yield


def _locked_by_runs(listing: Listing) -> Iterator[RunFolder]:
    """Not the folder of checkpoints that no run has ever written to: it is nobody's, and stays as it is."""
    root = listing.root
    if isinstance(root, Path):
        own = root.resolve()
        folder = RunFolder(own.parent if own.name == RunFolder(own).checkpoints.name else own)
        if own != folder.path or folder.lock_file.exists():
            yield folder
    if isinstance(listing.path, Path) and listing.path != root and RunFolder(listing.path).checkpoints != root:
        yield RunFolder(listing.path)  # its checkpoints are in a storage
