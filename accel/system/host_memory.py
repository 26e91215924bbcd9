"""Physical memory of this process, in bytes."""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import psutil

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def resident() -> int:
    """Return the bytes of physical memory that this process holds now, files mapped into memory included."""
    return int(psutil.Process().memory_info().rss)


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


class PeakMemory:
    """Context that measures this process's peak memory.

    Attributes:
        peak: Bytes at the peak.
        added: Bytes by which the peak exceeds the memory held at the beginning.
    """

    def __enter__(self) -> "PeakMemory":
        release()
        reset_peak()
        self._before = resident()
        self.peak = self.added = 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.peak = peak_resident()
        self.added = max(0, self.peak - self._before)
