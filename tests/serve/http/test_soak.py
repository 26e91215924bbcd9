"""Thousands of requests of mixed kind, some of them bad and some from clients that vanish: nothing is wrong or left."""

import os
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from accel.config.presets import runtime_preset
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


@pytest.fixture(params=[True, False], ids=["rows", "padded batches"])
def server(folder: Path, request: pytest.FixtureRequest) -> Iterator[Running]:
    """Server over the embedded T5 alone, in a running batch or in padded ones."""
    scheduler = partial(open_scheduler, limits=scheduler_limits(LIMITS))
    served = open_served("g2p", folder, runtime_preset("cpu", static=request.param), scheduler)
    assert isinstance(served.scheduler, RowScheduler if request.param else BatchScheduler)
    with running([served]) as opened:
        yield opened


def test_soak(server: Running, folder: Path) -> None:
    """All answers are right, all mistakes are named, and memory, threads and files stay what they were."""
    process = psutil.Process()
    served, expected = server.models["g2p"], greedy_texts(folder)

    def clients(seed: int) -> list[Client]:
        return [Client(server.address, expected, seed + number) for number in range(CLIENTS)]

    counts = run_clients(clients(0), int(REQUESTS * SETTLED))
    memory, threads, files = process.memory_info().rss, threading.active_count(), process.num_fds()
    counts += run_clients(clients(1000), REQUESTS - int(REQUESTS * SETTLED))
    print(f"{counts.total()} requests: {dict(counts)}; {memory / 1e6:.0f} MB, {process.memory_info().rss / 1e6:.0f} MB")
    assert set(counts) == KINDS
    assert process.memory_info().rss <= MEMORY_GROWTH * memory
    assert threading.active_count() <= threads
    assert process.num_fds() <= files + CLIENTS  # connections that the system has not closed yet
    status = served.scheduler.status()
    assert (status.waiting, status.running) == (0, 0)
