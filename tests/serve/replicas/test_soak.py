"""A soak of two replicas, one of which is killed: all answers are right, all else is a clear error, nothing grows."""

import os
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from tests.serve.replicas.command_line import KEY, Started, started, wait_for
from tests.serve.soak_client import CLIENTS, KINDS, LOST, Client, greedy_texts, run_clients

pytestmark = [pytest.mark.soak, pytest.mark.xdist_group("replicas")]

REQUESTS = int(os.environ.get("ACCEL_SOAK_REQUESTS", "10000"))
SETTLED = 0.2  # share of the requests after which memory may grow by 5% only; and again behind the kill
KILLED = 0.3  # share of the requests in which the replica is killed
MEMORY_GROWTH = 1.05
RECOVERY_S = 120
DONE_BEFORE = 3  # requests of each client before the kill


class Measured:
    """Memory, threads and files of the front and of its replicas.

    Args:
        server: The server.
    """

    def __init__(self, server: Started) -> None:
        processes = [psutil.Process(server.process.pid), *server.replicas()]
        self.memory = {process.pid: process.memory_info().rss for process in processes}
        self.threads = {process.pid: process.num_threads() for process in processes}
        self.files = {process.pid: process.num_fds() for process in processes}

    def __str__(self) -> str:
        return ", ".join(
            f"{pid}: {memory / 1e6:.0f} MB, {self.threads[pid]} threads, {self.files[pid]} files"
            for pid, memory in self.memory.items()
        )

    def assert_no_growth(self, before: "Measured") -> None:
        """Compare with what was measured before, for the processes that there are now."""
        for pid, memory in self.memory.items():
            assert memory <= MEMORY_GROWTH * before.memory[pid], (pid, before, self)
            assert self.threads[pid] <= before.threads[pid] + 2, (pid, before, self)  # of Ray, which starts some late
            assert self.files[pid] <= before.files[pid] + CLIENTS, (pid, before, self)


def clients(server: Started, expected: Mapping[str, str], seed: int) -> list[Client]:
    headers = {"Authorization": f"Bearer {KEY}"}
    return [Client(server.address, expected, seed + number, headers) for number in range(CLIENTS)]


def test_a_killed_replica_in_a_soak(g2p_folder: Path, tmp_path: Path) -> None:
    """The front and the surviving replica keep their memory, and so does the new one once it has settled."""
    expected = greedy_texts(g2p_folder)
    limits = ["serve.replicas=2", "serve.log_requests=false"]
    with started({"g2p": g2p_folder}, tmp_path, *limits) as server:
        counts = run_clients(clients(server, expected, 0), int(REQUESTS * SETTLED))
        settled = Measured(server)
        first, second = server.replicas()
        group = clients(server, expected, 1000)

        def kill() -> None:
            wait_for(lambda: sum(client.counts.total() for client in group) > DONE_BEFORE * CLIENTS, RECOVERY_S)
            first.kill()

        during = run_clients(group, int(REQUESTS * KILLED), kill)
        wait_for(lambda: len(server.values("accel_requests_running")) == 2, RECOVERY_S)
        pids = {replica.pid for replica in server.replicas()}
        assert pids & {first.pid, second.pid} == {second.pid}
        assert len(pids) == 2
        after = run_clients(clients(server, expected, 2000), int(REQUESTS * SETTLED))
        again = Measured(server)
        rest = run_clients(clients(server, expected, 3000), REQUESTS - int(REQUESTS * (2 * SETTLED + KILLED)))
        end = Measured(server)
        generated = server.values("accel_generated_tokens_total")
        print(f"{(counts + during + after + rest).total()} requests: {dict(counts + during + after + rest)}")
        print(f"settled: {settled}\nafter the kill: {again}\nat the end: {end}")
        wait_for(lambda: set(server.values("accel_requests_running").values()) == {0.0}, RECOVERY_S)
    assert LOST not in counts + after + rest
    assert during[LOST] <= CLIENTS
    assert set(counts + during + after + rest) - {LOST} == KINDS
    assert min(generated.values()) > 0, "the new replica computes some"
    end.assert_no_growth(again)
    assert {server.process.pid, second.pid} < end.memory.keys()
    for pid in (server.process.pid, second.pid):
        assert end.memory[pid] <= MEMORY_GROWTH * settled.memory[pid], (settled, end)
