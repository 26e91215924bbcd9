"""Hashes are remembered by a file's state, in a private folder, and nothing breaks without that folder."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from accel.system import remembered_hashes
from accel.system.remembered_hashes import FILE, file_hashes
from accel.system.user_cache import user_cache


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "accel"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read to be hashed."""
    names: list[str] = []
    original = remembered_hashes._hash

    def count(path: Path) -> str:
        names.append(path.name)
        return original(path)

    monkeypatch.setattr(remembered_hashes, "_hash", count)
    return names


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_each_state_is_hashed_once(tmp_path: Path, hashed: list[str]) -> None:
    """A second call reads no file; a change of content is seen, even with size and time of modification set back."""
    file = tmp_path / "weights"
    file.write_bytes(b"first")
    status = file.stat()
    assert file_hashes([file]) == file_hashes([file]) == {file: sha256(b"first")}
    assert hashed == ["weights"]
    file.write_bytes(b"other")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file_hashes([file]) == {file: sha256(b"other")}
    assert hashed == ["weights", "weights"]


@pytest.mark.parametrize("content", ["", "{", "[]", "\udcff"])
def test_damaged_memory(tmp_path: Path, cache: Path, content: str) -> None:
    """A damaged file of hashes is replaced."""
    file = tmp_path / "weights"
    file.write_bytes(b"content")
    cache.mkdir(mode=0o700, parents=True)
    (cache / FILE).write_bytes(content.encode(errors="surrogateescape"))
    assert file_hashes([file]) == {file: sha256(b"content")}
    assert list(json.loads((cache / FILE).read_text()).values()) == [sha256(b"content")]


def test_private_folder(cache: Path, tmp_path: Path) -> None:
    """The folder is private; one that others can write into is not used, and files are hashed all the same."""
    assert user_cache() == cache
    assert cache.stat().st_mode & 0o777 == 0o700
    cache.chmod(0o777)
    assert user_cache() is None
    file = tmp_path / "weights"
    file.write_bytes(b"content")
    assert file_hashes([file]) == {file: sha256(b"content")}
    assert list(cache.iterdir()) == []


def test_no_folder_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder that can't be made costs time only."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert user_cache() is None
    assert file_hashes([tmp_path / "file"]) == {tmp_path / "file": sha256(b"")}


def test_bounded(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest entries are kept."""
    monkeypatch.setattr(remembered_hashes, "MAX_ENTRIES", 2)
    for name in "abc":
        (tmp_path / name).write_text(name)
        file_hashes([tmp_path / name])
    assert list(json.loads((cache / FILE).read_text()).values()) == [sha256(b"b"), sha256(b"c")]
