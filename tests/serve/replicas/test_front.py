"""What clients are told when a replica is lost, slow or not there: over real HTTP, and replicas that the test plays."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx2
import openai
import pytest

from accel.serve.http.lifecycle import Server, listen
from accel.serve.protocol import Status
from accel.serve.replicas.cluster import import_ray
from accel.serve.requests.errors import not_ready
from accel.serve.requests.request_log import Record
from tests.serve.servers import LIMITS

START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream; charset=utf-8")],
}
PLAIN = START | {"headers": [(b"content-type", b"application/json")]}
EVENT = {"type": "http.response.body", "body": b'data: {"choices": []}\n\n', "more_body": True}
LAST = {"type": "http.response.body", "body": b"data: [DONE]\n\n"}
BODY = {"model": "played", "prompt": "ab"}


class Parts:
    """Parts of a reply, as Ray's generator yields them.

    Args:
        steps: Messages of each part, an exception, or seconds to wait.
        record: What the replica notes.
    """

    def __init__(self, steps: list[Any], record: Record) -> None:
        self._steps, self._record = steps, record
        self.cancelled = threading.Event()

    async def __aiter__(self) -> AsyncIterator[Any]:
        for step in self._steps:
            if isinstance(step, Exception):
                raise step
            if isinstance(step, float):
                await asyncio.sleep(step)
            else:
                yield step, self._record

    def cancel(self) -> None:
        """Remember that the request was cancelled; of a request that failed, Ray raises the error again."""
        self.cancelled.set()
        for step in self._steps:
            if isinstance(step, Exception):
                raise step


class PlayedReplicas:
    """Replicas whose replies a test says.

    Attributes:
        steps: Parts of the next reply; None: no replica is warm.
        calls: What was asked of them, and the reply.
    """

    def __init__(self) -> None:
        self.steps: list[Any] | None = []
        self.calls: list[tuple[dict[str, Any], bytes, Parts]] = []

    def warm_up(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def watch(self, on_failure: Callable[[Exception], None]) -> None:
        """Do nothing: no replica ends by itself."""

    async def is_ready(self) -> bool:
        """Return whether there are replies."""
        return self.steps is not None

    async def states(self) -> dict[tuple[str, ...], Status]:
        """Return states of one model in two replicas."""
        return {("m", "a"): Status(3, 5, 8, 77, 512, 1234), ("m", "b"): Status(0, 1, 8, 7, 512, 10)}

    def answer(self, scope: dict[str, Any], body: bytes, record: Record) -> Parts:
        """Return the reply."""
        if self.steps is None:
            raise not_ready()
        noted = Record("POST", id="other", route="/v1/completions", model="m", sequences=1, prompt_tokens=7)
        noted.first_token_s = 0.25
        self.calls.append((scope, body, Parts(self.steps, noted)))
        return self.calls[-1][2]


@contextmanager
def front(api_key: str | None = None, **limits: Any) -> Iterator[tuple[httpx2.Client, PlayedReplicas, int]]:
    """Serve over played replicas; yield a client, the replicas and the port."""
    import_ray(None)
    from accel.serve.replicas.front import create_front

    replicas: Any = PlayedReplicas()
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    config = replace(LIMITS, **limits)
    ready = threading.Event()
    server = Server(create_front(replicas, config, api_key), replicas, listener, config, ready.set)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert ready.wait(20)
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            yield client, replicas, port
    finally:
        server.stop()
        thread.join(20)
    assert not thread.is_alive()


def lost() -> Exception:
    """Return what Ray raises for a request whose replica ended."""
    from ray.exceptions import ActorDiedError

    error: Exception = ActorDiedError()
    return error


def full() -> Exception:
    """Return what Ray Serve raises for a request that finds no place in its queue."""
    from ray.serve.exceptions import BackPressureError

    error: Exception = BackPressureError(256, 256)
    return error


def test_a_reply_is_passed_on() -> None:
    """Body, query and headers reach the replica; its messages, and what it notes, reach client, log and metrics."""
    with front() as (client, replicas, _):
        replicas.steps = [[START], 0.05, [EVENT, EVENT], [LAST]]
        reply = client.post("/v1/completions?a=b", json=BODY)
        assert reply.text.count("choices") == 2
        assert reply.text.endswith("data: [DONE]\n\n")
        ((scope, body, parts),) = replicas.calls
        assert (scope["method"], scope["path"], scope["query_string"]) == ("POST", "/v1/completions", b"a=b")
        assert body == reply.request.content
        assert (b"content-type", b"application/json") in scope["headers"]
        assert not parts.cancelled.is_set()
        deadline = time.monotonic() + 5  # the record is written after the reply
        while "accel_http_requests_total{" not in (metrics := client.get("/metrics").text):
            assert time.monotonic() < deadline
    for line in (
        'accel_requests_waiting{model="m",replica="a"} 3.0',
        'accel_requests_running{model="m",replica="b"} 1.0',
        'accel_http_requests_total{model="m",route="/v1/completions",status="200"} 1.0',
        'accel_prompt_tokens_total{model="m"} 7.0',
        'accel_time_to_first_token_seconds_sum{model="m"} 0.25',
    ):
        assert line in metrics


@pytest.mark.parametrize(
    ("error", "status", "code"), [(lost, 503, "replica_lost"), (full, 429, "queue_full")], ids=["lost", "full"]
)
def test_errors_before_a_reply(error: Callable[[], Exception], status: int, code: str) -> None:
    """They have OpenAI's shape, and say that another attempt is worth it."""
    with front() as (client, replicas, port):
        replicas.steps = [error()]
        reply = client.post("/v1/completions", json=BODY)
        assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
        assert reply.headers["retry-after"] == "1"
        replicas.steps = [error()]
        api = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        with api, pytest.raises(openai.APIStatusError, match="try again"):
            api.completions.create(**BODY)  # type: ignore[call-overload]


def test_errors_in_a_stream() -> None:
    """The last event of a stream is the error; of any other reply, the connection is closed before its end."""
    with front() as (client, replicas, _):
        replicas.steps = [[START, EVENT], lost()]
        text = client.post("/v1/completions", json=BODY).text
        assert text.startswith('data: {"choices"')
        assert '"code":"replica_lost"' in text.splitlines()[-2]
        assert "[DONE]" not in text
        replicas.steps = [[PLAIN, {"type": "http.response.body", "body": b'{"choices"', "more_body": True}], lost()]
        with pytest.raises(httpx2.RemoteProtocolError):
            client.post("/v1/completions", json=BODY)


@pytest.mark.parametrize("begun", [False, True])
def test_time_without_a_reply(begun: bool) -> None:
    """A request that no replica takes, or doesn't finish, is answered with 504 and cancelled."""
    with front(timeout_s=0.3) as (client, replicas, _):
        replicas.steps = [[START, EVENT], 20.0] if begun else [20.0]
        reply = client.post("/v1/completions", json=BODY)
        assert reply.status_code == (200 if begun else 504)
        assert '"code":"timeout"' in reply.text.replace(": ", ":")
        assert replicas.calls[0][2].cancelled.wait(5)


def test_a_client_that_vanishes() -> None:
    """Its request is cancelled in the replica."""
    with front() as (client, replicas, _):
        replicas.steps = [[START, EVENT], 20.0]
        with client.stream("POST", "/v1/completions", json=BODY) as reply:
            lines = reply.iter_lines()
            assert next(lines).startswith("data")
            assert not replicas.calls[0][2].cancelled.is_set()
        assert replicas.calls[0][2].cancelled.wait(5)


def test_what_the_front_answers_itself() -> None:
    """The key, limits of the body, readiness and the page need no replica."""
    with front(api_key="right", max_body_mb=0.001) as (client, replicas, _):
        replicas.steps = None
        client.headers["Authorization"] = "Bearer right"
        assert client.get("/health").json() == {"status": "alive"}
        assert (client.get("/ready").status_code, client.get("/").status_code) == (503, 200)
        assert client.post("/v1/completions", json=BODY).json()["error"]["code"] == "not_ready"
        assert client.post("/v1/completions", json=BODY | {"prompt": "x" * 2000}).status_code == 413
        client.headers["Authorization"] = "Bearer wrong"
        assert client.post("/v1/completions", json=BODY).status_code == 401
        assert not replicas.calls


def test_a_fault_of_the_program() -> None:
    """An exception in the replica's own code is answered with 500, without its text."""
    from ray.exceptions import RayTaskError

    with front() as (client, replicas, _):
        replicas.steps = [RayTaskError("answer", "Traceback: /home/secret", ValueError("secret"))]
        reply = client.post("/v1/completions", json=BODY)
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal_error")
        assert "secret" not in reply.text
