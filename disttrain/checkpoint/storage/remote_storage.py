"""Stores checkpoints in an object store that fsspec reaches, such as S3.

A store has no folders and no rename, so the manifest is the commit. Every file is written under its final name into an
empty step folder, and the manifest is written last. Its appearance turns the files into a checkpoint. Removal deletes
the manifest first. A step folder without a manifest was left by a killed writer.

This is the only module that imports fsspec, and it does so only when an address is used. The driver reads credentials
and endpoints from the environment or its own files. Only one process may write to an address at a time. Nothing here
can enforce that.
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
from disttrain.checkpoint.storage.chunk_reader import ChunkReader
from disttrain.checkpoint.storage.durable_files import Before
from disttrain.checkpoint.storage.location import Address, step_of
from disttrain.checkpoint.storage.rejections import describe_foreign_folder, not_a_checkpoint
from disttrain.errors import CheckpointError, explain
from disttrain.logs import package_logger

_log = package_logger("checkpoint")

PART_BYTES = 16 * 2**20
"""Bytes sent in one request and held in memory twice meanwhile.

S3 accepts no part below 5 MiB except the last one.
"""
_MOST_PARTS = 10_000  # of one file: S3's limit (https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html)
_OURS = re.compile(r"rank-\d{5,}\.safetensors")
_INSTALL = {"s3": "s3", "s3a": "s3"}
"""The extras of this project by protocol. For other protocols, fsspec names the package."""


def address_fault(address: Address) -> tuple[str, str] | None:
    """Return the problem with an address itself and its fix, or None for a valid address. Touches no network."""
    protocol, separator, rest = address.url.partition("://")
    if "::" in address.url:
        return (
            "a chain of file systems",
            "use the address of the store alone; otherwise only its cache would be verified",
        )
    if not separator or not rest:
        return f"{address.url!r} does not name a bucket", "write PROTOCOL://BUCKET/PREFIX"
    try:
        import_module("fsspec").get_filesystem_class(protocol)
    except ModuleNotFoundError as error:
        return f"{error}", "pip install 'disttrain[s3]'"
    except ImportError as error:
        extra = _INSTALL.get(protocol)
        return f"{error}", f"pip install 'disttrain[{extra}]'" if extra else "install the package that fsspec names"
    except ValueError as error:
        near = get_close_matches(protocol, import_module("fsspec").available_protocols(), n=3)
        meant = f"did you mean {' or '.join(near)}?" if near else "fsspec knows s3, gs, abfs, sftp and others"
        return f"{error}", f"{meant}; a local folder is written without ://"
    return None


class RemoteStorage:
    """Implements `Storage` for addresses. Created by `of`."""

    def __init__(self, system: Any, before: Before) -> None:
        self._system, self._before = system, before

    @classmethod
    def of(cls, address: Address, before: Before) -> RemoteStorage:
        """Return the storage of an address. Raises CheckpointError for an address that cannot be used."""
        fault = address_fault(address)
        if fault:
            raise CheckpointError(explain(f"Cannot store checkpoints at {address}.", *fault))
        with _reaching(address):
            # No cache of listings: other ranks and other runs write at the same time.
            system, _ = import_module("fsspec").core.url_to_fs(str(address), use_listings_cache=False)
        return cls(system, before)

    # ------------------------------------------------------------------ listing

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
            raise _store_error(path, error) from error
        return int(found["size"]) if found["type"] == "file" else None

    def bytes_at(self, path: Address) -> int:
        try:
            with _reaching(path):
                return int(self._system.du(str(path)))
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise _store_error(path, error) from error

    def written_at(self, path: Address) -> datetime | None:
        try:
            with _reaching(path):
                found: datetime = self._system.modified(str(path))
        except FileNotFoundError:
            return None
        except OSError as error:
            if isinstance(error.__cause__, NotImplementedError):  # the driver does not report times
                return None
            raise _store_error(path, error) from error
        return found if found.tzinfo else found.replace(tzinfo=UTC)

    def _listing(self, folder: Address) -> dict[str, int | None] | None:
        """Return the names in a folder with the sizes of files, or None if the folder does not exist."""
        try:
            with _reaching(folder):
                entries = self._system.ls(str(folder), detail=True)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _store_error(folder, error) from error
        own = self._system._strip_protocol(str(folder)).strip("/")
        # A store may keep an empty object under the name of the folder, and a file is listed under its own name.
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
            raise not_a_checkpoint(folder, "no such folder")
        if MANIFEST not in names:
            raise not_a_checkpoint(folder, describe_foreign_folder(sorted(names)))
        try:
            with _reaching(folder / MANIFEST):
                return bytes(self._system.cat_file(str(folder / MANIFEST)))
        except OSError as error:
            raise not_a_checkpoint(folder, str(error.strerror)) from error

    def unusable(self, folder: Address, files: Mapping[str, FileInfo]) -> Iterator[tuple[str, CheckpointError]]:
        found = self._listing(folder) or {}
        for name, info in files.items():
            if name not in found:
                yield name, not_a_checkpoint(folder / name, "no such file")
            elif found[name] != info.size:
                yield name, not_a_checkpoint(folder / name, f"{found[name]} bytes instead of {info.size}")

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
        return target  # the caller has checked that the name is free

    def create(self, path: Address, size: int) -> Upload:
        self._before("create", path)
        return Upload(self._system, path, size, self._before)

    def sync_folder(self, folder: Address) -> None:
        return  # a store acknowledges a file only when its name is durable too

    def commit(self, staging: Address, target: Address) -> None:
        return  # writing the manifest last was the commit

    def discard(self, staging: Address) -> None:
        try:
            self.remove([staging])
        except CheckpointError as error:
            _log.warning("%s was not removed: %s", staging, error)

    def free_bytes(self, folder: Address) -> None:
        return None

    # ------------------------------------------------------------------ retention

    def reject_unwritable(self, root: Address) -> None:
        probe = root / f"probe-{secrets.token_hex(4)}"
        try:
            self._before("probe", probe)
            with _reaching(probe):
                self._system.pipe_file(str(probe), b"may be removed")
                self._system.rm_file(str(probe))
        except OSError as error:
            raise _store_error(root, error) from error

    def unfinished(self, root: Address) -> list[Address]:
        found = []
        for folder in (root / name for name in self.names(root) if step_of(name) is not None):
            names = self._listing(folder) or {}
            if MANIFEST in names:
                continue
            if all(_OURS.fullmatch(name) for name in names):
                found.append(folder)
            else:
                _log.warning(
                    "%s is not a checkpoint and contains files that disttrain does not write. It is not removed.",
                    folder,
                )
        return found

    def remove(self, paths: Sequence[Address]) -> None:
        for path in paths:
            self._before("remove", path)
            try:
                with _reaching(path), suppress(FileNotFoundError):
                    self._drop(path / MANIFEST)
                    self._system.rm(str(path), recursive=True)
            except OSError as error:
                raise _store_error(path, error) from error

    def _drop(self, path: Address) -> None:
        """Remove a file if it exists."""
        with suppress(FileNotFoundError):
            self._system.rm_file(str(path))

    def move(self, path: Address, target: Address) -> None:
        self._before("move", path)
        try:
            with _reaching(path):
                own = self._system._strip_protocol(str(path))
                names = [name.removeprefix(own).strip("/") for name in self._system.find(str(path))]
                for name in sorted(names, key=lambda name: name == MANIFEST):  # the store copies; no bytes pass here
                    self._system.cp_file(str(path / name), str(target / name))
        except OSError as error:
            raise _store_error(path, error) from error
        self.remove([path])


class Upload:
    """A file that is being uploaded. It appears when `sync` returns. Without `sync`, the upload is discarded.

    A file that fits into one part is sent in one request. A manifest therefore appears complete, even in a store that
    shows partial uploads.
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
            _log.warning("The partial upload of %s could not be discarded: %s", self._path, failed.strerror)

    def _abandon(self) -> None:
        """Discard the parts. A store that shows partial uploads keeps a file, which is removed with its folder."""
        if isinstance(self._sent, import_module("fsspec.spec").AbstractBufferedFile):
            self._sent.closed = True  # first: otherwise its finalizer would close it, which completes the upload
            self._sent.discard()
        else:
            self._sent.close()


def _store_error(address: Address, error: OSError) -> CheckpointError:
    fix = "check that the bucket exists and is reachable, and that the credentials allow list, get, put and delete"
    return CheckpointError(
        explain(f"Cannot store checkpoints at {address}.", f"the store failed: {error.strerror}", fix)
    )


@contextmanager
def _reaching(address: Address) -> Iterator[None]:
    """Turn any error of a driver into an OSError with a number, a message and the location."""
    try:
        yield
    except Exception as error:
        kinds = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES, FileExistsError: errno.EEXIST}
        number = next((n for kind, n in kinds.items() if isinstance(error, kind)), getattr(error, "errno", None))
        words = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise OSError(number or errno.EIO, words, str(address)) from error
