"""Comparison of a deployable's files with its manifest before any of them is opened.

The manifest lists every file with its size and SHA-256. It protects against damage, mixed-up files and changes of
single files. It is no signature: whoever can write the whole folder can write its manifest as well.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from accel.errors import AccelError, unknown
from accel.runtime import layout
from accel.runtime.layout import DeployableFiles
from accel.system.hashing import make_key
from accel.system.remembered_hashes import file_hashes, hash_files

logger = logging.getLogger(__name__)

FAST, FULL = "fast", "full"
ALWAYS_HASHED = 2**20  # bytes: files up to this size are hashed each time, which takes less than a millisecond each
DOCUMENTATION = ("README", "LICENSE", "NOTICE")  # how the names of files begin that nothing reads
ADVICE = "Build or download the folder again; check=False opens it regardless"


def check_files(variant: DeployableFiles, check: str | bool) -> None:
    """Compare the files of a deployable or an unverified bundle with its manifest.

    Args:
        variant: The variant to check. Files of others in the same folder are left alone.
        check: `fast`: sizes, and hashes, where those of large files are taken from `accel.system.remembered_hashes` if
            their state is the one they were hashed in. `full`: hash every file now. False: compare nothing.

    Raises:
        AccelError: `check` has another value; the manifest is missing, empty, edited or damaged; a file differs, is
            missing, or isn't in the manifest.
    """
    if check is False:
        return
    if check not in (FAST, FULL):
        raise unknown("check", check, (FAST, FULL, "False"))
    folder, manifest = variant.folder, variant.manifest.name
    files = listed_files(variant)
    for path in _unlisted(folder):
        raise AccelError(f"{path} is not in {manifest}, so nobody verified it: remove it. {ADVICE}")
    for name, record in files.items():
        path = folder / name
        if not path.is_file():
            raise AccelError(f"{path} is missing, but in {manifest}. {ADVICE}")
        size = path.stat().st_size
        if size != record["size"]:
            raise AccelError(
                f"{path} has {size} bytes, but {record['size']} according to {manifest}: it is damaged or not "
                f"the file that was verified. {ADVICE}"
            )
    for name, sha256 in _hashes(folder, files, check == FULL).items():
        if sha256 != files[name]["sha256"]:
            raise AccelError(
                f"{folder / name} has another SHA-256 than in {manifest}: it is damaged or not the file that "
                f"was verified. {ADVICE}"
            )


def listed_files(variant: DeployableFiles) -> Mapping[str, Mapping[str, Any]]:
    """Return the manifest's list of files: relative path -> `size` in bytes and `sha256` in hexadecimal.

    Documentation, which users edit and nothing reads, is left out.

    Raises:
        AccelError: The manifest can't be read, lists nothing, was edited, or lists a path outside the folder.
    """
    path = variant.manifest
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files: dict[str, dict[str, Any]] = manifest["files"]
        edited = manifest["files_sha256"] != make_key(files=files)
        complete = all({"size", "sha256"} <= set(record) for record in files.values())
    except FileNotFoundError as error:
        raise AccelError(f"{variant.folder} holds no {path.name} to compare its files with. {ADVICE}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AccelError(f"{path} is damaged: {type(error).__name__}: {error}. {ADVICE}") from error
    outside = [name for name in files if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    if edited or not complete or outside:
        raise AccelError(f"{path} was edited: its list of files is not the one that accel wrote. {ADVICE}")
    decoder = variant.decoder.relative_to(variant.folder).as_posix()
    if decoder not in files:
        raise AccelError(f"{path} doesn't list {decoder}: it belongs to another folder. {ADVICE}")
    return {name: record for name, record in files.items() if not name.startswith(DOCUMENTATION)}


def warn_if_unverified(variant: DeployableFiles) -> None:
    """Log one warning if no verification result says that the variant's files passed."""
    problem = _verification_problem(variant)
    if problem is not None:
        logger.warning("%s is unverified: %s", variant.folder, problem)


def _verification_problem(variant: DeployableFiles) -> str | None:
    """Return why the verification result doesn't hold for the variant's files; None if it does."""
    path = variant.verification
    try:
        verdict = json.loads(path.read_text(encoding="utf-8"))
        passed, verified = verdict["passed"], dict(verdict["files"])
    except FileNotFoundError:
        return f"it holds no {path.name}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"{path.name} can't be read"
    if passed is not True:
        return f"according to {path.name} it didn't pass"
    try:
        files = {name: record["sha256"] for name, record in listed_files(variant).items()}
    except AccelError:
        return f"without {variant.manifest.name} nothing shows that {path.name} is of these files"
    added = {file.name for file in (path, variant.certificate, variant.certificate_page)}  # written later
    others = sorted(
        name for name in files.keys() | verified.keys() if name not in added and files.get(name) != verified.get(name)
    )
    return f"{path.name} is of other files: {', '.join(others)}" if others else None


def _unlisted(folder: Path) -> Iterator[Path]:
    """Yield files that no variant's manifest lists and something could read.

    Hidden files, documentation, and subfolders with a manifest of their own are left out. Links to folders, pipes and
    devices count as files.
    """
    listed = {name for variant in layout.variants(folder) for name in (*listed_files(variant), variant.manifest.name)}
    for parent, subfolders, names in os.walk(folder):
        links = [name for name in subfolders if (Path(parent) / name).is_symlink()]
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(".") and not (Path(parent) / name / layout.MANIFEST).is_file()
        ]
        for name in (*names, *links):
            path = Path(parent) / name
            relative = path.relative_to(folder).as_posix()
            if relative not in listed and not name.startswith((".", *DOCUMENTATION)):
                yield path


def _hashes(folder: Path, files: Mapping[str, Mapping[str, Any]], full: bool) -> dict[str, str]:
    """Return the SHA-256 of the listed files; unless `full`, those of large files may be remembered ones."""
    small = [folder / name for name, record in files.items() if full or record["size"] <= ALWAYS_HASHED]
    large = [folder / name for name in files if folder / name not in small]
    hashes = hash_files(small) | file_hashes(large)
    return {name: hashes[folder / name] for name in files}
