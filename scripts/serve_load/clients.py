"""Clients of a server in a process of their own: in a closed loop, or sending requests at given times."""

import asyncio
import json
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from accel.errors import AccelError
from scripts.serve_load.workload import Work

TIMEOUT_S = 300.0
DATA, DONE = "data: ", "data: [DONE]"


@dataclass(frozen=True)
class Timing:
    """When a request was sent and answered, on `time.perf_counter`'s clock.

    Attributes:
        sent: When it was sent; in an open loop when it was due, so that a client that falls behind counts as latency.
        first: When the first text arrived. Of a reply that isn't streamed, the end.
        end: When the reply was complete.
        tokens: Number of new tokens, as the server counts them.
    """

    sent: float
    first: float
    end: float
    tokens: int

    @property
    def first_token_s(self) -> float:
        """Time to first token."""
        return self.first - self.sent

    @property
    def token_s(self) -> float:
        """Time per output token, without the first."""
        return (self.end - self.first) / max(1, self.tokens - 1)


def closed_loop(port: int, work: Sequence[Work], clients: int, stream: bool) -> list[Timing]:
    """Let clients send all requests, each one after the other, and return the timing of each request.

    Args:
        port: The server's port on this machine.
        work: The requests.
        clients: Number of clients.
        stream: Ask for replies in parts.

    Raises:
        AccelError: A reply is an error, or has another number of tokens than asked for.
    """

    async def run() -> list[Timing]:
        left = iter(work)
        timings: list[Timing] = []

        async def client() -> None:
            async with _http(port) as http:
                for each in left:
                    timings.append(await _request(http, each, stream, time.perf_counter()))

        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client())
        return timings

    return _run(run())


def open_loop(port: int, work: Sequence[Work], arrivals: Sequence[float]) -> list[Timing]:
    """Send each request at its time, whether or not earlier ones are answered, and return their timings.

    Args:
        port: The server's port on this machine.
        work: The requests, whose replies are streamed.
        arrivals: When each of them is due, in seconds from the begin.

    Raises:
        AccelError: As `closed_loop`.
    """

    async def run() -> list[Timing]:
        start = time.perf_counter()
        idle: list[httpx2.AsyncClient] = []  # a connection each, which later requests use again

        async def send(each: Work, due: float) -> Timing:
            await asyncio.sleep(due - time.perf_counter())
            http = idle.pop() if idle else _http(port)
            timing = await _request(http, each, True, due)
            idle.append(http)
            return timing

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(send(each, start + at)) for each, at in zip(work, arrivals, strict=True)]
        for http in idle:
            await http.aclose()
        return [task.result() for task in tasks]

    return _run(run())


def _run(loads: Coroutine[Any, Any, list[Timing]]) -> list[Timing]:
    """Run a load on an event loop; its first error ends it."""
    try:
        return asyncio.run(loads)
    except* (AccelError, httpx2.HTTPError) as errors:
        error = errors.exceptions[0]
        raise AccelError(str(error) or type(error).__name__) from error


def _http(port: int) -> httpx2.AsyncClient:
    """Return a client with a connection of its own.

    Without certificates, as it uses no TLS: reading them takes 45 ms a client, in which all of this process wait.
    """
    return httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S, verify=False)


async def _request(http: httpx2.AsyncClient, work: Work, stream: bool, sent: float) -> Timing:
    """Send one request and read its reply."""
    body = {"model": "model", "prompt": work.prompt, "max_tokens": work.new_tokens, "temperature": 0}
    if stream:
        timing = await _streamed(http, body, sent)
    else:
        reply = await http.post("/v1/completions", json=body)
        if reply.status_code != 200:
            raise AccelError(f"the server answered {reply.status_code}: {reply.text}")
        end = time.perf_counter()
        timing = Timing(sent, end, end, reply.json()["usage"]["completion_tokens"])
    if timing.tokens != work.new_tokens:
        raise AccelError(f"a reply has {timing.tokens} new tokens in place of {work.new_tokens}")
    return timing


async def _streamed(http: httpx2.AsyncClient, body: dict[str, object], sent: float) -> Timing:
    """Send a request and read its events."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    first, last = 0.0, ""
    async with http.stream("POST", "/v1/completions", json=body | options) as reply:
        if reply.status_code != 200:
            raise AccelError(f"the server answered {reply.status_code}: {(await reply.aread()).decode()}")
        async for line in reply.aiter_lines():
            if line.startswith(DATA) and line != DONE:
                first, last = first or time.perf_counter(), line
    event = json.loads(last.removeprefix(DATA) or "{}")
    if not event.get("usage"):
        raise AccelError(f"a stream ended with {last!r} in place of the numbers of tokens")
    return Timing(sent, first, time.perf_counter(), event["usage"]["completion_tokens"])
