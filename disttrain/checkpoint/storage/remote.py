"""Checkpoints in a store that fsspec reaches (S3 and its like): no folders, no rename, so the manifest is the commit.

Every file is written under its final name into a step's folder where nothing lies, the manifest after all others: its
appearance makes a checkpoint of them. Removing goes the other way round. A step's folder without one is what a killed
writer left. The only file that imports fsspec, and not before an address is used. Credentials and endpoints are the
driver's own affair (environment or its files); no process but one may write to an address at a time, and nothing here
can see to that.
"""

from __future__ import annotations

import errno
import io
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from difflib import get_close_matches
from importlib import import_module
from types import TracebackType
from typing import Any

from disttrain.checkpoint.form.manifest import MANIFEST, FileInfo
from disttrain.checkpoint.read.chunks import ChunkReader, unusable, whose_folder
from disttrain.checkpoint.storage.address import Address, step_of
from disttrain.checkpoint.storage.disk import Before
from disttrain.errors import CheckpointError, explain
from disttrain.logs import room_logger

_log = room_logger("checkpoint")

PART_BYTES = 16 * 2**20
"""What is sent at once, and held twice meanwhile. S3 takes no part below 5 MiB but the last."""
_MOST_PARTS = 10_000  # of one file: S3's limit (https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html)
_OURS = re.compile(r"rank-\d{5,}\.safetensors")
_INSTALL = {"s3": "s3", "s3a": "s3"}
"""Protocols for which this project has an extra; for others fsspec names the package."""


def address_fault(address: Address) -> tuple[str, str] | None:
    """What is wrong with an address whatever lies there, and what to do; None for a good one. Touches no network."""
    protocol, separator, rest = address.url.partition("://")
    if "::" in address.url:
        return "a chain of file systems", "name the store alone: a cache in front of it would be what is verified"
    if not separator or not rest:
        return f"{address.url!r}, which names no place", "write PROTOCOL://BUCKET/PREFIX"
    try:
        import_module("fsspec").get_filesystem_class(protocol)
    except ModuleNotFoundError as error:
        return f"{error}", "pip install 'disttrain[s3]'"
    except ImportError as error:
        extra = _INSTALL.get(protocol)
        return f"{error}", f"pip install 'disttrain[{extra}]'" if extra else "install the package that it names"
    except ValueError as error:
        near = get_close_matches(protocol, import_module("fsspec").available_protocols(), n=3)
        meant = f"did you mean {' or '.join(near)}?" if near else "fsspec's are s3, gs, abfs, sftp and others"
        return f"{error}", f"{meant}; a folder is named without ://"
    return None


class RemoteStorage:
    """`Storage` over addresses; see there. Made by `of`."""

    def __init__(self, system: Any, before: Before) -> None:
        self._system, self._before = system, before

    @classmethod
    def of(cls, address: Address, before: Before) -> RemoteStorage:
        """The store in which an address lies. CheckpointError for one that cannot be used."""
        fault = address_fault(address)
        if fault:
            raise CheckpointError(explain(f"{address} is to hold checkpoints.", *fault))
        with _reaching(address):
            # What was listed a moment ago is not what is there: other ranks and other runs write too.
            system, _ = import_module("fsspec").core.url_to_fs(str(address), use_listings_cache=False)
        return cls(system, before)

    # ------------------------------------------------------------------ what is there

    def names(self, folder: Address) -> list[str]:
        return sorted(self._listing(folder) or ())

    def taken(self, path: Address) -> bool:
        return self._listing(path) is not None

    def size(self, path: Address) -> int | None:
        try:
            with _reaching(path):
                found = self._system.info(str(path))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _refused(path, error) from error
        return int(found["size"]) if found["type"] == "file" else None

    def bytes_at(self, path: Address) -> int:
        try:
            with _reaching(path):
                return int(self._system.du(str(path)))
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise _refused(path, error) from error

    def written_at(self, path: Address) -> datetime | None:
        try:
            with _reaching(path):
                found: datetime = self._system.modified(str(path))
        except FileNotFoundError:
            return None
        except OSError as error:
            if isinstance(error.__cause__, NotImplementedError):  # a driver that does not say
                return None
            raise _refused(path, error) from error
        return found if found.tzinfo else found.replace(tzinfo=UTC)

    def _listing(self, folder: Address) -> dict[str, int | None] | None:
        """What lies in a folder, with sizes of files; None where there is nothing of that name."""
        try:
            with _reaching(folder):
                entries = self._system.ls(str(folder), detail=True)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _refused(folder, error) from error
        own = self._system._strip_protocol(str(folder)).strip("/")
        # A store may keep an empty object in a folder's name; and a file lists as itself.
        found = [(one["name"].strip("/"), one) for one in entries]
        return {
            path.rpartition("/")[2]: int(one["size"]) if one["type"] == "file" else None
            for path, one in found
            if path != own
        }

    # ------------------------------------------------------------------ reading

    def read_manifest(self, folder: Address) -> bytes:
        names = self._listing(folder)
        if names is None:
            raise unusable(folder, "no such folder")
        if MANIFEST not in names:
            raise unusable(folder, whose_folder(sorted(names)))
        try:
            with _reaching(folder / MANIFEST):
                return bytes(self._system.cat_file(str(folder / MANIFEST)))
        except OSError as error:
            raise unusable(folder, str(error.strerror)) from error

    def unusable(self, folder: Address, files: Mapping[str, FileInfo]) -> Iterator[tuple[str, CheckpointError]]:
        found = self._listing(folder) or {}
        for name, info in files.items():
            if name not in found:
                yield name, unusable(folder / name, "no such file")
            elif found[name] != info.size:
                yield name, unusable(folder / name, f"{found[name]} bytes instead of {info.size}")

    @contextmanager
    def open_chunks(self, path: Address, info: FileInfo, chunk_bytes: int) -> Iterator[ChunkReader]:
        def fill(view: memoryview, at: int) -> int:
            with _reaching(path):
                content = self._system.cat_file(str(path), start=at, end=at + len(view))
            view[: len(content)] = content
            return len(content)

        yield ChunkReader(fill, path.name, info, chunk_bytes)

    # ------------------------------------------------------------------ writing one checkpoint

    def begin(self, target: Address) -> Address:
        return target  # nothing lies there, or nobody would begin

    def create(self, path: Address, size: int) -> Upload:
        self._before("create", path)
        return Upload(self._system, path, size, self._before)

    def sync_folder(self, folder: Address) -> None:
        return  # what a store has acknowledged is there, name and all

    def commit(self, staging: Address, target: Address) -> None:
        return  # the manifest was written last: it was the commit

    def discard(self, staging: Address) -> None:
        try:
            self.remove([staging])
        except CheckpointError as error:
            _log.warning("%s stays: %s", staging, error)

    def free_bytes(self, folder: Address) -> None:
        return None

    # ------------------------------------------------------------------ keeping

    def refuse_unwritable(self, root: Address) -> None:
        probe = root / f"probe-{secrets.token_hex(4)}"
        try:
            self._before("probe", probe)
            with _reaching(probe):
                self._system.pipe_file(str(probe), b"may be removed")
                self._system.rm_file(str(probe))
        except OSError as error:
            raise _refused(root, error) from error

    def unfinished(self, root: Address) -> list[Address]:
        found = []
        for folder in (root / name for name in self.names(root) if step_of(name) is not None):
            names = self._listing(folder) or {}
            if MANIFEST in names:
                continue
            if all(_OURS.fullmatch(name) for name in names):
                found.append(folder)
            else:
                _log.warning("%s is no checkpoint and holds what disttrain does not write: left alone", folder)
        return found

    def remove(self, paths: Sequence[Address]) -> None:
        for path in paths:
            self._before("remove", path)
            try:
                with _reaching(path), suppress(FileNotFoundError):
                    self._drop(path / MANIFEST)
                    self._system.rm(str(path), recursive=True)
            except OSError as error:
                raise _refused(path, error) from error

    def _drop(self, path: Address) -> None:
        """Remove one file, if it is there."""
        with suppress(FileNotFoundError):
            self._system.rm_file(str(path))

    def move(self, path: Address, target: Address) -> None:
        self._before("move", path)
        try:
            with _reaching(path):
                own = self._system._strip_protocol(str(path))
                places = [place.removeprefix(own).strip("/") for place in self._system.find(str(path))]
                for place in sorted(places, key=lambda place: place == MANIFEST):  # by the store, not through here
                    self._system.cp_file(str(path / place), str(target / place))
        except OSError as error:
            raise _refused(path, error) from error
        self.remove([path])


class Upload:
    """One file on its way; it appears when `sync` returns, and left without it is thrown away.

    What fits into one part is put at once, so that a manifest appears whole even where a store shows files half sent.
    """

    def __init__(self, system: Any, path: Address, size: int, before: Before) -> None:
        self._system, self._path, self._before = system, path, before
        self._at_once = io.BytesIO() if size <= PART_BYTES else None
        self._sent: Any = None
        if self._at_once is None:
            with _reaching(path):
                self._sent = system.open(str(path), "wb", block_size=max(PART_BYTES, -(-size // _MOST_PARTS)))

    def write(self, content: memoryview | bytes) -> None:
        self._before("write", self._path)
        with _reaching(self._path):
            (self._sent if self._at_once is None else self._at_once).write(content)

    def sync(self) -> None:
        self._before("sync", self._path)
        with _reaching(self._path):
            if self._at_once is not None:
                self._system.pipe_file(str(self._path), self._at_once.getvalue())
            else:
                self._sent.close()
                self._sent = None

    def __enter__(self) -> Upload:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sent is None:
            return
        try:
            with _reaching(self._path):
                self._abandon()
        except OSError as failed:
            _log.warning("what was sent of %s could not be thrown away: %s", self._path, failed.strerror)

    def _abandon(self) -> None:
        """Drop the parts; a store that shows files half sent has one, which goes with its folder."""
        if isinstance(self._sent, import_module("fsspec.spec").AbstractBufferedFile):
            self._sent.closed = True  # first: closing, as its finalizer would, completes the upload
            self._sent.discard()
        else:
            self._sent.close()


def _refused(place: Address, error: OSError) -> CheckpointError:
    do = "see that the bucket exists and is reachable, and that the credentials may list, get, put and delete there"
    return CheckpointError(explain(f"{place} is to hold checkpoints.", f"the store refused: {error.strerror}", do))


@contextmanager
def _reaching(place: Address) -> Iterator[None]:
    """Whatever a driver raises, as an OSError with number, words and place."""
    try:
        yield
    except Exception as error:
        kinds = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES, FileExistsError: errno.EEXIST}
        number = next((n for kind, n in kinds.items() if isinstance(error, kind)), getattr(error, "errno", None))
        words = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise OSError(number or errno.EIO, words, str(place)) from error
