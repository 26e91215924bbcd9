"""Physical memory of this process and its children, in bytes."""

import ctypes
import gc
import mmap
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from types import TracebackType

import psutil

STATUS = Path("/proc/self/status")
MAPS = Path("/proc/self/maps")  # without the counts of pages, which take the kernel 20 times as long
TASKS = Path("/proc/self/task")
CLEAR_REFS = Path("/proc/self/clear_refs")
INTERVAL_S = 0.3  # between samples of the child processes' memory
LARGE_BLOCK = 8 * 2**20  # bytes; with 1 MB, PyTorch's activations cost a third more CPU time, for new pages
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
LIBRARY = ".so"  # in the names of shared libraries
GROWTH = 1.02  # factor by which the processes' memory must have grown to be counted again


def resident() -> int:
    """Return the bytes of physical memory that this process holds now, files mapped into memory included."""
    return int(psutil.Process().memory_info().rss)


def resident_data() -> int:
    """Return the bytes of physical memory that this process holds now, without the pages of shared libraries.

    A library's code is read as it is first used, once per process, whatever is computed with it. Outside Linux, which
    alone tells what memory is mapped from, it counts.
    """
    if sys.platform != "linux":
        return resident()
    maps = psutil.Process().memory_maps()  # one for each file
    return sum(mapping.rss for mapping in maps if LIBRARY not in Path(mapping.path).name)


def drop_file_pages(folders: Collection[Path]) -> int:
    """Return to the system, on Linux, the pages that this process has read of files mapped from some folders.

    What is read again comes from the system's cache of files. A mapping with a page that the process has changed is
    left alone, because the change would be lost (`man 2 madvise`, MADV_DONTNEED).

    Args:
        folders: Absolute paths without links.

    Returns:
        Bytes that were dropped.
    """
    dropped = 0
    if sys.platform != "linux" or not any(f"{folder}/" in MAPS.read_text() for folder in folders):
        return dropped
    libc = ctypes.CDLL(None)
    with suppress(psutil.AccessDenied):  # a hardened process may not see its own pages
        for mapping in psutil.Process().memory_maps(grouped=False):
            changed = mapping.anonymous or mapping.swap
            if Path(mapping.path).parent in folders and mapping.rss and not changed:
                begin, end = (int(address, 16) for address in mapping.addr.split("-"))
                if libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED) == 0:
                    dropped += mapping.rss
    return dropped


def resident_together(processes: Sequence[psutil.Process]) -> int:
    """Return the bytes of physical memory that processes hold together, on Linux; pages that they share count once.

    The kernel's own sum of shares (PSS) does for pages of no file, which only a process and those forked from it share,
    but not for pages of files: it divides them among all processes of the machine.
    """
    private, files = 0, Counter[str]()
    for process in processes:
        private += _anonymous_share(process.pid)
        for mapping in process.memory_maps():  # one for each file
            files |= Counter({mapping.path: mapping.rss - mapping.anonymous})  # the largest counts
    return private + files.total()


def _anonymous_share(pid: int) -> int:
    """Return the bytes of a process's pages of no file, each divided by the number of processes that share it."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss_Anon:"):
            return int(line.split()[1]) * 1024
    return 0


def peak_resident() -> int:
    """Return the most bytes of physical memory that this process held since its start or the last `reset_peak`."""
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resident()


def reset_peak() -> None:
    """Restart the measurement of the peak, where the system allows it (Linux: `man 5 proc`, clear_refs)."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return  # the peak then counts from the start of the process: too high, never too low


def release() -> None:
    """Return freed memory to the system: collect reference cycles and, with glibc, trim the C heap."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def return_large_blocks() -> None:
    """Let glibc return each freed block of `LARGE_BLOCK` bytes or more to the system at once.

    By default the limit rises to the largest block freed so far, up to 32 MB, and smaller blocks are taken from a heap
    that shrinks at its end only: `man 3 mallopt`, M_MMAP_THRESHOLD. For the command line only: a library must not
    change its host's settings.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


@contextmanager
def frozen_objects() -> Iterator[None]:
    """Open a context in which the garbage collector passes over all objects that are alive now.

    These are above all modules: with those of torch, transformers and onnxscript, each full pass takes 0.3 s.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def may_have_children() -> bool:
    """Return whether this process has child processes; True where the system doesn't list them.

    Takes a thirtieth of the time of psutil's `children`, which reads the state of every process of the machine
    (`man 5 proc`, /proc/PID/task/TID/children).
    """
    lists = list(TASKS.glob("*/children"))
    return not lists or any(path.read_bytes() for path in lists)


class PeakMemory:
    """Context that measures the peak memory of this process and the processes that it starts.

    The peak of this process alone is the kernel's own figure. While it has child processes, their memory is sampled,
    and pages that several of them hold, such as those of libraries, count once.

    Attributes:
        peak: Bytes at the peak.
        added: Bytes by which the peak exceeds the memory held at the beginning.
    """

    def __enter__(self) -> "PeakMemory":
        release()
        reset_peak()
        self._before = resident()
        self.peak = self.added = 0
        self._with_children = self._largest_sum = 0
        self._ended = Event()
        self._sampler = Thread(target=self._sample, daemon=True)
        self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._sampler.join()
        self.peak = max(peak_resident(), self._with_children)
        self.added = max(0, self.peak - self._before)

    def _sample(self) -> None:
        """Measure this process with its children until the context ends."""
        process = psutil.Process()
        while not self._ended.wait(INTERVAL_S):
            with suppress(psutil.Error, OSError):  # a process that ended meanwhile
                children = process.children(recursive=True) if may_have_children() else []
                if children:
                    self._measure([process, *children])

    def _measure(self, processes: Sequence[psutil.Process]) -> None:
        """Count the pages of all processes if these hold more than ever; it takes too long for every sample."""
        total = sum(process.memory_info().rss for process in processes)  # pages of files once for each process
        if total > GROWTH * self._largest_sum:
            self._largest_sum = total
            counted = resident_together(processes) if sys.platform == "linux" else total
            self._with_children = max(self._with_children, counted)
