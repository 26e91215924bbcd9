"""Peak memory: of this process and its children together, with pages that they share counted once."""

import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from accel.system import host_memory
from accel.system.host_memory import PeakMemory

MB = 1_000_000
CHILD = """
import mmap, sys
kept = []
with open(sys.argv[1], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    kept = sum(mapped[::4096])
own = b"x" * int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
"""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems don't tell shared pages")


def test_memory_that_was_freed_counts() -> None:
    """The kernel knows the peak between samples, too."""
    with PeakMemory() as memory:
        block = b"x" * (200 * MB)
        del block
    assert 190 * MB < memory.added < 230 * MB
    assert memory.peak > memory.added


PARENT = """
import mmap, subprocess, sys, time
from accel.system.host_memory import INTERVAL_S, PeakMemory
with PeakMemory() as memory, open(sys.argv[1], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    sum(mapped[::4096])
    command = [sys.executable, "-c", sys.argv[2], sys.argv[1], "100000000"]
    children = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    for child in children:
        child.stdout.readline()
    time.sleep(5 * INTERVAL_S)
    for child in children:
        child.communicate(b"\\n")
print(memory.added)
"""


def test_children_count_and_what_they_share_counts_once(tmp_path: Path) -> None:
    """A file that a process and two children map, and memory of each child's own.

    A process of its own, since children of other tests count, too.
    """
    shared = tmp_path / "shared"
    shared.write_bytes(b"x" * (300 * MB))
    done = subprocess.run([sys.executable, "-c", PARENT, str(shared), CHILD], capture_output=True, check=True)
    assert 490 * MB < int(done.stdout) < 580 * MB  # 300 shared, twice 100, and the children's interpreters


FORKING = """
import os, signal, psutil
from accel.system.host_memory import resident_together
block = bytearray(b"x") * 200_000_000
before = resident_together([psutil.Process()])
read, write = os.pipe()
child = os.fork()
if child == 0:
    own = bytearray(b"y") * 100_000_000
    os.write(write, b"1")
    signal.pause()
os.read(read, 1)
print(resident_together([psutil.Process(), psutil.Process(child)]) - before)
os.kill(child, signal.SIGKILL)
"""


def test_memory_that_a_forked_process_shares_counts_once() -> None:
    """The child adds what it allocates, and not the block that it has from its parent."""
    done = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, check=True)
    assert 95 * MB < int(done.stdout) < 130 * MB


FREEING = """
import sys
from accel.system.host_memory import release, resident, return_large_blocks
if sys.argv[1] == "fixed":
    return_large_blocks()
block = bytearray(16 * 2**20)
del block
before = resident()
blocks = [bytearray(16 * 2**20) for _ in range(10)]
del blocks[:-1]
print(resident() - before)
"""


@pytest.mark.parametrize(("mode", "blocks"), [("fixed", 1), ("default", 10)])
def test_large_blocks_are_returned(mode: str, blocks: int) -> None:
    """Even below one that is in use, which by default keeps all of them."""
    done = subprocess.run([sys.executable, "-c", FREEING, mode], capture_output=True, text=True, check=True)
    assert int(done.stdout) / (16 * 2**20) == pytest.approx(blocks, abs=0.3)


def test_libraries_are_not_data(tmp_path: Path) -> None:
    """A mapped file counts, one that is named as a library doesn't, nor do those that Python loaded."""
    before = host_memory.resident_data()
    assert before < host_memory.resident()
    kept = []
    for name in ("weights", "library.so.1"):
        (tmp_path / name).write_bytes(b"x" * (50 * MB))
        with (tmp_path / name).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        kept.append(mapped)
        sum(mapped[::4096])
    assert 49 * MB < host_memory.resident_data() - before < 60 * MB


def test_pages_of_files_are_dropped(tmp_path: Path) -> None:
    """Those of the folders that are named, and what was in them is read again."""
    other = tmp_path / "other"
    other.mkdir()
    content = bytes(range(256)) * (50 * MB // 256)
    maps = []
    for path in (tmp_path / "weights", other / "weights"):
        path.write_bytes(content)
        with path.open("rb") as file:
            maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        sum(maps[-1][::4096])
    before = host_memory.resident_data()
    assert host_memory.drop_file_pages([tmp_path]) == pytest.approx(50 * MB, abs=MB)
    assert 45 * MB < before - host_memory.resident_data() < 55 * MB
    assert maps[0][:] == content


def test_changed_pages_stay(tmp_path: Path) -> None:
    """A private copy of a page is nowhere but in memory."""
    path = tmp_path / "weights"
    path.write_bytes(b"x" * MB)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    mapped[MB // 2] = ord("y")
    assert host_memory.drop_file_pages([tmp_path]) == 0
    assert mapped[MB // 2] == ord("y")


def test_children_are_noticed() -> None:
    """Those of threads as well; in a process of its own, since other tests have children."""
    script = """
import subprocess, sys, threading
from accel.system.host_memory import may_have_children
def start():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    seen.append(may_have_children())
    child.communicate(b"\\n")
    seen.append(may_have_children())
seen = [may_have_children()]
start()
thread = threading.Thread(target=start)
thread.start()
thread.join()
print(seen)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
    assert done.stdout.strip() == "[False, True, False, True, False]"
