"""What a PATH given to `disttrain ckpt` names, and what can be said of each checkpoint there.

Reads folders, manifests and, where asked, every chunk; writes nothing. Refuses with CheckpointError a path that names
no checkpoint; a checkpoint that is not whole is a finding, with every fault.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from disttrain.checkpoint import step_folder
from disttrain.checkpoint.chunks import open_chunks, read_manifest_bytes, refuse_unusable
from disttrain.checkpoint.folder import STAGING
from disttrain.checkpoint.manifest import MANIFEST, Manifest, decode_manifest
from disttrain.errors import CheckpointError, explain
from disttrain.report import RunFolder

_STEP = re.compile(r"step-(\d{8,})")
_ASIDE = "rejected-"


@dataclass(frozen=True)
class Survey:
    """One checkpoint's folder: `manifest` is None where it cannot be used, `faults` are in words, content unread."""

    path: Path
    manifest: Manifest | None
    faults: tuple[str, ...]
    refusal: CheckpointError | None = None

    @property
    def strays(self) -> list[str]:
        """Names in the folder that the manifest does not know; empty without one."""
        if self.manifest is None:
            return []
        known = {MANIFEST, *self.manifest.files}
        try:
            return sorted(one.name for one in self.path.iterdir() if one.name not in known)
        except FileNotFoundError:  # a run removed it meanwhile
            return []

    @property
    def step(self) -> int | None:
        """The step by the manifest, else by the folder's name."""
        match = _STEP.fullmatch(self.path.name)
        named = int(match.group(1)) if match else None
        return self.manifest.step if self.manifest else named

    @property
    def when(self) -> str | None:
        """When its manifest, the last file, was written (UTC): by the file system, a copy may have another time."""
        try:
            written = (self.path / MANIFEST).lstat().st_mtime
        except OSError:
            return None
        return datetime.fromtimestamp(written, UTC).isoformat(timespec="seconds")

    def required(self) -> Manifest:
        """The manifest; raises why there is none to use."""
        if self.manifest is None:
            raise self.refusal or CheckpointError(f"{self.path} has no manifest")
        return self.manifest

    def content_faults(self) -> Iterator[str]:
        """Read every chunk of every file; what does not fit its checksum. Holds one chunk."""
        files, chunk_bytes = (self.manifest.files, self.manifest.chunk_bytes) if self.manifest else ({}, 0)
        for name, info in files.items():
            try:
                with open_chunks(self.path / name, info, chunk_bytes) as reader:
                    found = (reader.check(chunk) for chunk in range(len(info.chunks)))
                    yield from filter(None, found)
            except CheckpointError as error:
                yield f"{name}: {finding(error)}"


@dataclass(frozen=True)
class Listing:
    """What PATH names: `checkpoints` oldest first, in `root`, the folder of a run's checkpoints (None: just the one).

    `others` are the names in `root` that are no checkpoints, each with what it is.
    """

    path: Path
    root: Path | None
    checkpoints: tuple[Path, ...]
    others: tuple[tuple[Path, str], ...] = ()


def find_checkpoints(path: str) -> Listing:
    """A run's folder, its `checkpoints/`, or one checkpoint. Local. CheckpointError for whatever is none of them."""
    if "://" in path:
        do = "copy the folder here first; resume and disttrain.load read the store itself"
        raise CheckpointError(explain(f"{path} is to be read.", "the address of a store, not a local folder", do))
    try:
        return _find(Path(path))
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
        if not found.faults or os.path.lexists(path):
            yield found


def survey(path: Path) -> Survey:
    """What the manifest and the files' sizes say; not a chunk is read. Local."""
    try:
        manifest = decode_manifest(read_manifest_bytes(path), where=str(path / MANIFEST))
    except CheckpointError as error:
        return Survey(path, None, (f"{MANIFEST}: {finding(error, advice=True)}",), error)
    faults = []
    if _STEP.fullmatch(path.name) and path.name != step_folder(manifest.step):
        faults.append(f"the folder of another step holds step {manifest.step}: rename it back")
    for name, info in manifest.files.items():
        try:
            refuse_unusable(path / name, info)
        except CheckpointError as error:
            faults.append(f"{name}: {finding(error)}")
    return Survey(path, manifest, tuple(faults))


def size_on_disk(path: Path) -> int:
    """Bytes of the regular files at and below a path, as far as they are still there. Local."""
    below = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    size = 0
    for file in [path, *below]:
        with suppress(FileNotFoundError):  # a run that goes on renames and removes
            found = file.lstat()
            size += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return size


def finding(error: CheckpointError, *, advice: bool = False) -> str:
    """What an `explain`ed error found, for a line that says itself what was asked; with `advice` what to do. Pure."""
    text = str(error)
    found, _, do = text.partition("\n  found: ")[2].rpartition("\n  to do: ")
    if not found:
        return text
    return f"{found} ({do})" if advice else found


def _find(path: Path) -> Listing:
    if not path.is_dir():
        read_manifest_bytes(path)  # raises, with what is there
    own = path.resolve().name
    if _STEP.fullmatch(own) or any(one.name == MANIFEST for one in path.iterdir()):
        return Listing(path, None, (path,))
    run = RunFolder(path)
    root = run.checkpoints if run.checkpoints.is_dir() else path
    inside = sorted(root.iterdir())
    steps = sorted((int(match.group(1)), one) for one in inside if (match := _STEP.fullmatch(one.name)))
    if steps:
        found = tuple(one for _, one in steps)
        return Listing(path, root, found, tuple((one, _what(one.name)) for one in inside if one not in found))
    if root != path or run.config.exists() or own == run.checkpoints.name:
        among = f"only {', '.join(one.name for one in inside[:5])}" if inside else "an empty folder"
        do = "let the run come to its first checkpoint (checkpoint.every); those in a store are to be copied here first"
        found_none = f"no step-NNNNNNNN in {root}: {among}"
        raise CheckpointError(explain(f"{path} is to hold checkpoints.", found_none, do))
    runs = [one.name for one in inside if RunFolder(one).checkpoints.is_dir()]
    if runs:
        found_runs = f"a folder of runs: {', '.join(runs[:8])}"
        raise CheckpointError(explain(f"{path} is to hold checkpoints.", found_runs, "name one of them"))
    read_manifest_bytes(path)  # raises, with whose folder it is
    raise CheckpointError(explain(f"{path} is to hold checkpoints.", "a folder that changes meanwhile", "try again"))


def _what(name: str) -> str:
    if name.startswith(STAGING):
        return "staging: being written or removed, or left by a killed process; the run's next start clears it"
    if name == ".lock":
        return "what a run locks the folder with"
    return "set aside: a resume found it not whole" if name.startswith(_ASIDE) else "stray: not disttrain's"
