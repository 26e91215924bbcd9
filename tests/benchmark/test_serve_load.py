"""`scripts/serve_load` loads a server in closed loops and in an open one, beside the offline rate of its model."""

import json
import re
import statistics
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from accel.errors import AccelError
from scripts.serve_load import __main__ as script
from scripts.serve_load import clients
from scripts.serve_load.clients import Timing
from scripts.serve_load.workload import Work, arrival_times, random_work
from tests.conftest import Build

STEP_S = 0.03


class Handler(BaseHTTPRequestHandler):
    """Streams a token every `STEP_S`; a prompt that begins with 400 is refused, one with 7 has a token too few."""

    protocol_version = "HTTP/1.1"
    most = now = 0
    lock = threading.Lock()

    def do_POST(self) -> None:
        """Answer a request."""
        with self.lock:
            Handler.now += 1
            Handler.most = max(Handler.most, Handler.now)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        count = body["max_tokens"] - (body["prompt"][0] == 7)
        usage = {"usage": {"completion_tokens": count}}
        parts = [{"choices": [{"text": "a"}], "usage": None}] * count if body.get("stream") else []
        text = b""
        self.send_response(body["prompt"][0] if body["prompt"][0] == 400 else 200)
        self.send_header("Connection", "close")
        self.end_headers()
        for part in parts:
            time.sleep(STEP_S)
            self.wfile.write(b"data: " + json.dumps(part).encode() + b"\n\n")
            self.wfile.flush()
        text = json.dumps({"choices": []} | usage).encode()
        self.wfile.write(b"data: " + text + b"\n\ndata: [DONE]\n\n" if parts else text)
        with self.lock:
            Handler.now -= 1
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Write nothing."""


@pytest.fixture
def port() -> Iterator[int]:
    Handler.most = Handler.now = 0
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield http.server_port
    http.shutdown()
    http.server_close()
    thread.join()


def test_work() -> None:
    """The same each time, of all lengths between the bounds; another seed gives other prompts."""
    work = random_work(200, 50, [2, 5], [3, 4])
    assert work == random_work(200, 50, [2, 5], [3, 4])
    assert work != random_work(200, 50, [2, 5], [3, 4], 1)
    assert {len(each.prompt) for each in work} == {2, 3, 4, 5}
    assert {each.new_tokens for each in work} == {3, 4}
    assert {token for each in work for token in each.prompt} == set(range(3, 50))


def test_arrivals() -> None:
    """Gaps are exponentially distributed: their mean is 1 / rate, and so is their standard deviation."""
    times = arrival_times(4000, 50.0)
    gaps = [later - sooner for sooner, later in zip([0.0, *times], times, strict=False)]
    assert min(gaps) > 0
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.05)


def test_closed_loop(port: int) -> None:
    """As many requests at once as clients; times of tokens where replies are streamed."""
    work = [Work([5, 6], tokens) for tokens in (4, 6, 4, 6, 4, 6)]
    timings = clients.closed_loop(port, work, 3, stream=True)
    assert Handler.most == 3
    assert sorted(each.tokens for each in timings) == [4, 4, 4, 6, 6, 6]
    for each in timings:
        assert each.first_token_s >= STEP_S
        assert STEP_S * 0.8 <= each.token_s < each.end - each.sent
        assert each.end - each.sent >= each.tokens * STEP_S
    whole = clients.closed_loop(port, work, 2, stream=False)
    assert len(whole) == 6
    assert all(each.first == each.end for each in whole)


def test_open_loop(port: int) -> None:
    """Requests are sent when they are due, whether or not others are answered."""
    arrivals = [0.0, 0.05, 0.1, 0.5]
    timings = clients.open_loop(port, [Work([5], 10)] * 4, arrivals)
    assert [each.sent - timings[0].sent for each in timings] == pytest.approx(arrivals)
    assert Handler.most >= 3
    assert all(each.token_s >= STEP_S * 0.8 for each in timings)


def test_wrong_replies(port: int) -> None:
    for prompt, message in (([400], "answered 400"), ([7], "2 new tokens in place of 3")):
        for stream in (True, False):
            with pytest.raises(AccelError, match=message):
                clients.closed_loop(port, [Work(prompt, 3)] * 2, 2, stream)


def test_a_row() -> None:
    """Throughput counts from the first request sent to the last reply, and quantiles are in milliseconds."""
    timings = [Timing(1.0, 1.5, 3.0, 4), Timing(2.0, 2.1, 5.0, 12)]
    row = script.row("x", timings, streamed=True)
    assert (row.tokens_per_second, row.requests_per_second) == (4.0, 0.5)
    assert timings[0].first_token_s == 0.5
    assert timings[0].token_s == pytest.approx(0.5)


@pytest.fixture(scope="module")
def folder(build: Build, tiny: Path) -> Path:
    return build(tiny, "verify", ("runtime.static=true",))[1]["verify"].folder


@pytest.mark.slow
def test_two_servers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All loads, over real servers in processes of their own; without a GPU both compute on the CPU."""
    arguments = ["--clients", "4", "--requests", "12", "--new-tokens", "6", "9", "--devices", "0,1"]
    assert script.main([str(folder), "--runtime", "cpu", *arguments]) == 0
    out = capsys.readouterr().out
    assert "RowScheduler, engine onnxruntime, torch.float32" in out
    assert "4 clients and as many rows, 12 requests of 4 to 24 prompt tokens and 6 to 9 new tokens" in out
    names = (
        "offline, 4 rows",
        "closed loop, whole",
        "closed loop, streamed",
        "open loop",
        "2 devices, whole",
        "2 devices, streamed",
    )
    lines = {name: next(line for line in out.splitlines() if line.startswith(name)) for name in names}
    assert [len(re.findall(r"\d+\.\d+", lines[name][32:])) for name in names] == [2, 5, 9, 9, 5, 9]
    assert len(re.findall(r"[\d.]+ times one device", out)) == 2


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--clients", "1"], "--clients 1"),
        (["--new-tokens", "5", "3"], "--new-tokens 5 3"),
        (["--prompt-tokens", "0"], "--prompt-tokens 0"),
        (["--new-tokens", "1", "2", "3"], "--new-tokens 1 2 3"),
        (["--devices", "cuda:0"], "--devices cuda:0"),
    ):
        with pytest.raises(SystemExit):
            script.main([str(tmp_path), *arguments])
        assert message in capsys.readouterr().err
