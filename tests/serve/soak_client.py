"""Clients of a soak: they send requests of mixed kind, some of them bad, and some vanish; every answer is checked."""

import json
import random
import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
from transformers import AutoTokenizer

from accel.models.loading import load

CLIENTS = 16
KINDS = {"whole", "several", "streamed", "sampled", "beams", "bad", "vanish"}
LOST = "lost"
WORDS = ["ice", "cat", "speculative", "photosynthesis", "unquestionably", "neighbourhood", "queue", "rhythm", "zebra"]
BAD: list[tuple[dict[str, Any], int]] = [
    ({"prompt": "ice", "temprature": 1}, 400),
    ({"prompt": "ice", "max_tokens": -1}, 400),
    ({"prompt": 3.5}, 400),
    ({"prompt": "ice" * 5000}, 413),
    ({"model": "nobody", "prompt": "ice"}, 404),
]


class LostError(Exception):
    """The replica that computed a request has ended, as the server said."""


def check_lost(reply: Mapping[str, Any]) -> None:
    """Raise `LostError` if a reply, or an event of one, is the error that a replica's end leads to."""
    if "error" in reply:
        assert reply["error"]["code"] == "replica_lost", reply
        assert "try again" in reply["error"]["message"]
        raise LostError


class Client:
    """A client that sends one random request after the other, and counts what came of them.

    Args:
        address: Scheme, host and port of the server, whose model `g2p` is the embedded T5.
        expected: Word -> its greedy text.
        seed: Seed of its choices.
        headers: Sent with each request.

    Attributes:
        counts: Kind -> requests; `LOST`: those whose replica ended.
    """

    def __init__(
        self, address: str, expected: Mapping[str, str], seed: int, headers: Mapping[str, str] | None = None
    ) -> None:
        self._expected, self._random, self._headers = expected, random.Random(seed), dict(headers or {})
        self._http = httpx2.Client(base_url=address, timeout=120, headers=self._headers)
        self.counts: Counter[str] = Counter()

    def run(self, requests: int) -> None:
        """Send `requests` requests."""
        with self._http:
            for _ in range(requests):
                kinds = [self.whole, self.several, self.streamed, self.sampled, self.beams, self.bad, self.vanish]
                kind = self._random.choices(kinds, [40, 10, 25, 10, 5, 5, 5])[0]
                try:
                    kind()
                except LostError:
                    self.counts[LOST] += 1
                else:
                    self.counts[kind.__name__] += 1

    def post(self, body: dict[str, Any], path: str = "/v1/completions") -> httpx2.Response:
        reply = self._http.post(path, json={"model": "g2p"} | body)
        if reply.status_code == 503:
            check_lost(reply.json())
        return reply

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
                    event = json.loads(line.removeprefix("data: "))
                    check_lost(event)
                    text += event["choices"][0]["text"]
                elif line.startswith("{"):
                    check_lost(json.loads(line))
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
        headers = {"Host": "a", "Content-Type": "application/json", "Content-Length": len(body)} | self._headers
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        with socket.create_connection((self._http.base_url.host, self._http.base_url.port)) as connection:
            connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n{body}".encode())
            begin = connection.recv(100)
            if begin.startswith(b"HTTP/1.1 503"):
                raise LostError
            assert begin.startswith(b"HTTP/1.1 200")


def run_clients(clients: Sequence[Client], requests: int, midway: Callable[[], None] = lambda: None) -> Counter[str]:
    """Run clients at once, and return how many requests of each kind they sent.

    Args:
        clients: The clients.
        requests: Requests of all together.
        midway: Called when they have begun.
    """
    with ThreadPoolExecutor(len(clients)) as threads:
        running = [threads.submit(client.run, requests // len(clients)) for client in clients]
        midway()
        for done in running:
            done.result()
    return sum((client.counts for client in clients), Counter())


def greedy_texts(folder: Path) -> dict[str, str]:
    """Return the text of `generate` for each word alone, by a model of its own."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = {}
    with load(folder, "cpu") as model:
        for word in WORDS:
            ids = model.generate(**tokenizer([word], return_tensors="pt"), do_sample=False)[0, 1:]
            texts[word] = tokenizer.decode(ids, skip_special_tokens=True)
    assert len(set(texts.values())) == len(WORDS)
    return texts
