"""The server's process: listening, warm-up, and an end that lets requests in progress finish."""

import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from accel.config.serve import ServeConfig
from accel.errors import AccelError
from accel.serve.http.backend import Backend
from accel.serve.http.http_protocol import limited_protocol
from accel.system.signals import interrupter

BACKLOG = 1024  # connections that wait to be accepted


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address.

    Raises:
        AccelError: The address can't be used.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        advice = "choose another port: serve.port=0 takes a free one" if host else "give a host"
        raise AccelError(f"serve.host={host} serve.port={port}: {error.strerror or error}; {advice}") from error


class _Server(uvicorn.Server):
    """Uvicorn's server, whose end is not an error: it ends the process with 0."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle the first signal: let requests end. At the second, `accel.cli.interrupts` ends the process."""
        interrupter.called.set()
        self.should_exit = True


class Server:
    """A server over a socket.

    Args:
        app: The application.
        backend: What computes its replies, which is warmed up while the server answers `/health` already.
        listener: Socket that it listens on, which it closes at its end.
        config: Section `serve` of the configuration.
        on_ready: Called once all models are warm.
    """

    def __init__(
        self,
        app: FastAPI,
        backend: Backend,
        listener: socket.socket,
        config: ServeConfig,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._backend, self._listener, self._on_ready = backend, listener, on_ready
        self._failure: Exception | None = None
        backend.watch(self._fail)
        self._server = _Server(
            uvicorn.Config(
                app,
                http=limited_protocol(config.head_timeout_s, config.unread_timeout_s),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=max(1, round(config.head_timeout_s)),
                timeout_graceful_shutdown=config.drain_s,
                backlog=BACKLOG,
            )
        )

    def run(self) -> None:
        """Serve until a signal or `stop`, then close the backend.

        Raises:
            AccelError: A model can't be warmed up; libraries' own errors are raised as well.
        """
        warming = threading.Thread(target=self._warm_up, name="warm-up", daemon=True)
        warming.start()
        try:
            self._server.run(sockets=[self._listener])
        finally:
            self._listener.close()
            self._backend.close()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Let requests in progress end, then end `run`. Callable from any thread."""
        self._server.should_exit = True

    def _warm_up(self) -> None:
        """Warm the backend up; if that fails, end the server."""
        try:
            self._backend.warm_up()
            self._on_ready()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """End the server for an error, which `run` raises on its own thread."""
        self._failure = self._failure or error
        self.stop()
