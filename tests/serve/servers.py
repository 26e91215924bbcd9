"""Servers on a free port of this machine, over real models and over a scheduler that the test plays."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import httpx2
import openai
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from accel.config.serve import ServeConfig
from accel.serve.http.app import create_app
from accel.serve.http.lifecycle import Server, listen
from accel.serve.http.service import Service
from accel.serve.protocol import Event, Listener, QueueFullError, Request, Status
from accel.serve.remote.model_process import ModelProcess
from accel.serve.requests.served_model import ServedModel

LIMITS = ServeConfig(port=0, log_requests=False, drain_s=5)
TEMPLATE = (
    "{% if messages[0]['role'] == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
    "{% for tool in tools or [] %}[{{ tool['function']['name'] }}]{% endfor %}"
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}{{ 'dictate' if dictate }}"
)


@dataclass(frozen=True)
class Running:
    """A running server.

    Attributes:
        address: Scheme, host and port.
        port: The port.
        models: Its models, by name.
        openai: OpenAI's own client, which doesn't retry.
        http: A client without a timeout.
        server: The server itself.
        failures: What it has ended with.
    """

    address: str
    port: int
    models: dict[str, ServedModel]
    openai: openai.OpenAI
    http: httpx2.Client
    server: Server
    failures: list[Exception]

    def post(self, path: str, **body: Any) -> httpx2.Response:
        """Send a JSON body."""
        return self.http.post(path, json=body)


@contextmanager
def running(
    served: Sequence[ServedModel],
    limits: ServeConfig = LIMITS,
    api_key: str | None = None,
    process: ModelProcess | None = None,
) -> Iterator[Running]:
    """Serve models, of another process where one is given, on a free port, in a thread, and stop at the end."""
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    service = Service(served, limits, process)
    ready = threading.Event()
    server = Server(create_app(service, limits, api_key), service, listener, limits, ready.set)
    failures: list[Exception] = []

    def serve() -> None:
        try:
            server.run()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    address = f"http://127.0.0.1:{port}"
    client = openai.OpenAI(base_url=f"{address}/v1", api_key=api_key or "none", max_retries=0)
    try:
        assert ready.wait(60)
        with httpx2.Client(base_url=address, timeout=60) as http:
            yield Running(address, port, service.models, client, http, server, failures)
    finally:
        client.close()
        server.stop()
        thread.join(30)
    assert not thread.is_alive()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token per byte, as GPT-2's has, so that most characters of this test have several."""
    letters = sorted(ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


class PlayedScheduler:
    """Scheduler whose events a test sends.

    Attributes:
        requests: What was submitted.
        listeners: Their listeners.
        cancelled: Set once a request was cancelled.
        submitted: Set once a request was submitted.
        room: Requests that it takes.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.listeners: list[Listener] = []
        self.cancelled, self.submitted = threading.Event(), threading.Event()
        self.room = 100
        self.on_submit: Callable[[int], Sequence[Event]] = lambda _: ()
        self.cancels = 0

    def warm_up(self) -> None:
        """Do nothing."""

    def submit(self, request: Request, listener: Listener) -> "PlayedScheduler":
        """Remember a request, and answer it if the test said how."""
        if len(self.requests) >= self.room:
            raise QueueFullError("2 requests are waiting already: try again later")
        self.requests.append(request)
        self.listeners.append(listener)
        for event in self.on_submit(len(self.requests) - 1):
            listener(event)
        self.submitted.set()
        return self

    async def accepted(self) -> None:
        """Do nothing."""

    def cancel(self) -> None:
        """Remember that a request was cancelled."""
        self.cancels += 1
        self.cancelled.set()

    def status(self) -> Status:
        """Return a state that no other scheduler has."""
        return Status(3, 5, 8, 77, 512, 1234)

    def close(self, drain_s: float = 0.0) -> None:
        """Do nothing."""


class Played(SimpleNamespace):
    """A model of which only the configuration exists."""

    main_input_name = "input_ids"

    def close(self) -> None:
        """Do nothing."""
