"""Schedulers behind a connection: a scheduler that the test plays, answered by HTTP on the other side."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import Pipe
from typing import Any

import httpx2
import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, T5Config

from accel.serve.protocol import Finished, FinishReason, QueueFullError, Request, TokenLogprobs, Tokens
from accel.serve.remote import messages
from accel.serve.remote.remote_scheduler import Link, RemoteScheduler
from accel.serve.remote.scheduler_server import SchedulerServer
from accel.serve.requests.served_model import ServedModel
from tests.serve.collector import Collector
from tests.serve.servers import Played, PlayedScheduler, Running, byte_tokenizer, running

BODY: dict[str, Any] = {"model": "played", "prompt": "hello"}
REQUEST = Request({"input_ids": torch.tensor([[3, 4]])})
END = Finished(FinishReason.LENGTH)


class Linked:
    """A played scheduler, and what the other side of a connection makes of it.

    Attributes:
        played: The scheduler.
        scheduler: The same one over the connection.
        model: The model that is served there.
        lost: Errors that `Link` reported.
    """

    def __init__(self) -> None:
        self.played, self.lost = PlayedScheduler(), []
        ours, self._theirs = Pipe()
        tokenizer: Any = byte_tokenizer()
        model: Any = Played(config=T5Config(vocab_size=259), generation_config=GenerationConfig(eos_token_id=2))
        server = SchedulerServer({"played": ServedModel("played", model, self.played, tokenizer)}, self._theirs)
        self.thread = threading.Thread(target=self._serve, args=(server,))
        self.thread.start()
        self._link = Link(ours, self.lost.append)
        self.scheduler = RemoteScheduler(self._link, "played")
        self.model = ServedModel("played", model, self.scheduler, tokenizer)

    def _serve(self, server: SchedulerServer) -> None:
        """Run the server; its end closes the connection, as that of a process does."""
        server.run()
        with suppress(OSError):
            self._theirs.close()

    def end_suddenly(self) -> None:
        """Let the decoding side end, as a process that is killed."""
        socket.socket(fileno=self._theirs.fileno()).shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the link."""
        self._link.close()
        self.thread.join(10)
        assert not self.thread.is_alive()


@pytest.fixture
def linked() -> Iterator[Linked]:
    opened = Linked()
    yield opened
    opened.close()


@pytest.fixture
def server(linked: Linked) -> Iterator[Running]:
    with running([linked.model]) as opened:
        yield opened


def test_events_arrive_in_their_order(linked: Linked) -> None:
    """Alone or several tokens at once, with log probabilities, and the last one, also before `submit` has returned."""
    logprobs = (TokenLogprobs(-0.5, ((7, -0.5), (8, -1.5))),)
    linked.played.on_submit = lambda _: [Tokens((5,)), Tokens((6, 7)), Tokens((8,), logprobs), END]
    collector = Collector()
    linked.scheduler.submit(REQUEST, collector).result(10)
    assert collector.wait() == END
    assert (collector.ids, collector.logprobs, collector.chunks) == ([5, 6, 7, 8], list(logprobs), 3)


def test_a_request_arrives_as_it_was_sent(linked: Linked) -> None:
    mask = torch.tensor([[0, 1]])
    sent = Request(
        {"input_ids": torch.tensor([[3, 4]]), "attention_mask": mask}, {"top_k": 3}, 7, 2, None, 12.5, gather_s=0.25
    )
    linked.scheduler.submit(sent, Collector()).result(10)
    got = linked.played.requests[0]
    assert got.inputs["input_ids"].tolist() == [[3, 4]]
    assert got.inputs["attention_mask"].tolist() == mask.tolist()
    assert (got.generation, got.seed, got.logprobs, got.deadline, got.gather_s) == ({"top_k": 3}, 7, 2, 12.5, 0.25)
    with pytest.raises(TypeError, match="LogitsProcessorList can't be sent"):
        linked.scheduler.submit(Request(sent.inputs, logits_processor=LogitsProcessorList()), Collector())  # type: ignore[arg-type]


@pytest.mark.parametrize("stream", [False, True])
def test_refused(stream: bool, server: Running, linked: Linked) -> None:
    """By the status, also of a reply that would be streamed."""
    linked.played.room = 0
    reply = server.post("/v1/completions", **BODY, stream=stream)
    assert reply.status_code == 429
    assert reply.json()["error"]["message"] == "2 requests are waiting already: try again later"


def test_an_error_says_where_it_comes_from(linked: Linked) -> None:
    """What can't be pickled becomes a `RuntimeError`; the same error of several requests gets one note each."""

    class OwnError(Exception):
        """Of a class that the other process doesn't find."""

    for error, kind in ((OwnError("broken"), RuntimeError), (ValueError("broken"), ValueError)):
        for _ in range(2):
            collector = Collector()
            linked.played.on_submit = lambda _, error=error: [Finished(FinishReason.ERROR, error)]  # type: ignore[misc]
            linked.scheduler.submit(REQUEST, collector).result(10)
            got = collector.wait().error
            assert type(got) is kind
            assert str(got).endswith("broken")
            assert len(got.__notes__) == 1
            assert "in the process that decodes" in got.__notes__[0]
    assert isinstance(messages.sendable(QueueFullError("full")), QueueFullError)


def test_cancelled_by_a_client_that_vanishes(server: Running, linked: Linked) -> None:
    body = BODY | {"stream": True}
    with httpx2.Client(base_url=server.address) as http, http.stream("POST", "/v1/completions", json=body) as reply:
        lines = reply.iter_lines()
        assert linked.played.submitted.wait(10)
        linked.played.listeners[0](Tokens((70,)))
        assert "data:" in next(lines)
        assert not linked.played.cancelled.wait(0.2)
    assert linked.played.cancelled.wait(10)


def test_state(server: Running, linked: Linked) -> None:
    assert linked.scheduler.status() == linked.played.status()
    metrics = server.http.get("/metrics").text
    assert 'accel_generated_tokens_total{model="played"} 1234.0' in metrics


def test_the_decoding_side_ends() -> None:
    """Requests in progress end with an error, further ones are refused, and `Link` says so once."""
    linked = Linked()
    collector = Collector()
    linked.scheduler.submit(REQUEST, collector).result(10)
    linked.end_suddenly()
    finished = collector.wait()
    assert finished.reason is FinishReason.ERROR
    assert "has ended" in str(finished.error)
    with pytest.raises(RuntimeError, match="has ended"):
        linked.scheduler.submit(REQUEST, Collector()).result(10)
    end = time.monotonic() + 10
    while not linked.lost and time.monotonic() < end:
        time.sleep(0.01)
    assert [str(error) for error in linked.lost] == ["the process that decodes has ended"]
    linked.scheduler.close()
    linked.close()
