"""Artifacts of stages on disk, each named by a hash of everything it depends on.

A folder `<root>/<model>/<stage>-<first 12 of the key>` is an artifact only if it holds `manifest.json`. A stage writes
into a temporary folder next to it, the manifest last, which is then renamed. So a process killed at any moment leaves
either no artifact or a complete one.
"""

import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from accel import progress
from accel.errors import AccelError
from accel.runtime.layout import MANIFEST
from accel.system.hashing import file_hash, make_key
from accel.system.host_memory import PeakMemory

logger = logging.getLogger(__name__)

UNREADABLE = (ValueError, TypeError, KeyError, AttributeError)  # raised by parsing a damaged manifest
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # full disk, quota, `ulimit -f`
TEMPORARY = ".tmp"  # before the process's id in the name of a temporary folder
MB = 1e6
FULL = 2**20  # bytes: a disk with less free space counts as full


class DamagedArtifactError(Exception):
    """A file of an artifact is missing or differs from its manifest."""


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 of a file."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """Return the record of an existing file."""
        return cls(path.stat().st_size, file_hash(path))


@dataclass(frozen=True)
class Manifest:
    """Description of an artifact.

    Attributes:
        stage: Stage that made it.
        key: SHA-256 of everything it depends on, as hex.
        upstream: Stage -> key of the artifacts that it was made from.
        config: Section of the config -> its values.
        packages: Package -> version.
        seconds: Wall time of the stage.
        peak_memory: Largest resident memory of the process and its children during the stage, in bytes.
        added_memory: The same, less the memory at the stage's start, in bytes.
        summary: Summary that the stage returned, as JSON values.
        files: Relative path -> size and hash of every file.
    """

    stage: str
    key: str
    upstream: Mapping[str, str]
    config: Mapping[str, Any]
    packages: Mapping[str, str]
    seconds: float
    peak_memory: int
    added_memory: int
    summary: Mapping[str, Any]
    files: Mapping[str, FileRecord]

    def dump(self) -> str:
        """Return the manifest as JSON, with a hash of its list of files."""
        values = asdict(self)
        return json.dumps({**values, "files_sha256": make_key(files=values["files"])}, indent=1)

    @classmethod
    def parse(cls, text: str) -> "Manifest":
        """Return the manifest that `dump` made `text` from.

        Raises:
            Exception: One of `UNREADABLE`, if `text` isn't a manifest.
        """
        values = json.loads(text)
        if values.pop("files_sha256") != make_key(files=values["files"]):
            raise ValueError("the list of files was edited")
        files = {name: FileRecord(**record) for name, record in values.pop("files").items()}
        return cls(**values, files=files)


@dataclass(frozen=True)
class Artifact:
    """Result of a finished stage: a folder and the manifest that describes it."""

    folder: Path
    manifest: Manifest

    @property
    def key(self) -> str:
        """Return the manifest's key."""
        return self.manifest.key

    @property
    def summary(self) -> Mapping[str, Any]:
        """Return the manifest's summary."""
        return self.manifest.summary

    def check(self) -> None:
        """Compare every file with the manifest; each is hashed once per process.

        Raises:
            DamagedArtifactError: If a file is missing or differs.
        """
        for name, record in self.manifest.files.items():
            path = self.folder / name
            if not path.is_file():
                raise DamagedArtifactError(f"{path} is missing")
            if path.stat().st_size != record.size or file_hash(path) != record.sha256:
                raise DamagedArtifactError(f"{path} differs from its manifest")


def folder_files(folder: Path) -> dict[str, FileRecord]:
    """Return the size and hash of every file below `folder` but the manifest, by relative path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    with ThreadPoolExecutor() as pool:  # a model's files may have gigabytes
        records = list(pool.map(FileRecord.of, paths))
    return {path.relative_to(folder).as_posix(): record for path, record in zip(paths, records, strict=True)}


def content_hash(path: Path) -> str:
    """Return the SHA-256 of a file, or of the names and contents of all files below a folder, as hex."""
    if not path.is_dir():
        return file_hash(path)
    return make_key(**{name: record.sha256 for name, record in folder_files(path).items()})


def _space_error(error: BaseException | None) -> int | None:
    """Return the error number of a full disk, quota or file-size limit among `error` and its causes, else None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return error.errno
        error = error.__cause__ or error.__context__
    return None


def _size(paths: Iterable[Path]) -> int:
    """Return the sum of the sizes of those of `paths` that are files, in bytes."""
    return sum(path.stat().st_size for path in paths if path.is_file())


class Store:
    """Artifacts of one model below one root folder."""

    def __init__(self, root: Path, model: str) -> None:
        self.folder = root / model

    def path(self, stage: str, key: str) -> Path:
        """Return the folder of an artifact, which need not exist."""
        return self.folder / f"{stage}-{key[:12]}"

    def find(self, stage: str, key: str) -> Artifact | None:
        """Return the artifact, or None if it was never finished.

        A damaged artifact is removed with a warning, and None returned.

        Raises:
            AccelError: If the path of the store's folder is a file.
        """
        folder = self.path(stage, key)
        try:
            artifact = self._read(folder, key)
            artifact.check()
        except FileNotFoundError:
            return None
        except (DamagedArtifactError, *UNREADABLE) as error:
            with self._locked(folder):
                rebuilt = self._read_or_none(folder, key, check=True)
                if rebuilt is not None:
                    return rebuilt  # by another run, while this one waited for the lock
                logger.warning(f"damaged artifact: {error}; it will be rebuilt")
                shutil.rmtree(folder, ignore_errors=True)
            return None
        return artifact

    def _read_or_none(self, folder: Path, key: str, check: bool) -> Artifact | None:
        """Return the artifact in `folder`, or None if it is unfinished or damaged; `check` compares its files, too."""
        try:
            artifact = self._read(folder, key)
            if check:
                artifact.check()
        except (FileNotFoundError, DamagedArtifactError, *UNREADABLE):
            return None
        return artifact

    def peek(self, stage: str, key: str) -> Artifact | None:
        """Return the artifact without comparing its files; None if it is unfinished or its manifest damaged."""
        return self._read_or_none(self.path(stage, key), key, check=False)

    def _read(self, folder: Path, key: str) -> Artifact:
        """Read the manifest in `folder`. Raise `DamagedArtifactError` if it has another key."""
        try:
            artifact = Artifact(folder, Manifest.parse((folder / MANIFEST).read_text()))
        except NotADirectoryError as error:
            raise AccelError(f"can't write to the artifact folder {self.folder}: {error.strerror}") from error
        if artifact.key != key:
            raise DamagedArtifactError(f"{folder / MANIFEST} belongs to another key")
        return artifact

    def build(
        self,
        stage: str,
        key: str,
        make: Callable[[Path], Mapping[str, Any]],
        *,
        upstream: Mapping[str, str],
        config: Mapping[str, Any],
        packages: Mapping[str, str],
    ) -> Artifact:
        """Return the artifact, running `make` if it doesn't exist.

        Of several processes that build the same artifact, one runs `make` while the others wait and then return the
        artifact that it made.

        Args:
            stage: Name of the stage.
            key: Key of the artifact.
            make: Function that writes the files into the folder it is given, and returns the summary.
            upstream: Stage -> key of the artifacts that `make` reads; for the manifest.
            config: Values that `make` depends on; for the manifest.
            packages: Package -> version; for the manifest.

        Raises:
            AccelError: If the folder can't be written or the disk is full.
        """
        folder = self.path(stage, key)
        with self._locked(folder):
            existing = self.find(stage, key)
            if existing is not None:
                return existing
            temporary = self._make_temporary(folder)
            try:
                started = time.perf_counter()
                with PeakMemory() as memory:
                    summary = make(temporary)
                manifest = Manifest(
                    stage=stage,
                    key=key,
                    upstream=upstream,
                    config=config,
                    packages=packages,
                    seconds=time.perf_counter() - started,
                    peak_memory=memory.peak,
                    added_memory=memory.added,
                    summary=summary,
                    files=folder_files(temporary),
                )
                (temporary / MANIFEST).write_text(manifest.dump())
                temporary.rename(folder)
            except BaseException as error:
                no_space = self._space_message(error, stage, temporary, upstream)  # before the removal frees space
                shutil.rmtree(temporary, ignore_errors=True)
                if no_space is not None:
                    raise AccelError(no_space) from error
                raise
            return Artifact(folder, manifest)

    def _make_temporary(self, folder: Path) -> Path:
        """Return a new folder to make the artifact `folder` in, after removing what killed runs left of both."""
        shutil.rmtree(folder, ignore_errors=True)  # a folder without a manifest is no artifact
        for stale in self.folder.glob(f"{folder.name}{TEMPORARY}*"):
            shutil.rmtree(stale, ignore_errors=True)
        temporary = folder.with_name(f"{folder.name}{TEMPORARY}{os.getpid()}")
        temporary.mkdir()
        return temporary

    def clear_leftovers(self) -> None:
        """Remove the temporary folders of runs that were killed, of all models and stages.

        A run holds its artifact's lock until its temporary folder is renamed or removed.
        """
        for temporary in self.folder.parent.glob(f"*/*{TEMPORARY}*"):
            lock = FileLock(f"{str(temporary).rpartition(TEMPORARY)[0]}.lock", is_singleton=True)
            with suppress(Timeout, OSError), lock.acquire(timeout=0):
                shutil.rmtree(temporary, ignore_errors=True)

    def _space_message(
        self, error: BaseException, stage: str, temporary: Path, upstream: Mapping[str, str]
    ) -> str | None:
        """Return the message for a file that didn't fit: the file, the stage, and the space it needs; else None."""
        reason = _space_error(error)
        free = shutil.disk_usage(self.folder).free
        if reason is None and free >= FULL:  # libraries report a full disk by exceptions of their own
            return None
        files = sorted((path for path in temporary.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime)
        written = _size(files)
        inputs = _size(path for name, key in upstream.items() for path in self.path(name, key).rglob("*"))
        name = files[-1].relative_to(temporary) if files else Path()
        return (
            f"{os.strerror(reason or errno.ENOSPC)}: stage {stage} can't write {temporary / name}; its partial files "
            f"were removed. {written / MB:.1f} MB were written and {free / MB:.1f} MB were free; the stage needs about "
            f"{max(written, inputs) / MB:.1f} MB or more. Free some space, raise the limit on the size of files "
            "(ulimit -f), or set artifacts=FOLDER to a folder on another disk"
        )

    @contextmanager
    def _locked(self, folder: Path) -> Iterator[None]:
        """Hold a file lock for one artifact. The operating system releases it if the process is killed.

        A process that already holds the lock may take it again.
        """
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{folder}.lock", is_singleton=True)
            try:
                lock.acquire(timeout=0.2)
            except Timeout:
                progress.note(f"waiting for another run, which is making {folder.name}")
                lock.acquire()
        except OSError as error:
            raise AccelError(f"can't write to the artifact folder {self.folder}: {error.strerror or error}") from error
        try:
            yield
        finally:
            lock.release()
