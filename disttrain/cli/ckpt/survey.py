"""What a PATH given to `disttrain ckpt` names, and what can be said of each checkpoint there.

Reads folders, manifests and, where asked, every chunk; writes nothing. Refuses with CheckpointError a path that names
no checkpoint; a checkpoint that is not whole is a finding, with every fault.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC
from itertools import islice
from pathlib import Path

from disttrain.checkpoint import Location, Manifest, parse_location, step_folder, step_of, storage_of
from disttrain.checkpoint.form.manifest import MANIFEST, decode_manifest
from disttrain.engine.checkpointing.locate import checkpoints_in
from disttrain.errors import CheckpointError, explain
from disttrain.report import RunFolder

_ASIDE = "rejected-"
_UNFINISHED = "staging: being written or removed, or left by a killed process; the run's next start clears it"
_LOOKED_INTO = 100
"""Names in a folder of runs: each costs a store a listing."""


@dataclass(frozen=True)
class Survey:
    """One checkpoint's folder: `manifest` is None where it cannot be used, `faults` are in words, content unread.

    `unusable` are the files that are not there with their sizes.
    """

    path: Location
    manifest: Manifest | None
    faults: tuple[str, ...]
    unusable: frozenset[str] = frozenset()
    refusal: CheckpointError | None = None

    @property
    def strays(self) -> list[str]:
        """Names in the folder that the manifest does not know; empty without one."""
        if self.manifest is None:
            return []
        known = {MANIFEST, *self.manifest.files}
        try:
            return [name for name in storage_of(self.path).names(self.path) if name not in known]
        except FileNotFoundError:  # a run removed it meanwhile
            return []

    @property
    def step(self) -> int | None:
        """The step by the manifest, else by the folder's name."""
        return self.manifest.step if self.manifest else step_of(self.path.name)

    @property
    def when(self) -> str | None:
        """When its manifest, the last file, was written (UTC): by the storage, a copy may have another time."""
        written = storage_of(self.path).written_at(self.path / MANIFEST)
        return written.astimezone(UTC).isoformat(timespec="seconds") if written else None

    def required(self) -> Manifest:
        """The manifest; raises why there is none to use."""
        if self.manifest is None:
            raise self.refusal or CheckpointError(f"{self.path} has no manifest")
        return self.manifest

    def content_faults(self) -> Iterator[str]:
        """Read every chunk of every file that can be used; what does not fit its checksum. Holds one chunk."""
        files, chunk_bytes = (self.manifest.files, self.manifest.chunk_bytes) if self.manifest else ({}, 0)
        for name, info in files.items():
            if name in self.unusable:
                continue
            try:
                with storage_of(self.path).open_chunks(self.path / name, info, chunk_bytes) as reader:
                    found = (reader.check(chunk) for chunk in range(len(info.chunks)))
                    yield from filter(None, found)
            except CheckpointError as error:
                yield f"{name}: {finding(error)}"


@dataclass(frozen=True)
class Listing:
    """What PATH names: `checkpoints` oldest first, in `root`, the folder of a run's checkpoints (None: just the one).

    `others` are the names in `root` that are no checkpoints, each with what it is.
    """

    path: Location
    root: Location | None
    checkpoints: tuple[Location, ...]
    others: tuple[tuple[Location, str], ...] = ()


def find_checkpoints(path: str) -> Listing:
    """A run's folder, its `checkpoints/` or storage, or one checkpoint. Local. CheckpointError for all else."""
    try:
        return _find(parse_location(path))
    except OSError as error:
        do = "name a run's folder DIR/NAME or a checkpoint in it that you may read"
        raise CheckpointError(explain(f"{path} is to be read.", f"{error.filename}: {error.strerror}", do)) from error


def find_one(path: str) -> Survey:
    """The checkpoint that PATH names, or the newest one there whose files are all there. Local. CheckpointError."""
    listing = find_checkpoints(path)
    found = []
    for one in surveys(listing, newest_first=True):
        if listing.root is None or not one.faults:
            one.required()
            return one
        found.append(f"{one.path.name}: {one.faults[0]}")
    do = "name one of its folders, or mend it"
    raise CheckpointError(explain(f"{path} is to have a whole checkpoint.", "; ".join(found[:3]), do))


def surveys(listing: Listing, *, newest_first: bool = False) -> Iterator[Survey]:
    """A survey of each checkpoint; those that a run removes meanwhile are passed over. Local."""
    for path in reversed(listing.checkpoints) if newest_first else listing.checkpoints:
        found = survey(path)
        if not found.faults or storage_of(path).taken(path):
            yield found


def survey(path: Location) -> Survey:
    """What the manifest and the files' sizes say; not a chunk is read. Local."""
    storage = storage_of(path)
    try:
        manifest = decode_manifest(storage.read_manifest(path), where=str(path / MANIFEST))
    except CheckpointError as error:
        return Survey(path, None, (f"{MANIFEST}: {finding(error, advice=True)}",), refusal=error)
    faults = []
    if step_of(path.name) is not None and path.name != step_folder(manifest.step):
        faults.append(f"the folder of another step holds step {manifest.step}: rename it back")
    unusable = dict(storage.unusable(path, manifest.files))
    faults += [f"{name}: {finding(error)}" for name, error in unusable.items()]
    return Survey(path, manifest, tuple(faults), frozenset(unusable))


def finding(error: CheckpointError, *, advice: bool = False) -> str:
    """What an `explain`ed error found, for a line that says itself what was asked; with `advice` what to do. Pure."""
    text = str(error)
    found, _, do = text.partition("\n  problem: ")[2].rpartition("\n  fix: ")
    if not found:
        return text
    return f"{found} ({do})" if advice else found


def _find(path: Location) -> Listing:
    storage = storage_of(path)
    if not storage.taken(path) or (isinstance(path, Path) and not path.is_dir()):
        storage.read_manifest(path)  # raises, with what is there
    if step_of(path.resolve().name) is not None or MANIFEST in storage.names(path):
        return Listing(path, None, (path,))
    root = checkpoints_in(path) or path
    inside = [root / name for name in storage_of(root).names(root)]
    unfinished = storage_of(root).unfinished(root)  # in a store a save under way has a checkpoint's name
    steps = sorted((step, one) for one in inside if (step := step_of(one.name)) is not None and one not in unfinished)
    if steps:
        found = tuple(one for _, one in steps)
        others = [(one, _UNFINISHED if one in unfinished else _what(one.name)) for one in inside if one not in found]
        return Listing(path, root, found, tuple(others))
    _refuse_run(path, root, [one.name for one in inside])
    storage.read_manifest(path)  # raises, with whose folder it is
    raise CheckpointError(explain(f"{path} is to hold checkpoints.", "a folder that changes meanwhile", "try again"))


def _refuse_run(path: Location, root: Location, inside: Sequence[str]) -> None:
    """CheckpointError where it is a run that has saved nothing yet, or a folder of runs."""
    asked = f"{path} is to hold checkpoints."
    run = RunFolder(path) if isinstance(path, Path) else None
    if root != path or (run and (run.config.exists() or path.resolve().name == run.checkpoints.name)):
        among = f"only {', '.join(inside[:5])}" if inside else "an empty folder"
        do = "let the run come to its first checkpoint (checkpoint.every)"
        raise CheckpointError(explain(asked, f"no step-NNNNNNNN in {root}: {among}", do))
    among_them = (name for name in inside[:_LOOKED_INTO] if checkpoints_in(path / name) is not None)
    runs = list(islice(among_them, 8))
    if runs:
        raise CheckpointError(explain(asked, f"a folder of runs: {', '.join(runs)}", "name one of them"))


def _what(name: str) -> str:
    if name == ".lock":
        return "what a run locks the folder with"
    return "set aside: a resume found it not whole" if name.startswith(_ASIDE) else "stray: not disttrain's"
