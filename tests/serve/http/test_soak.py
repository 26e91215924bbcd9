"""Thousands of requests of mixed kind, some of them bad and some from clients that vanish: nothing is wrong or left."""

import json
import os
import random
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from accel.config.presets import runtime_preset
from accel.serve.requests.served_model import open_served, scheduler_limits
from accel.serve.scheduling.batch_scheduler import BatchScheduler
from accel.serve.scheduling.opening import open_scheduler
from accel.serve.scheduling.row_scheduler import RowScheduler
from tests.conftest import Build
from tests.serve.servers import LIMITS, Running, running

pytestmark = pytest.mark.soak

REQUESTS = int(os.environ.get("ACCEL_SOAK_REQUESTS", "10000"))
CLIENTS = 16
SETTLED = 0.1  # share of the requests after which memory may grow by 5% only
MEMORY_GROWTH = 1.05
WORDS = ["ice", "cat", "speculative", "photosynthesis", "unquestionably", "neighbourhood", "queue", "rhythm", "zebra"]
BAD: list[tuple[dict[str, Any], int]] = [
    ({"prompt": "ice", "temprature": 1}, 400),
    ({"prompt": "ice", "max_tokens": -1}, 400),
    ({"prompt": 3.5}, 400),
    ({"prompt": "ice" * 5000}, 413),
    ({"model": "nobody", "prompt": "ice"}, 404),
]


@pytest.fixture(params=[True, False], ids=["rows", "padded batches"])
def server(build: Build, request: pytest.FixtureRequest) -> Iterator[Running]:
    """Server over the embedded T5 alone, in a running batch or in padded ones."""
    overrides = ["model.checkpoint=accel://t5-g2p", "runtime.static=true", "verify.inputs=2", "verify.references=4"]
    folder = build(Path("t5-g2p"), "verify", overrides)[1]["verify"].folder
    scheduler = partial(open_scheduler, limits=scheduler_limits(LIMITS))
    served = open_served("g2p", folder, runtime_preset("cpu", static=request.param), scheduler)
    assert isinstance(served.scheduler, RowScheduler if request.param else BatchScheduler)
    with running([served]) as opened:
        yield opened


class Client:
    """A client that sends one random request after the other, and counts what came of them.

    Args:
        server: The server.
        expected: Word -> its greedy text.
        seed: Seed of its choices.
    """

    def __init__(self, server: Running, expected: dict[str, str], seed: int) -> None:
        self._server, self._expected, self._random = server, expected, random.Random(seed)
        self._http = httpx2.Client(base_url=server.address, timeout=120)
        self.counts: Counter[str] = Counter()

    def run(self, requests: int) -> None:
        """Send `requests` requests."""
        with self._http:
            for _ in range(requests):
                kinds = [self.whole, self.several, self.streamed, self.sampled, self.beams, self.bad, self.vanish]
                kind = self._random.choices(kinds, [40, 10, 25, 10, 5, 5, 5])[0]
                kind()
                self.counts[kind.__name__] += 1

    def post(self, body: dict[str, Any], path: str = "/v1/completions") -> httpx2.Response:
        return self._http.post(path, json={"model": "g2p"} | body)

    def texts(self, body: dict[str, Any]) -> list[str]:
        reply = self.post({"temperature": 0} | body)
        assert reply.status_code == 200, reply.text
        return [choice["text"] for choice in reply.json()["choices"]]

    def whole(self) -> None:
        word = self._random.choice(WORDS)
        assert self.texts({"prompt": word}) == [self._expected[word]]

    def several(self) -> None:
        words = self._random.sample(WORDS, 3)
        assert self.texts({"prompt": words}) == [self._expected[word] for word in words]

    def streamed(self) -> None:
        word, text, last = self._random.choice(WORDS), "", ""
        body = {"model": "g2p", "prompt": word, "temperature": 0, "stream": True}
        with self._http.stream("POST", "/v1/completions", json=body) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                last = line or last
        assert (text, last) == (self._expected[word], "data: [DONE]")

    def sampled(self) -> None:
        body = {"prompt": self._random.choice(WORDS), "temperature": 1.5, "seed": self._random.randrange(4)}
        first, second = self.texts(body), self.texts(body)
        assert first == second

    def beams(self) -> None:
        word = self._random.choice(WORDS)
        reply = self.post({"inputs": word, "parameters": {"num_beams": 3}}, "/v1/generate")
        assert reply.status_code == 200, reply.text

    def bad(self) -> None:
        body, status = self._random.choice(BAD)
        reply = self.post(body)
        assert reply.status_code == status, reply.text
        assert reply.json()["error"]["message"]

    def vanish(self) -> None:
        """Close the connection in the middle of a stream."""
        body = json.dumps({"model": "g2p", "prompt": WORDS[3], "stream": True, "min_new_tokens": 50, "max_tokens": 60})
        head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", self._server.port)) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 200")


def run_clients(server: Running, expected: dict[str, str], requests: int, seed: int) -> Counter[str]:
    """Run all clients at once, and return how many requests of each kind they sent."""
    clients = [Client(server, expected, seed + number) for number in range(CLIENTS)]
    with ThreadPoolExecutor(CLIENTS) as threads:
        for done in [threads.submit(client.run, requests // CLIENTS) for client in clients]:
            done.result()
    return sum((client.counts for client in clients), Counter())


def test_soak(server: Running) -> None:
    """All answers are right, all mistakes are named, and memory, threads and files stay what they were."""
    process = psutil.Process()
    served = server.models["g2p"]
    expected = {}
    for word in WORDS:
        ids = served.model.generate(**served.tokenizer([word], return_tensors="pt"), do_sample=False)[0, 1:]
        expected[word] = served.tokenizer.decode(ids, skip_special_tokens=True)
    assert len(set(expected.values())) == len(WORDS)
    counts = run_clients(server, expected, int(REQUESTS * SETTLED), 0)
    memory, threads, files = process.memory_info().rss, threading.active_count(), process.num_fds()
    counts += run_clients(server, expected, REQUESTS - int(REQUESTS * SETTLED), 1000)
    print(f"{counts.total()} requests: {dict(counts)}; {memory / 1e6:.0f} MB, {process.memory_info().rss / 1e6:.0f} MB")
    assert set(counts) == {"whole", "several", "streamed", "sampled", "beams", "bad", "vanish"}
    assert process.memory_info().rss <= MEMORY_GROWTH * memory
    assert threading.active_count() <= threads
    assert process.num_fds() <= files + CLIENTS  # connections that the system has not closed yet
    status = served.scheduler.status()
    assert (status.waiting, status.running) == (0, 0)
