"""Artifacts: what a stage leaves on disk, named by a hash of everything that made it.

A folder `<root>/<model>/<stage>-<first 12 of the key>` counts as an artifact only if it holds `manifest.json`, which is
written last, in a temporary sibling that is then renamed. So a kill at any moment leaves either nothing or the whole.
"""

import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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

UNREADABLE = (ValueError, TypeError, KeyError, AttributeError)  # what parsing a damaged manifest raises
FULL = 2**20  # bytes: a disk with less left is full


class DamagedArtifactError(Exception):
    """A file of an artifact is missing or differs from its manifest."""


@dataclass(frozen=True)
class FileRecord:
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What made an artifact, what it cost, and the hash of every file in it. Times in seconds, sizes in bytes."""

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
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def parse(cls, text: str) -> "Manifest":
        """The manifest that `dump` wrote. Raises `ValueError` or `TypeError` when it isn't one."""
        values = json.loads(text)
        files = {name: FileRecord(**record) for name, record in values.pop("files").items()}
        return cls(**values, files=files)


@dataclass(frozen=True)
class Artifact:
    """A finished stage: a folder and the manifest that describes it."""

    folder: Path
    manifest: Manifest

    @property
    def key(self) -> str:
        return self.manifest.key

    @property
    def summary(self) -> Mapping[str, Any]:
        return self.manifest.summary

    def check(self) -> None:
        """Hash every file, once per process. Raises `Damaged` naming the first that differs."""
        for name, record in self.manifest.files.items():
            path = self.folder / name
            if not path.is_file():
                raise DamagedArtifactError(f"{path} is missing")
            if path.stat().st_size != record.size or file_hash(path) != record.sha256:
                raise DamagedArtifactError(f"{path} differs from its manifest")


def folder_files(folder: Path) -> dict[str, FileRecord]:
    """Every file below `folder` but the manifest, by its relative path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    with ThreadPoolExecutor() as pool:  # a model's files may hold gigabytes
        hashes = list(pool.map(file_hash, paths))
    return {
        str(path.relative_to(folder)): FileRecord(path.stat().st_size, found)
        for path, found in zip(paths, hashes, strict=True)
    }


def content_hash(path: Path) -> str:
    """SHA-256 of a file, or of all files below a folder and their names, as hex."""
    if not path.is_dir():
        return file_hash(path)
    return make_key(**{name: record.sha256 for name, record in folder_files(path).items()})


class Store:
    """The artifacts of one model below one root folder."""

    def __init__(self, root: Path, model: str) -> None:
        self.folder = root / model

    def path(self, stage: str, key: str) -> Path:
        return self.folder / f"{stage}-{key[:12]}"

    def find(self, stage: str, key: str) -> Artifact | None:
        """The artifact, or None if it was never finished. A damaged one is named, removed and reported as None."""
        folder = self.path(stage, key)
        try:
            artifact = self._read(folder, key)
            artifact.check()
        except FileNotFoundError:
            return None
        except (DamagedArtifactError, *UNREADABLE) as error:
            with self._locked(folder):
                if (repaired := self._attempt(folder, key, check=True)) is not None:
                    return repaired  # by another run, while this one waited
                logger.warning(f"damaged artifact: {error}; it will be rebuilt")
                shutil.rmtree(folder, ignore_errors=True)
            return None
        return artifact

    def _attempt(self, folder: Path, key: str, check: bool) -> Artifact | None:
        try:
            artifact = self._read(folder, key)
            if check:
                artifact.check()
        except (FileNotFoundError, DamagedArtifactError, *UNREADABLE):
            return None
        return artifact

    def peek(self, stage: str, key: str) -> Artifact | None:
        """The artifact as its manifest describes it, its files unread; None if it was never finished or is damaged."""
        return self._attempt(self.path(stage, key), key, check=False)

    def _read(self, folder: Path, key: str) -> Artifact:
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
        """Run `make(folder) -> summary` into a temporary sibling and rename it into place.

        Two processes that want the same artifact take turns; the second finds it made.
        Raises `AccelError` if the folder can't be written.
        """
        folder = self.path(stage, key)
        with self._locked(folder):
            if (made := self.find(stage, key)) is not None:
                return made
            shutil.rmtree(folder, ignore_errors=True)  # a folder without a manifest does not exist
            for stale in self.folder.glob(f"{folder.name}.tmp*"):
                shutil.rmtree(stale, ignore_errors=True)
            temporary = folder.with_name(f"{folder.name}.tmp{os.getpid()}")
            temporary.mkdir()
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
                full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
                full = full or shutil.disk_usage(self.folder).free < FULL
                shutil.rmtree(temporary, ignore_errors=True)
                if full:  # libraries report it in many ways
                    reason = os.strerror(errno.ENOSPC)
                    raise AccelError(f"{reason}: {folder.name} in {self.folder}; nothing of it was kept") from error
                raise
            return Artifact(folder, manifest)

    @contextmanager
    def _locked(self, folder: Path) -> Iterator[None]:
        """Hold the operating system's lock for one artifact; a kill releases it. Re-entrant within a process."""
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{folder}.lock", is_singleton=True)
            try:
                lock.acquire(timeout=0.2)
            except Timeout:
                progress.note(f"waiting for another run that makes {folder.name}")
                lock.acquire()
        except OSError as error:
            raise AccelError(f"can't write to the artifact folder {self.folder}: {error.strerror or error}") from error
        try:
            yield
        finally:
            lock.release()
