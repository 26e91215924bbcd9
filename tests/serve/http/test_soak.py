"""Thousands of requests of mixed kind, some of them bad and some from clients that vanish: nothing is wrong or left."""

import gc
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from accel.config.presets import runtime_preset
from accel.serve.http.service import PLANNING_THREADS
from accel.serve.requests.served_model import open_served, scheduler_limits
from accel.serve.scheduling.batch_scheduler import BatchScheduler
from accel.serve.scheduling.opening import open_scheduler
from accel.serve.scheduling.row_scheduler import RowScheduler
from tests.conftest import Build
from tests.serve.servers import LIMITS, Running, running
from tests.serve.soak_client import CLIENTS, KINDS, Client, greedy_texts, run_clients

pytestmark = pytest.mark.soak

REQUESTS = int(os.environ.get("ACCEL_SOAK_REQUESTS", "10000"))
SETTLED = 0.1  # share of the requests after which memory may grow by 5% only
MEMORY_GROWTH = 1.05


@pytest.fixture(scope="module")
def folder(build: Build) -> Path:
    """Deployable of the embedded T5."""
    overrides = ["model.checkpoint=accel://t5-g2p", "runtime.static=true", "verify.inputs=2", "verify.references=4"]
    return build(Path("t5-g2p"), "verify", overrides)[1]["verify"].folder


def open_files() -> Counter[str]:
    """Return what the file descriptors of this process are open on."""
    opened: Counter[str] = Counter()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the descriptor of the folder itself
            opened[str(descriptor.readlink())] += 1
    return opened


def open_server(folder: Path, static: bool) -> AbstractContextManager[Running]:
    """Serve the embedded T5 alone, in a running batch or in padded ones."""
    scheduler = partial(open_scheduler, limits=scheduler_limits(LIMITS))
    served = open_served("g2p", folder, runtime_preset("cpu", static=static), scheduler)
    assert isinstance(served.scheduler, RowScheduler if static else BatchScheduler)
    return running([served])


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, str]:
    """Word -> its greedy text. Libraries then have the files that they keep, such as libuv's pipe for signals."""
    with open_server(folder, static=True):
        return greedy_texts(folder)


@pytest.fixture(params=[True, False], ids=["rows", "padded batches"])
def server(folder: Path, expected: dict[str, str], request: pytest.FixtureRequest) -> Iterator[Running]:
    """Server in a running batch or in padded ones. At its end no thread or file is left."""
    gc.collect()
    threads, files = set(threading.enumerate()), open_files()
    with open_server(folder, request.param) as opened:
        yield opened
    gc.collect()
    assert set(threading.enumerate()) <= threads
    assert not open_files() - files


def test_soak(server: Running, expected: dict[str, str]) -> None:
    """All answers are right, all mistakes are named, and memory, threads and files stay what they were."""
    process = psutil.Process()

    def clients(seed: int) -> list[Client]:
        return [Client(server.address, expected, seed + number) for number in range(CLIENTS)]

    counts = run_clients(clients(0), int(REQUESTS * SETTLED))
    memory, threads, files = process.memory_info().rss, set(threading.enumerate()), process.num_fds()
    counts += run_clients(clients(1000), REQUESTS - int(REQUESTS * SETTLED))
    print(f"{counts.total()} requests: {dict(counts)}; {memory / 1e6:.0f} MB, {process.memory_info().rss / 1e6:.0f} MB")
    assert set(counts) == KINDS
    assert process.memory_info().rss <= MEMORY_GROWTH * memory
    planning = {thread for thread in threading.enumerate() if thread.name.startswith("accel-plan")}
    assert len(planning) <= PLANNING_THREADS
    assert set(threading.enumerate()) - planning <= threads
    assert process.num_fds() <= files + CLIENTS  # connections that the system has not closed yet
    status = server.models["g2p"].scheduler.status()
    assert (status.waiting, status.running) == (0, 0)
