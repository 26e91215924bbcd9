"""What a server does whatever its models say: errors, limits, clients that vanish, are slow or hostile."""

import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest

from accel.serve.protocol import Finished, FinishReason, Tokens
from tests.serve.servers import LIMITS, PlayedScheduler, Running, byte_tokenizer

Play = Callable[..., tuple[Running, PlayedScheduler]]
TOKENIZER = byte_tokenizer()
COMPLETION = {"model": "played", "prompt": "ab"}


def tokens(text: str) -> Tokens:
    """Return the event of a text's tokens."""
    return Tokens(tuple(TOKENIZER(text)["input_ids"]))


def replies(*events: Any) -> Callable[[int], Any]:
    """Return what answers every request with these events."""
    return lambda _: events


STOP = Finished(FinishReason.STOP)


@pytest.mark.parametrize(
    ("body", "param", "parts"),
    [
        ({}, "model", ("model", "required")),
        ({"model": "played"}, "prompt", ("prompt", "required")),
        (COMPLETION | {"prompt": ""}, "prompt", ("empty",)),
        (COMPLETION | {"prompt": []}, "prompt", ("prompt",)),
        (COMPLETION | {"prompt": [1, 900]}, "prompt", ("900", "258")),
        (COMPLETION | {"prompt": [-1]}, "prompt", ("prompt",)),
        (COMPLETION | {"prompt": "\ud800"}, "prompt", ("Unicode",)),
        (COMPLETION | {"max_tokns": 3}, "max_tokns", ("max_tokns", "max_tokens")),
        (COMPLETION | {"max_tokens": 0}, "max_tokens", ("max_tokens", "1")),
        (COMPLETION | {"max_tokens": 99999}, "max_tokens", ("max_tokens=99999", "2048")),
        (COMPLETION | {"temperature": -1}, "temperature", ("temperature", "0")),
        (COMPLETION | {"temperature": "hot"}, "temperature", ("temperature", "number")),
        (COMPLETION | {"top_p": 0}, "top_p", ("top_p",)),
        (COMPLETION | {"top_k": -3}, "top_k", ("top_k=-3",)),
        (COMPLETION | {"n": 17}, "n", ("17 sequences", "16")),
        (COMPLETION | {"n": 2, "num_beams": 4}, "n", ("beam",)),
        (COMPLETION | {"stop": [""]}, "stop", ("stop",)),
        (COMPLETION | {"stop_strings": ["a"]}, "stop_strings", ("use stop",)),
        (COMPLETION | {"logprobs": 99}, "logprobs", ("logprobs", "20")),
        (COMPLETION | {"logit_bias": {"5": 1000}}, "logit_bias", ("logit_bias", "100")),
        (COMPLETION | {"presence_penalty": 1}, "presence_penalty", ("repetition_penalty",)),
        (COMPLETION | {"output_scores": True}, "output_scores", ("output_scores",)),
        (COMPLETION | {"response_format": {"type": "json_schema"}}, "response_format", ("json_schema",)),
        (COMPLETION | {"eos_token_id": 4000}, "eos_token_id", ("4000",)),
    ],
)
def test_bodies_that_cannot_be_used(body: dict[str, Any], param: str, parts: tuple[str, ...], play: Play) -> None:
    """Each is answered with 400 and a message that names field, value and what is allowed."""
    server, scheduler = play()
    reply = server.http.post("/v1/completions", content=json.dumps(body), headers={"Content-Type": "application/json"})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error"), error
    for part in parts:
        assert part in error["message"]
    assert not scheduler.requests


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (b'{"model": "played", "prompt": ', "application/json"),
        (b"\xff\xfe\x00", "application/json"),
        (b"[" * 100_000, "application/json"),
        (b"[]", "application/json"),
        (b"null", "application/json"),
        (b"", "application/json"),
        (b'{"model": "played", "prompt": "a"}', "text/plain"),
        (b'{"model": "played", "prompt": NaN}', "application/json"),
    ],
)
def test_malformed_bodies(content: bytes, content_type: str, play: Play) -> None:
    server, _ = play()
    reply = server.http.post("/v1/completions", content=content, headers={"Content-Type": content_type})
    assert reply.status_code == 400
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert server.http.get("/health").json() == {"status": "alive"}


def test_unknown_models_and_routes(play: Play) -> None:
    server, _ = play()
    with pytest.raises(openai.NotFoundError, match="Did you mean played"):
        server.openai.completions.create(model="plaid", prompt="a")
    with pytest.raises(openai.NotFoundError, match="played"):
        server.openai.models.retrieve("nothing")
    assert server.http.get("/v2").json()["error"]["type"] == "not_found_error"
    assert server.http.get("/v1/completions").status_code == 405


def test_full_queue(play: Play) -> None:
    """429 says when to try again, and the sequences of the same request that had a place are cancelled."""
    server, scheduler = play()
    scheduler.room = 2
    reply = server.post("/v1/completions", **COMPLETION, n=3)
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")
    assert reply.json()["error"]["code"] == "queue_full"
    assert scheduler.cancels == 2
    with pytest.raises(openai.RateLimitError, match="waiting"):
        server.openai.completions.create(**COMPLETION)  # type: ignore[arg-type]


def test_prompt_too_long(play: Play) -> None:
    server, _ = play(max_prompt_tokens=8)
    for prompt in ("ab" * 5, "a" * 100_000):
        reply = server.post("/v1/completions", model="played", prompt=prompt)
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "context_length_exceeded")
        assert "8 tokens" in reply.json()["error"]["message"]


def test_timeout(play: Play) -> None:
    """504 before the reply began; the last event of a stream that has begun."""
    server, scheduler = play(timeout_s=9)
    scheduler.on_submit = replies(tokens("ab"), Finished(FinishReason.TIMEOUT))
    reply = server.post("/v1/completions", **COMPLETION)
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
    assert "9 s" in reply.json()["error"]["message"]
    assert abs((scheduler.requests[0].deadline or 0) - time.monotonic() - 9) < 5
    with pytest.raises(openai.APIError, match="longer than 9 s"):
        list(server.openai.completions.create(**COMPLETION, stream=True))  # type: ignore[call-overload]


def test_fault_of_the_scheduler(play: Play) -> None:
    """The client learns that, and not what, went wrong."""
    server, scheduler = play()
    scheduler.on_submit = replies(Finished(FinishReason.ERROR, OSError("/home/secret/model.onnx is broken")))
    reply = server.post("/v1/completions", **COMPLETION)
    assert reply.status_code == 500
    assert "secret" not in reply.text
    assert reply.headers["x-request-id"]
    events = server.post("/v1/completions", **COMPLETION, stream=True).text
    assert "internal_error" in events
    assert "secret" not in events
    assert "[DONE]" not in events


def test_fault_of_the_server(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that nobody expected is answered in OpenAI's shape, without its text."""
    server, scheduler = play()
    monkeypatch.setattr(scheduler, "submit", lambda *_: 1 / 0)
    reply = server.post("/v1/completions", **COMPLETION)
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal_error")
    assert "division" not in reply.text
    assert reply.headers["x-request-id"]


def test_api_key(play: Play) -> None:
    server, scheduler = play(api_key="right")
    scheduler.on_submit = replies(tokens("xy"), STOP)
    assert server.openai.completions.create(**COMPLETION).choices[0].text == "xy"  # type: ignore[call-overload]
    with pytest.raises(openai.AuthenticationError, match="API key"):
        server.openai.with_options(api_key="wrong").models.list()
    for path, status in (("/metrics", 401), ("/v1/models", 401), ("/health", 200), ("/ready", 200), ("/", 200)):
        assert server.http.get(path).status_code == status
    for header in ("right", "Basic right", "Bearer", "Bearer rightx", "Bearer \u00e9".encode()):
        assert server.http.get("/v1/models", headers=[("Authorization", header)]).status_code == 401


@pytest.mark.parametrize("chunked", [False, True])
def test_body_of_50_megabytes(chunked: bool, play: Play) -> None:
    """413, whether the body says how long it is or not, and the client gets to read it."""
    server, _ = play()
    part = b"x" * 1_000_000
    content: Any = (part for _ in range(50)) if chunked else part * 50
    reply = server.http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert reply.status_code == 413
    assert "25 MB" in reply.json()["error"]["message"]
    assert server.http.get("/health").status_code == 200


def connect(server: Running) -> socket.socket:
    """Return a connection whose receive buffer is small."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(20)
    connection.connect(("127.0.0.1", server.port))
    return connection


def request(body: dict[str, Any], route: str = "/v1/completions") -> bytes:
    """Return the bytes of an HTTP request."""
    content = json.dumps(body).encode()
    head = (
        f"POST {route} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


@pytest.mark.parametrize("first", [b"", b"POST /v1/completions HTTP/1.1\r\n"])
def test_slow_head(first: bytes, play: Play) -> None:
    """A client that sends nothing, or a head byte by byte, is cut off after `head_timeout_s`."""
    server, _ = play(head_timeout_s=0.5)
    connection = connect(server)
    connection.sendall(first)
    start = time.monotonic()
    with pytest.raises(ConnectionError):  # noqa: PT012
        while time.monotonic() < start + 10:
            if first:
                connection.sendall(b"x")
            else:
                connection.settimeout(10)
                if connection.recv(1) == b"":
                    raise ConnectionResetError
            time.sleep(0.1)
    assert time.monotonic() - start < 5
    assert server.http.get("/health").status_code == 200


def test_endless_head(play: Play) -> None:
    """Refused once it has more than 64 KB; a long one that ends before is not, nor are several over one connection."""
    server, _ = play()
    line = b"x-%d: " + b"x" * 1000 + b"\r\n"
    connection, start = connect(server), time.monotonic()
    with pytest.raises(ConnectionError):  # noqa: PT012
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        for number in range(1000):
            connection.sendall(line % number)
        while connection.recv(4096):
            pass
        raise ConnectionResetError
    assert time.monotonic() - start < LIMITS.head_timeout_s / 2
    connection = connect(server)
    for _ in range(3):
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        for number in range(50):
            connection.sendall(line % number)
        connection.sendall(b"\r\n")
        connection.settimeout(10)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
    for garbage in (b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n"):
        connection = connect(server)
        connection.settimeout(10)
        connection.sendall(garbage)
        assert connection.recv(4096).startswith(b"HTTP/1.1 400 ")
    assert server.http.get("/health").status_code == 200


def test_slow_body(play: Play) -> None:
    """A body that doesn't arrive is answered with 408."""
    server, _ = play(body_timeout_s=0.3)
    connection = connect(server)
    connection.sendall(request(COMPLETION)[:-5])
    assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("stream", [False, True])
def test_vanished_client(stream: bool, play: Play) -> None:
    """A request whose client closes the connection is cancelled."""
    server, scheduler = play()
    connection = connect(server)
    connection.sendall(request(COMPLETION | {"stream": stream}))
    assert scheduler.submitted.wait(10)
    scheduler.listeners[0](tokens("ab"))
    if stream:
        assert b"200 OK" in connection.recv(4096)
    assert not scheduler.cancelled.wait(0.3)
    connection.close()
    assert scheduler.cancelled.wait(10)


class LongTexts:
    """Tokenizer whose tokens are long, so that few of them fill all buffers."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        """Return one id."""
        return {"input_ids": [5]}

    def __len__(self) -> int:
        return 259

    def decode(self, ids: list[int], **_: Any) -> str:
        """Return 10,000 letters for each id."""
        return "x" * 10_000 * len(ids)


def test_stream_that_nobody_reads(play: Play) -> None:
    """Its connection is cut after `unread_timeout_s`, and its request cancelled; memory stays bounded."""
    server, scheduler = play(tokenizer=LongTexts(), unread_timeout_s=0.5, max_unread_tokens=10**6)
    connection = connect(server)
    connection.sendall(request(COMPLETION | {"stream": True}))
    assert scheduler.submitted.wait(10)
    start = time.monotonic()
    while not scheduler.cancelled.is_set() and time.monotonic() < start + 10:
        scheduler.listeners[0](Tokens((5,) * 20))
        time.sleep(0.03)
    assert scheduler.cancelled.is_set()
    assert server.http.get("/health").status_code == 200
    connection.close()


def test_tokens_that_nobody_reads(play: Play) -> None:
    """More tokens than `max_unread_tokens` at once cancel the request."""
    server, scheduler = play(max_unread_tokens=100)
    connection = connect(server)
    connection.sendall(request(COMPLETION | {"stream": True}))
    assert scheduler.submitted.wait(10)
    scheduler.listeners[0](tokens("x" * 50))
    assert not scheduler.cancelled.wait(0.3)
    scheduler.listeners[0](tokens("x" * 101))
    assert scheduler.cancelled.wait(10)
    connection.close()


def test_requests_in_progress_end_before_the_server(play: Play) -> None:
    """After `stop` a running stream goes on to its end, and new connections are refused."""
    server, scheduler = play()
    connection = connect(server)
    connection.sendall(request(COMPLETION | {"stream": True}))
    assert scheduler.submitted.wait(10)
    server.server.stop()
    time.sleep(0.5)
    with pytest.raises(ConnectionRefusedError):
        connect(server)
    scheduler.listeners[0](tokens("the end"))
    scheduler.listeners[0](STOP)
    received = b""
    while part := connection.recv(4096):
        received += part
    assert b"the end" in received
    assert b"[DONE]" in received


def test_not_ready_before_the_warm_up(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """While models warm up, `/health` answers, `/ready` and generation say 503."""
    gate = threading.Event()
    monkeypatch.setattr(PlayedScheduler, "warm_up", lambda self: gate.wait(20) and None)
    opened: list[Any] = []
    thread = threading.Thread(target=lambda: opened.append(play(port=0)))
    seen: list[int] = []
    monkeypatch.setattr("tests.serve.servers.listen", lambda host, port: _noting(seen, host, port))
    thread.start()
    while not seen:
        time.sleep(0.01)
    address = f"http://127.0.0.1:{seen[0]}"
    import httpx2

    assert httpx2.get(f"{address}/health").status_code == 200
    assert httpx2.get(f"{address}/ready").status_code == 503
    assert httpx2.post(f"{address}/v1/completions", json=COMPLETION).json()["error"]["code"] == "not_ready"
    gate.set()
    thread.join(20)
    assert httpx2.get(f"{address}/ready").json() == {"status": "ready"}


def _noting(seen: list[int], host: str, port: int) -> socket.socket:
    """Listen, and note the port."""
    from accel.serve.http.lifecycle import listen

    listener = listen(host, port)
    seen.append(listener.getsockname()[1])
    return listener


def test_metrics_and_log(play: Play, caplog: pytest.LogCaptureFixture) -> None:
    """Both count what happened; neither holds any text."""
    server, scheduler = play()
    scheduler.on_submit = replies(tokens("secret"), tokens(" answer"), STOP)
    caplog.set_level("INFO", "accel.serve.requests")
    server.post("/v1/completions", model="played", prompt="private", n=2)
    server.post("/v1/completions", model="who/knows", prompt="private")
    text = server.http.get("/metrics").text
    for line in (
        'accel_requests_waiting{model="played"} 3.0',
        'accel_requests_running{model="played"} 5.0',
        'accel_batch_rows{model="played"} 8.0',
        'accel_cache_used_tokens{model="played"} 77.0',
        'accel_cache_tokens{model="played"} 512.0',
        'accel_generated_tokens_total{model="played"} 1234.0',
        'accel_http_requests_total{model="played",route="/v1/completions",status="200"} 1.0',
        'accel_http_requests_total{model="",route="/v1/completions",status="404"} 1.0',
        'accel_time_to_first_token_seconds_count{model="played"} 1.0',
        'accel_prompt_tokens_total{model="played"} 7.0',
    ):
        assert line in text
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "accel.serve.requests"]
    first, second = lines[:2]
    assert {name: first[name] for name in ("route", "status", "model", "sequences", "prompt_tokens")} == {
        "route": "/v1/completions",
        "status": 200,
        "model": "played",
        "sequences": 2,
        "prompt_tokens": 7,
    }
    assert (first["completion_tokens"], first["finish_reasons"]) == (26, ["stop", "stop"])
    assert second["status"] == 404
    assert "secret" not in str(lines) + text
    assert "private" not in str(lines) + text


def test_coalesced_events_are_the_same_text(play: Play) -> None:
    """Tokens that arrive together are one event; a stop string across events ends the text and the request."""
    server, scheduler = play()
    scheduler.on_submit = replies(tokens("one "), tokens("tw"), tokens("o EN"), tokens("D three"), STOP)
    stream = server.openai.completions.create(**COMPLETION, stop="END", stream=True)  # type: ignore[call-overload]
    events = list(stream)
    assert "".join(event.choices[0].text for event in events) == "one two "
    assert events[-1].choices[0].finish_reason == "stop"
    assert len(events) <= 2
    assert scheduler.cancels >= 1
