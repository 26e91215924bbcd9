"""`scripts/serve_peers` sends the same requests to each server, and counts which replies are right."""

import asyncio
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from accel.errors import AccelError
from scripts.peers.checkpoint import save_random_t5
from scripts.scheduler_load import Load, run_clients
from scripts.serve_peers import __main__ as script
from scripts.serve_peers.server import Reply, Server, Work

ECHO = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self): self.reply(200, {})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = f"{body['model']} {body['prompt']} {body['temperature']}"
        self.reply(400 if body["prompt"] == "bad" else 200,
            {"choices": [{"text": text}], "usage": {"completion_tokens": body["max_tokens"]}})
    def reply(self, status, body):
        self.send_response(status); self.end_headers(); self.wfile.write(json.dumps(body).encode())
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def server(code: str, log: Path) -> Server:
    return Server(
        "echo", [sys.executable, "-c", code.replace("{", "{{").replace("}", "}}"), "{port}"], "/", "m", log, 1, 60
    )


def test_a_server(tmp_path: Path) -> None:
    """Requests and replies; errors name the server; its process ends with the context."""
    with server(ECHO, tmp_path / "log") as opened:
        load = run_clients(opened.answer, [Work("a", 3), Work([5, 6], 4)], 2)
        assert load.replies == [Reply("m a 0", 3), Reply("m [5, 6] 0", 4)]
        with pytest.raises(AccelError, match="echo answered 400"):
            run_clients(opened.answer, [Work("bad", 1)] * 4, 2)
        process = opened._process
    assert process.returncode is not None
    with pytest.raises(AccelError, match="echo ended: no model"):
        server("raise SystemExit('no model')", tmp_path / "log")


def test_the_table() -> None:
    load = Load(2.0, [Reply("a", 3), Reply("b", 5)], [0.5, 1.5])
    line = script.report("accel", load, ["a", "c"])
    assert "1.00 requests/s" in line
    assert "4.0 tokens/s" in line
    assert "p50   1.00 s" in line
    assert line.endswith("1 of 2 equal")


def test_the_work_and_what_is_expected(tmp_path: Path) -> None:
    """The same each time, of mixed lengths; what is expected has many distinct tokens."""
    small = {"vocab_size": 500, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    save_random_t5(tmp_path, **small)
    work = script.mixed_work(tmp_path, False, 12)
    assert work == script.mixed_work(tmp_path, False, 12)
    assert len({(len(each.prompt), each.new_tokens) for each in work}) > 8
    assert all(isinstance(each.prompt, str) for each in script.mixed_work(tmp_path, True, 3))
    texts = script.expected_texts(tmp_path, False, work)
    assert len(set(texts)) > 8
    assert all(0 < len(text.split()) <= each.new_tokens for text, each in zip(texts, work, strict=True))


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--clients", "0"], "--clients 0"),
        (["--model", str(tmp_path)], "config.json is missing"),
    ):
        with pytest.raises(SystemExit):
            script.main([str(tmp_path), *arguments])
        assert message in capsys.readouterr().err


class Translator:
    """Answers each source by itself, backwards, and notes how many it got at once."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def translate_batch(self, sources: Sequence[list[str]], **options: Any) -> list[Any]:
        """Return hypotheses as long as the batch's limit allows."""
        self.batches.append(len(sources))
        limit = options["max_decoding_length"]
        return [SimpleNamespace(hypotheses=[[*reversed(source), "</s>"][:limit]]) for source in sources]


@pytest.fixture
def application(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Module of the application, which imports CTranslate2."""
    monkeypatch.setitem(sys.modules, "ctranslate2", SimpleNamespace())
    from scripts.serve_peers import ctranslate2_app

    yield ctranslate2_app
    sys.modules.pop("scripts.serve_peers.ctranslate2_app")


def test_the_application(application: Any) -> None:
    """Requests that wait form a batch; each gets its own reply, cut to its own length."""
    translator = Translator()
    app = application.create_app(translator, [f"w{number}" for number in range(50)])

    async def ask() -> list[dict[str, Any]]:
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://app") as client:
            bodies = [{"prompt": [number, number + 1], "max_tokens": 1 + number % 3} for number in range(10)]
            replies = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
        return [reply.json() for reply in replies]

    for number, reply in enumerate(asyncio.run(ask())):
        tokens = [f"w{number + 1}", f"w{number}", "</s>"][: 1 + number % 3]
        assert reply["choices"][0]["text"] == " ".join(token for token in tokens if token != "</s>")
        assert reply["usage"]["completion_tokens"] == len(tokens)
    assert sum(translator.batches) == 10
    assert max(translator.batches) > 1
