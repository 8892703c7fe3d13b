"""Models a POSIX disk after a power cut, from the recorded operations of a writer.

Only synced data is durable: a file's bytes by syncing the file, a name in a folder by syncing the folder. Of everything
else any subset may survive, in any combination: none, half or all of a file's new bytes, zeros or garbage, and any
subset of a folder's changes, where a rename counts as two. That is more than a journaling file system allows.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from disttrain.checkpoint import Disk
from disttrain.checkpoint.storage.durable_files import DiskFile


@dataclass
class File:
    content: bytes = b""
    synced: int = 0

    def possible(self) -> list[bytes]:
        """Every content that the file may have after a cut."""
        sure, rest = self.content[: self.synced], self.content[self.synced :]
        if not rest:
            return [sure]
        garbage = random.Random(len(rest)).randbytes(len(rest))
        return [sure + new for new in (b"", rest[: len(rest) // 2], rest, bytes(len(rest)), garbage)]


Change = tuple[str, "File | Folder | None"]
"""A name, and what it means from now on; None for a name that is gone."""


@dataclass
class Folder:
    sure: dict[str, File | Folder] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)

    def entries(self) -> dict[str, File | Folder]:
        """The entries that a process sees."""
        return self.after([True] * len(self.changes))

    def after(self, kept: list[bool]) -> dict[str, File | Folder]:
        """The entries if only these changes reached the disk."""
        found = dict(self.sure)
        for keep, (name, node) in zip(kept, self.changes, strict=True):
            if keep and node is None:
                found.pop(name, None)
            elif keep and node is not None:
                found[name] = node
        return found

    def possible(self) -> Iterator[dict[str, File | Folder]]:
        """Every set of entries that the folder may have after a cut, each once."""
        seen: set[tuple[tuple[str, int], ...]] = set()
        for kept in product((False, True), repeat=len(self.changes)):
            entries = self.after(list(kept))
            key = tuple(sorted((name, id(node)) for name, node in entries.items()))
            if key not in seen:
                seen.add(key)
                yield entries


Tree = "bytes | dict[str, Tree]"


def count_states(node: File | Folder) -> int:
    """How many trees may exist in place of `node` after a cut."""
    if isinstance(node, File):
        return len(node.possible())
    total = 0
    for entries in node.possible():
        ways = 1
        for child in entries.values():
            ways *= count_states(child)
        total += ways
    return total


def every_state(node: File | Folder) -> Iterator[Tree]:
    """Yields each of these trees."""
    if isinstance(node, File):
        yield from node.possible()
        return
    for entries in node.possible():
        for children in product(*(list(every_state(child)) for child in entries.values())):
            yield dict(zip(entries, children, strict=True))


def some_state(node: File | Folder, chosen: random.Random) -> Tree:
    """A random one of these trees."""
    if isinstance(node, File):
        return chosen.choice(node.possible())
    entries = chosen.choice(list(node.possible()))
    return {name: some_state(child, chosen) for name, child in entries.items()}


def write_tree(tree: Tree, path: Path) -> None:
    """Make the files and folders of a tree."""
    if isinstance(tree, bytes):
        path.write_bytes(tree)
        return
    path.mkdir()
    for name, child in tree.items():
        write_tree(child, path / name)


@dataclass(frozen=True)
class Operation:
    """One operation. `content` is what a write wrote, `source` is what a rename renamed."""

    name: str
    path: Path
    content: bytes = b""
    source: Path | None = None


class Recorder:
    """The operations of all ranks' disks, in order."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.announced = 0
        self.lock = threading.RLock()

    def disk(self) -> RecordingDisk:
        return RecordingDisk(self)

    def announce(self, operation: str, path: Path) -> None:
        """The disk's hook. Every operation must also be recorded."""
        self.announced += 1

    def note(self, name: str, path: Path, content: bytes = b"", source: Path | None = None) -> None:
        self.operations.append(Operation(name, path, content, source))

    def mark(self, name: str) -> None:
        """Records a moment that is no operation."""
        self.operations.append(Operation(name, Path()))


class RecordingDisk(Disk):
    """A disk that performs every operation and records it."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(recorder.announce)
        self._recorder = recorder

    def make_folder(self, path: Path) -> None:
        with self._recorder.lock:
            for folder in [folder for folder in reversed(path.parents) if not folder.exists()]:
                self._recorder.note("make_parent", folder)
            super().make_folder(path)
            self._recorder.note("make_folder", path)

    def create(self, path: Path, size: int = 0) -> DiskFile:
        with self._recorder.lock:
            self._recorder.note("create", path)
            super().create(path, size).__exit__(None, None, None)  # as the disk does it; the file comes from here
            path.unlink()
            return RecordingFile(path, self._recorder)

    def sync_folder(self, path: Path) -> None:
        with self._recorder.lock:
            self._recorder.note("sync_folder", path)
            super().sync_folder(path)

    def rename(self, source: Path, target: Path) -> None:
        with self._recorder.lock:
            super().rename(source, target)
            self._recorder.note("rename", target, source=source)

    def remove_tree(self, path: Path) -> None:
        with self._recorder.lock:
            self._recorder.note("remove_tree", path)
            super().remove_tree(path)


class RecordingFile(DiskFile):
    def __init__(self, path: Path, recorder: Recorder) -> None:
        super().__init__(path, recorder.announce)
        self._at, self._recorder = path, recorder

    def write(self, content: memoryview | bytes) -> None:
        with self._recorder.lock:
            self._recorder.note("write", self._at, bytes(content))
            super().write(content)

    def sync(self) -> None:
        with self._recorder.lock:
            self._recorder.note("sync", self._at)
            super().sync()


class ModelDisk:
    """The state of a disk below `root`, which always exists, operation by operation."""

    def __init__(self, root: Path) -> None:
        self.root, self.top = root, Folder()

    def find(self, path: Path) -> File | Folder | None:
        node: File | Folder | None = self.top
        for part in path.relative_to(self.root).parts:
            node = node.entries().get(part) if isinstance(node, Folder) else None
        return node

    def change(self, path: Path, node: File | Folder | None) -> None:
        folder = self.find(path.parent)
        assert isinstance(folder, Folder), f"{path.parent} is no folder"
        folder.changes.append((path.name, node))

    def apply(self, operation: Operation) -> None:
        acts: dict[str, Callable[[Operation], None]] = {
            "make_parent": lambda one: self.change(one.path, Folder()),
            "make_folder": lambda one: self.change(one.path, Folder()),
            "create": lambda one: self.change(one.path, File()),
            "write": self._write,
            "sync": self._sync,
            "sync_folder": self._sync_folder,
            "rename": self._rename,
            "remove_tree": lambda one: self._remove(one.path),
        }
        acts[operation.name](operation)

    def _write(self, operation: Operation) -> None:
        file = self.find(operation.path)
        assert isinstance(file, File)
        file.content += operation.content

    def _sync(self, operation: Operation) -> None:
        file = self.find(operation.path)
        assert isinstance(file, File)
        file.synced = len(file.content)

    def _sync_folder(self, operation: Operation) -> None:
        if not operation.path.is_relative_to(self.root):
            return
        folder = self.find(operation.path)
        assert isinstance(folder, Folder)
        folder.sure, folder.changes = folder.entries(), []

    def _rename(self, operation: Operation) -> None:
        assert operation.source is not None
        node = self.find(operation.source)
        assert node is not None
        self.change(operation.path, node)
        self.change(operation.source, None)

    def _remove(self, path: Path) -> None:
        node = self.find(path)
        if node is None:
            return
        if isinstance(node, Folder):
            for name in node.entries():
                self._remove(path / name)
        self.change(path, None)
