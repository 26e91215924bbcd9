"""Memory of this process and of tensors, in bytes."""

import ctypes
import gc
import sys
from pathlib import Path
from types import TracebackType

import psutil

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def resident() -> int:
    """Bytes of physical memory this process holds now, files mapped into memory included."""
    return int(psutil.Process().memory_info().rss)


def peak_resident() -> int:
    """The most bytes of physical memory this process held since its start or the last `reset_peak`."""
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resident()


def reset_peak() -> None:
    """Let the peak start again from now, where the system allows it (Linux, `man 5 proc`, clear_refs)."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return  # the peak then counts from the start of the process: too high, never too low


def release() -> None:
    """Give freed memory back to the system: collect cycles, and trim the C heap where glibc is there."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class PeakMemory:
    """Context that measures the peak (`peak`) and how far it rose above what was held before (`added`)."""

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
