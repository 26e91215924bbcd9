"""Artifacts on disk: keys, manifests, damage, kills, and several processes at once."""

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel.errors import AccelError, StageError
from accel.pipeline.store import Artifact, FileRecord, Manifest, Store
from accel.runtime.layout import MANIFEST
from accel.system.hashing import file_hash, make_key

KEY = make_key(stage="toy", version=1)
SPAWN = multiprocessing.get_context("spawn")

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=8)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | NAMES
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3))
PARTS = st.dictionaries(NAMES, JSON, min_size=1, max_size=5)


def build(store: Store, make: Callable[[Path], Mapping[str, Any]], stage: str = "toy", key: str = KEY) -> Artifact:
    """Build an artifact by `make`, without upstream, config or packages."""
    return store.build(stage, key, make, upstream={}, config={}, packages={})


def write(folder: Path) -> Mapping[str, Any]:
    """Stage that writes two files, one in a subfolder."""
    (folder / "weights.bin").write_bytes(bytes(range(256)))
    (folder / "below").mkdir()
    (folder / "below" / "notes.txt").write_text("made")
    return {"files": 2}


# keys


@given(PARTS)
def test_key_does_not_depend_on_order(parts: dict[str, Any]) -> None:
    """The same parts in another order give the same key."""
    assert make_key(**dict(reversed(parts.items()))) == make_key(**parts)


@given(PARTS, st.data())
def test_key_depends_on_every_part(parts: dict[str, Any], data: st.DataObject) -> None:
    """Another value, one part less or one more gives another key."""
    key = make_key(**parts)
    name = data.draw(st.sampled_from(sorted(parts)))
    other = data.draw(JSON.filter(lambda value: repr(value) != repr(parts[name]) and value != parts[name]))
    assert make_key(**{**parts, name: other}) != key
    assert make_key(**{rest: value for rest, value in parts.items() if rest != name}) != key
    assert make_key(**parts, **{name + "+": other}) != key


@given(NAMES, NAMES)
def test_key_is_no_concatenation(first: str, second: str) -> None:
    """Moving characters from one part into the next changes the key."""
    joined, apart = make_key(a=first + second, b=""), make_key(a=first, b=second)
    assert joined != apart
    assert make_key(a={"b": 1}) != make_key(a="b", b=1)
    assert len(joined) == 64


# manifests


RECORDS = st.builds(FileRecord, size=st.integers(0), sha256=st.text("0123456789abcdef", min_size=64, max_size=64))
NUMBERS = st.floats(min_value=0, allow_nan=False, allow_infinity=False)


@given(
    st.builds(
        Manifest,
        stage=NAMES,
        key=NAMES,
        upstream=st.dictionaries(NAMES, NAMES, max_size=3),
        config=PARTS,
        packages=st.dictionaries(NAMES, NAMES, max_size=3),
        seconds=NUMBERS,
        peak_memory=st.integers(0),
        added_memory=st.integers(0),
        summary=PARTS,
        files=st.dictionaries(NAMES, RECORDS, max_size=3),
    )
)
def test_manifest_roundtrip(manifest: Manifest) -> None:
    """`parse` returns a manifest equal to the one that `dump` wrote."""
    assert Manifest.parse(manifest.dump()) == manifest
    assert Manifest.parse(Manifest.parse(manifest.dump()).dump()).dump() == manifest.dump()


@given(st.text(max_size=40) | JSON.map(str))
def test_invalid_manifest(text: str) -> None:
    """Text that is no manifest raises one of the errors that `Store.find` treats as damage."""
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
        Manifest.parse(text)


# on disk


def test_build_then_find(tmp_path: Path) -> None:
    """A built artifact is found, with its summary, the size and hash of each file, and the cost of making it."""
    store = Store(tmp_path, "model")
    assert store.find("toy", KEY) is None
    made = build(store, write)
    assert made.folder == tmp_path / "model" / f"toy-{KEY[:12]}"
    found = store.find("toy", KEY)
    assert found == made
    assert found.summary == {"files": 2}
    assert set(found.manifest.files) == {"weights.bin", "below/notes.txt"}
    assert found.manifest.files["weights.bin"] == FileRecord(256, file_hash(found.folder / "weights.bin"))
    assert found.manifest.seconds >= 0
    assert found.manifest.peak_memory > 1_000_000


def never(folder: Path) -> Mapping[str, Any]:
    """Stage that must not run."""
    raise AssertionError("made again")


def flip(path: Path) -> None:
    """Change one byte of a file."""
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (lambda folder: flip(folder / "weights.bin"), "weights.bin"),
        (lambda folder: (folder / "weights.bin").write_bytes(b"short"), "weights.bin"),
        (lambda folder: (folder / "below" / "notes.txt").unlink(), "notes.txt"),
        (lambda folder: (folder / MANIFEST).write_text("{"), ""),
        (lambda folder: (folder / MANIFEST).write_text("[]"), ""),
        (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"), ""),
        (lambda folder: (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace(KEY, "0" * 64)), "key"),
    ],
    ids=["flipped bit", "cut", "missing", "half a manifest", "not a manifest", "not UTF-8", "another key"],
)
def test_damage_is_named_and_rebuilt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: Callable[[Path], Any], named: str
) -> None:
    """A damaged artifact is never used: a warning names the file, and the next build makes it again."""
    store = Store(tmp_path, "model")
    folder = build(store, write).folder
    harm(folder)
    assert store.find("toy", KEY) is None
    warning = caplog.text
    assert "damaged" in warning
    assert named in warning
    assert build(store, write).folder == folder
    assert (folder / "weights.bin").read_bytes() == bytes(range(256))
    assert build(store, never).key == KEY


def test_folder_without_manifest_is_ignored(tmp_path: Path) -> None:
    """It is not found, and its files aren't part of the artifact that is built."""
    store = Store(tmp_path, "model")
    folder = store.path("toy", KEY)
    folder.mkdir(parents=True)
    (folder / "leftover").write_text("from a kill")
    assert store.find("toy", KEY) is None
    made = build(store, write)
    assert not (made.folder / "leftover").exists()
    assert set(made.manifest.files) == {"weights.bin", "below/notes.txt"}


def test_failed_stage_leaves_nothing(tmp_path: Path) -> None:
    """A stage that raises leaves neither an artifact nor its temporary folder."""
    store = Store(tmp_path, "model")

    def fail(folder: Path) -> Mapping[str, Any]:
        write(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(store, fail)
    assert [path for path in (tmp_path / "model").iterdir() if path.suffix != ".lock"] == []
    assert build(store, write).key == KEY


def test_stale_temporaries_are_removed(tmp_path: Path) -> None:
    """A build removes temporary folders that a killed run left for this artifact, not those of others."""
    store = Store(tmp_path, "model")
    stale = store.path("toy", KEY).with_name(f"toy-{KEY[:12]}.tmp99999")
    other = store.path("toy", KEY).with_name("toy-000000000000.tmp99999")
    for folder in (stale, other):
        folder.mkdir(parents=True)
        (folder / "half").write_text("x")
    build(store, write)
    assert not stale.exists()
    assert other.exists()


def test_leftovers_of_other_models_and_stages(tmp_path: Path) -> None:
    """The start of a run clears the temporary folders of killed runs, and none of a run that goes on."""
    store, other = Store(tmp_path, "model"), Store(tmp_path, "other")
    stale = other.path("toy", KEY).with_name("toy-000000000000.tmp99999")
    stale.mkdir(parents=True)
    (stale / "half").write_text("x")
    process = SPAWN.Process(target=make_hanging, args=(str(tmp_path),))
    process.start()
    while not (tmp_path / "started").exists():
        assert process.is_alive()
        time.sleep(0.02)
    store.clear_leftovers()
    assert not stale.exists()
    assert list((tmp_path / "model").glob("*.tmp*"))
    process.kill()
    process.join(30)
    store.clear_leftovers()
    assert not list((tmp_path / "model").glob("*.tmp*"))


def fill_up(root: str) -> None:
    """Build an artifact of 2 MB where files may have 1 MB; exit with 7 after the expected message."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))

    def large(folder: Path) -> Mapping[str, Any]:
        try:
            with open(folder / "weights.bin", "wb", buffering=0) as file:
                for _ in range(20):
                    file.write(b"x" * 100_000)
        except OSError as error:
            raise StageError("stage toy failed") from error
        return {}

    try:
        build(Store(Path(root), "model"), large)
    except AccelError as error:
        expected = ("File too large", "stage toy", "weights.bin", "needs about 1.0 MB", "ulimit -f")
        sys.exit(7 if all(part in str(error) for part in expected) else str(error))


def test_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """The message of `ulimit -f` names the file, the stage and the space needed."""
    process = SPAWN.Process(target=fill_up, args=(str(tmp_path),))
    process.start()
    process.join(60)
    assert process.exitcode == 7
    assert not list((tmp_path / "model").glob("*.tmp*"))


def test_unwritable_folder(tmp_path: Path) -> None:
    """A folder that can't be made or written is reported by name."""
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(AccelError, match=r"can't write.*file"):
        build(Store(tmp_path / "file", "model"), write)


@pytest.mark.parametrize("error", [28, 30], ids=["full", "read-only"])
def test_disk_error_during_a_stage(tmp_path: Path, error: int) -> None:
    """The message of a disk that becomes full or read-only while a stage writes names the folder."""

    def fill(folder: Path) -> Mapping[str, Any]:
        raise OSError(error, os.strerror(error), str(folder / "weights.bin"))

    with pytest.raises((AccelError, OSError)) as caught:
        build(Store(tmp_path, "model"), fill)
    assert str(tmp_path) in str(caught.value)
    assert os.strerror(error) in str(caught.value)


# several processes


def slow(folder: Path) -> Mapping[str, Any]:
    """Stage that takes long enough for the processes to overlap; its log shows whether two ran at the same time."""
    log = folder.parents[1] / "log"
    with open(log, "a") as file:
        file.write(f"start {os.getpid()}\n")
    time.sleep(0.5)
    (folder / "weights.bin").write_bytes(os.urandom(100_000))
    with open(log, "a") as file:
        file.write(f"end {os.getpid()}\n")
    return {}


def make_slow(root: str, key: str) -> None:
    """Build the slow artifact, and check it."""
    artifact = build(Store(Path(root), "model"), slow, key=key)
    artifact.check()


def hang(folder: Path) -> Mapping[str, Any]:
    """Stage that starts and doesn't end within the test."""
    (folder / "half").write_text("x")
    (folder.parents[1] / "started").write_text("")
    time.sleep(60)
    return {}


def make_hanging(root: str) -> None:
    """Build the artifact that doesn't end."""
    build(Store(Path(root), "model"), hang)


def test_three_processes_build_once(tmp_path: Path) -> None:
    """Of three processes that need the same artifact, one makes it and the others find it complete."""
    processes = [SPAWN.Process(target=make_slow, args=(str(tmp_path), KEY)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [line.split()[0] for line in (tmp_path / "log").read_text().splitlines()] == ["start", "end"]
    found = Store(tmp_path, "model").find("toy", KEY)
    assert found is not None
    assert not list((tmp_path / "model").glob("*.tmp*"))


def test_kill_releases_the_lock(tmp_path: Path) -> None:
    """After `kill -9` during a stage, the next run builds without waiting and removes the killed run's files."""
    process = SPAWN.Process(target=make_hanging, args=(str(tmp_path),))
    process.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert list((tmp_path / "model").glob("*.tmp*"))
    store = Store(tmp_path, "model")
    assert store.find("toy", KEY) is None
    started = time.monotonic()
    artifact = build(store, write)
    assert time.monotonic() - started < 5
    artifact.check()
    assert not list((tmp_path / "model").glob("*.tmp*"))


def test_damage_repaired_meanwhile_is_not_removed(tmp_path: Path) -> None:
    """An artifact that another run rebuilds while this one waits for its lock is kept."""
    folder = build(Store(tmp_path, "model"), write).folder
    flip(folder / "weights.bin")

    class Racing(Store):
        """Store in which another process repairs the artifact before the lock is acquired."""

        @contextmanager
        def _locked(self, folder: Path) -> Iterator[None]:
            with super()._locked(folder):
                (folder / "weights.bin").write_bytes(bytes(range(256)))
                yield

    Racing(tmp_path, "model").find("toy", KEY)
    assert (folder / MANIFEST).exists()
