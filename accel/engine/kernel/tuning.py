"""Settings of the kernel that are measured on a device, and kept for later processes.

What is kept are numbers alone, in `$XDG_CACHE_HOME/accel/tuning.json`, which may be deleted at any time: without them
the defaults hold, which were measured on an H100. Other settings add in another order, so that last digits differ.
"""

import hashlib
import json
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from accel.engine.kernel.placement import NotRunnableError
from accel.system.user_cache import read_values, write_values

logger = logging.getLogger(__name__)

FILE = "tuning.json"
MAX_ENTRIES = 1024
BUDGET_S = 25.0  # seconds for all measurements of one plan, compilations included: below 30 with the last one
MARGIN = 0.01  # share by which settings must be faster than the best before, so that noise changes nothing
LAUNCHES, REPEATS = 20, 5  # launches that are timed at once; times of which the median counts


@dataclass(frozen=True)
class Tuning:
    """Settings of the kernel for one plan, number of rows and length of caches.

    Attributes:
        max_splits: Parts that the keys of one head and row are cut into at most, each for a block of its own.
        least_slots: Slots of keys in each of several parts, as an exchange between blocks takes as long as some such.
        spare_slots: Slots that the ring has less than the shared memory has room for.
        in_flight: Slots that are copied at a time. With more of them, words between blocks wait in the memory's queue.
    """

    max_splits: int = 8
    least_slots: int = 2
    spare_slots: int = 0
    in_flight: int = 2


DEFAULT = Tuning()
CHOICES = {  # setting -> values, those first that are the likeliest to help: the budget may end the measurements
    "max_splits": (8, 4, 2, 1),
    "least_slots": (2, 1, 4, 8),
    "spare_slots": (0, 2, 4),
    "in_flight": (2, 3, 4),
}


def tune(
    measure: Callable[[Tuning], float], budget_s: float = BUDGET_S, clock: Callable[[], float] = time.perf_counter
) -> Tuning:
    """Return the fastest settings, found by changing one after the other.

    Args:
        measure: Returns the seconds of a launch with these settings. `NotRunnableError`: the kernel can't have them.
        budget_s: Seconds after which no further measurement begins that might take as long as the longest before.
        clock: Returns seconds.

    Returns:
        The settings. The defaults, unless others were faster by `MARGIN`.

    Raises:
        NotRunnableError: The kernel can't be run with the defaults.
    """
    began = clock()
    best, fastest = DEFAULT, measure(DEFAULT)
    longest = clock() - began
    for setting, values in CHOICES.items():
        for value in values:
            candidate = replace(best, **{setting: value})
            if candidate == best:
                continue
            start = clock()
            if start - began + longest > budget_s:
                return best
            try:
                seconds = measure(candidate)
            except NotRunnableError as reason:
                logger.debug("%s: %s", candidate, reason)
                continue
            longest = max(longest, clock() - start)
            if seconds < fastest * (1 - MARGIN):
                best, fastest = candidate, seconds
    return best


def key(device: str, source: str, lengths: Sequence[int]) -> str:
    """Return the key that settings are kept by.

    Args:
        device: The device, its number of multiprocessors and its compute capability, as text.
        source: The kernel's source for the plan with default settings, which has all of its shapes and the rows.
        lengths: Lengths of the caches that its operations read.
    """
    return hashlib.sha256(json.dumps([device, source, list(lengths)]).encode()).hexdigest()


def kept(name: str) -> Tuning | None:
    """Return the settings that are kept by a key; None if there are none, or they are no such numbers."""
    values = read_values(FILE).get(name)
    return _parse(values) if values is not None else None


def keep(name: str, tuning: Tuning) -> None:
    """Keep settings for later processes, where the user's cache can be written."""
    write_values(FILE, {**read_values(FILE), name: asdict(tuning)}, MAX_ENTRIES)


def _parse(values: Any) -> Tuning | None:
    """Return settings from JSON; None, with a message at level INFO, if they aren't among `CHOICES`."""
    names = {field.name for field in fields(Tuning)}
    valid = isinstance(values, dict) and values.keys() == names
    if valid and all(type(values[name]) is int and values[name] in CHOICES[name] for name in names):
        return Tuning(**values)
    logger.info("%s holds settings that the kernel doesn't have: %s. The defaults hold", FILE, values)
    return None


def launch_seconds(launch: Callable[[], None], device: torch.device) -> float:
    """Return the seconds of one launch on a GPU, the median of several times."""
    seconds = []
    for _ in range(REPEATS + 1):  # the first is a warm-up
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(torch.cuda.current_stream(device))
        for _ in range(LAUNCHES):
            launch()
        end.record(torch.cuda.current_stream(device))
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1000 / LAUNCHES)
    return float(statistics.median(seconds[1:]))
