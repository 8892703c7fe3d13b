"""Finds the checkpoints that a PATH of `disttrain ckpt` names, and reports the status of each.

It reads folders, manifests and, on request, every chunk. It writes nothing. A path that names no checkpoint raises
CheckpointError. A damaged checkpoint is not an error but a status with all its faults.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path

from disttrain.checkpoint import Location, Manifest, parse_location, step_folder, step_of, storage_of
from disttrain.checkpoint.form.manifest import MANIFEST, decode_manifest
from disttrain.engine.checkpointing.locate import checkpoints_in
from disttrain.errors import CheckpointError, ConfigError, explain
from disttrain.report import RunFolder

_REJECTED = "rejected-"
_UNFINISHED = "staging: being written or removed, or left by a killed process; the next start of the run clears it"
_MOST_SEARCHED = 100
"""Names searched for runs in a folder. Each name costs a listing in a store."""


@dataclass(frozen=True)
class CheckpointStatus:
    """The status of one checkpoint's folder, without its content.

    `manifest` is None if it cannot be used. `faults` are descriptions. `unusable` has the files that are missing or
    have the wrong size. `error` is the reason why there is no manifest.
    """

    path: Location
    manifest: Manifest | None
    faults: tuple[str, ...]
    unusable: frozenset[str] = frozenset()
    error: CheckpointError | None = None

    @property
    def strays(self) -> list[str]:
        """The names in the folder that the manifest does not list. Empty without a manifest."""
        if self.manifest is None:
            return []
        known = {MANIFEST, *self.manifest.files}
        try:
            return [name for name in storage_of(self.path).names(self.path) if name not in known]
        except FileNotFoundError:  # a run removed the folder meanwhile
            return []

    @property
    def step(self) -> int | None:
        """The step in the manifest, or in the folder's name without a manifest."""
        return self.manifest.step if self.manifest else step_of(self.path.name)

    @property
    def when(self) -> str | None:
        """The time (UTC) at which the storage wrote the manifest, the last file. A copy may have another time."""
        written = storage_of(self.path).written_at(self.path / MANIFEST)
        return written.astimezone(UTC).isoformat(timespec="seconds") if written else None

    def required(self) -> Manifest:
        """Return the manifest. Raises CheckpointError if there is no usable manifest."""
        if self.manifest is None:
            raise self.error or CheckpointError(f"{self.path} has no manifest")
        return self.manifest

    def content_faults(self) -> Iterator[str]:
        """Read every chunk of every usable file, and yield the mismatches. One chunk is in memory at a time."""
        files, chunk_bytes = (self.manifest.files, self.manifest.chunk_bytes) if self.manifest else ({}, 0)
        for name, info in files.items():
            if name in self.unusable:
                continue
            try:
                with storage_of(self.path).open_chunks(self.path / name, info, chunk_bytes) as reader:
                    yield from filter(None, (reader.check(chunk) for chunk in range(len(info.chunks))))
            except CheckpointError as error:
                yield f"{name}: {problem_of(error)}"


@dataclass(frozen=True)
class Listing:
    """The checkpoints that a PATH names.

    `checkpoints` are in order of steps. `root` is the folder that contains them, or None if PATH names one checkpoint.
    `others` are the other names in `root`, each with a description.
    """

    path: Location
    root: Location | None
    checkpoints: tuple[Location, ...]
    others: tuple[tuple[Location, str], ...] = ()


def find_checkpoints(path: str) -> Listing:
    """Return the checkpoints of a run's folder, its `checkpoints/` or its storage, or a single checkpoint. Local.

    Raises CheckpointError for any other path.
    """
    try:
        return _find(parse_location(path))
    except OSError as error:
        fix = "name a run's folder DIR/NAME or a checkpoint in it, with permission to read it"
        raise CheckpointError(explain(f"Cannot read {path}.", f"{error.filename}: {error.strerror}", fix)) from error


def find_one(path: str) -> CheckpointStatus:
    """Return the checkpoint that PATH names, or the newest checkpoint of a run that has all its files. Local.

    Raises CheckpointError if there is no such checkpoint.
    """
    listing = find_checkpoints(path)
    faults = []
    for one in statuses(listing, newest_first=True):
        if listing.root is None or not one.faults:
            one.required()
            return one
        faults.append(f"{one.path.name}: {one.faults[0]}")
    fix = "restore the missing files, or name one of its checkpoints"
    raise CheckpointError(explain(f"{path} has no intact checkpoint.", "; ".join(faults[:3]), fix))


def statuses(listing: Listing, *, newest_first: bool = False) -> Iterator[CheckpointStatus]:
    """Yield the status of each checkpoint. Skip checkpoints that a run removes meanwhile. Local."""
    for path in reversed(listing.checkpoints) if newest_first else listing.checkpoints:
        one = status_of(path)
        if not one.faults or storage_of(path).taken(path):
            yield one


def status_of(path: Location) -> CheckpointStatus:
    """Return the status of a checkpoint by its manifest and file sizes, without reading a chunk. Local."""
    storage = storage_of(path)
    try:
        manifest = decode_manifest(storage.read_manifest(path), where=str(path / MANIFEST))
    except CheckpointError as error:
        return CheckpointStatus(path, None, (f"{MANIFEST}: {problem_of(error, with_fix=True)}",), error=error)
    faults = []
    if step_of(path.name) is not None and path.name != step_folder(manifest.step):
        faults.append(f"the folder name does not match step {manifest.step} of the manifest: rename the folder back")
    unusable = dict(storage.unusable(path, manifest.files))
    faults += [f"{name}: {problem_of(error)}" for name, error in unusable.items()]
    return CheckpointStatus(path, manifest, tuple(faults), frozenset(unusable))


def problem_of(error: CheckpointError, *, with_fix: bool = False) -> str:
    """Return the problem of an error that `explain` formatted, optionally with its fix in parentheses. Pure."""
    text = str(error)
    problem, _, fix = text.partition("\n  problem: ")[2].rpartition("\n  fix: ")
    if not problem:
        return text
    return f"{problem} ({fix})" if with_fix else problem


def select_names(names: Collection[str], pattern: str | None) -> list[str]:
    """Return the names that match a shell pattern, or all names without a pattern. Pure.

    Raises ConfigError if no name matches.
    """
    selected = [name for name in names if pattern is None or fnmatchcase(name, pattern)]
    if pattern is not None and not selected:
        fix = "write a shell pattern in quotes, such as --name '*.bias'; ckpt inspect shows all names"
        problem = f"none of {len(names)} names matches"
        raise ConfigError(explain(f"Cannot select tensors by --name {pattern}.", problem, fix))
    return selected


def _find(path: Location) -> Listing:
    storage = storage_of(path)
    if not storage.taken(path) or (isinstance(path, Path) and not path.is_dir()):
        storage.read_manifest(path)  # raises an error that says what is there
    if step_of(path.resolve().name) is not None or MANIFEST in storage.names(path):
        return Listing(path, None, (path,))
    root = checkpoints_in(path) or path
    inside = [root / name for name in storage_of(root).names(root)]
    unfinished = storage_of(root).unfinished(root)  # in a store an unfinished save has a checkpoint's name
    steps = sorted((step, one) for one in inside if (step := step_of(one.name)) is not None and one not in unfinished)
    if steps:
        checkpoints = tuple(one for _, one in steps)
        others = [
            (one, _UNFINISHED if one in unfinished else _describe(one.name)) for one in inside if one not in checkpoints
        ]
        return Listing(path, root, checkpoints, tuple(others))
    _reject_run_without_checkpoints(path, root, [one.name for one in inside])
    storage.read_manifest(path)  # raises an error that says what the folder is
    raise CheckpointError(explain(f"Cannot list {path}.", "the folder changed meanwhile", "try again"))


def _reject_run_without_checkpoints(path: Location, root: Location, inside: Sequence[str]) -> None:
    """Raise CheckpointError for a run that has not saved anything yet, and for a folder of runs."""
    failed = f"{path} has no checkpoints."
    run = RunFolder(path) if isinstance(path, Path) else None
    if root != path or (run and (run.config.exists() or path.resolve().name == run.checkpoints.name)):
        content = f"only {', '.join(inside[:5])}" if inside else "an empty folder"
        fix = "wait until the run saves its first checkpoint (checkpoint.every)"
        raise CheckpointError(explain(failed, f"no step-NNNNNNNN in {root}: {content}", fix))
    runs_inside = (name for name in inside[:_MOST_SEARCHED] if checkpoints_in(path / name) is not None)
    runs = list(islice(runs_inside, 8))
    if runs:
        raise CheckpointError(explain(failed, f"a folder of runs: {', '.join(runs)}", "name one of these runs"))


def _describe(name: str) -> str:
    if name == ".lock":
        return "the lock of a run"
    return "set aside: damaged when a run resumed" if name.startswith(_REJECTED) else "stray: not from disttrain"
