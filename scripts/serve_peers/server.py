"""A server in a process of its own, and what a client asks of it."""

import os
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import httpx2

from accel.errors import AccelError
from scripts.peers.libraries import last_line

END_S = 60  # that a server has to end after SIGTERM
POLL_S = 0.5
REPLY_S = 300  # that a reply may take, waiting for others included


@dataclass(frozen=True)
class Reply:
    """A reply to one request.

    Attributes:
        text: The text.
        tokens: Number of new tokens, as the server counts them.
    """

    text: str
    tokens: int


@dataclass(frozen=True)
class Work:
    """A request.

    Attributes:
        prompt: Text, or token ids.
        new_tokens: Largest number of new tokens.
    """

    prompt: str | list[int]
    new_tokens: int


class Server:
    """A server that answers `POST /v1/completions` as OpenAI's does; a context that ends its process.

    Args:
        name: For the table and messages.
        command: Starts it; `{port}` stands for the port.
        ready: Path that answers with 200 once the model is warm.
        model: Name of the model in requests; None: the first one of `/v1/models`.
        log: File for its output.
        threads: Threads that compute, for libraries that read them from the environment.
        start_s: Seconds within which it must be ready.

    Raises:
        AccelError: It ended, or isn't ready in time.
    """

    def __init__(
        self, name: str, command: Sequence[str], ready: str, model: str | None, log: Path, threads: int, start_s: float
    ) -> None:
        self.name, self._log = name, log
        port = _free_port()
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        with log.open("w") as output:
            # S603: a command of this package over files that the user named
            self._process = subprocess.Popen(  # noqa: S603
                [part.format(port=port) for part in command], stdout=output, stderr=output, env=environment
            )
        self._http = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=REPLY_S)
        try:
            self._wait(ready, start_s)
            self._model = model if model is not None else self._http.get("/v1/models").json()["data"][0]["id"]
        except BaseException:
            self.close()
            raise

    def _wait(self, ready: str, start_s: float) -> None:
        """Wait until the server is ready."""
        deadline = time.monotonic() + start_s
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise AccelError(f"{self.name} ended: {last_line(self._log.read_text())} (all of it: {self._log})")
            try:
                if self._http.get(ready).status_code == 200:
                    return
            except httpx2.TransportError:
                pass  # it doesn't listen yet
            time.sleep(POLL_S)
        raise AccelError(f"{self.name} isn't ready after {start_s:.0f} s: see {self._log}")

    def answer(self, work: Work) -> Reply:
        """Return the greedy reply to a request.

        Raises:
            AccelError: It was answered with an error, or not at all.
        """
        body = {"model": self._model, "prompt": work.prompt, "max_tokens": work.new_tokens, "temperature": 0}
        try:
            reply = self._http.post("/v1/completions", json=body)
        except httpx2.TransportError as error:  # a timeout as well
            raise AccelError(f"{self.name} gave no answer: {type(error).__name__} (see {self._log})") from error
        if reply.status_code != 200:
            raise AccelError(f"{self.name} answered {reply.status_code}: {last_line(reply.text)}")
        content = reply.json()
        return Reply(content["choices"][0]["text"], content["usage"]["completion_tokens"])

    def close(self) -> None:
        """End the process."""
        self._http.close()
        self._process.terminate()  # not SIGINT, which a background process of a shell ignores
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
