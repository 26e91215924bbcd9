"""The application that clients call: it answers what is about the server itself, and passes on everything else."""

import asyncio
import logging
from contextlib import suppress
from http import HTTPStatus

from fastapi import FastAPI
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from accel.config.serve import ServeConfig
from accel.serve.http import information
from accel.serve.http.app import surround
from accel.serve.http.metrics import Metrics
from accel.serve.http.middleware import RECORD
from accel.serve.http.service import event, unless_gone
from accel.serve.replicas.deployment import LABELS, Replicas
from accel.serve.requests import errors
from accel.serve.requests.errors import RETRY_AFTER_S, ApiError, queue_full, timed_out

logger = logging.getLogger(__name__)

SENT = (  # of a request's scope; the rest are objects of this process
    "type",
    "asgi",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "headers",
    "client",
    "server",
)


def create_front(replicas: Replicas, limits: ServeConfig, api_key: str | None = None) -> FastAPI:
    """Return the application.

    Args:
        replicas: What computes the replies.
        limits: Section `serve` of the configuration.
        api_key: Key that clients must send; None: none.
    """
    metrics = Metrics(LABELS)
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)  # the replicas have the description of all routes
    errors.install(app)
    app.include_router(information.routes(replicas, metrics))
    app.mount("/", Forwarding(replicas, limits))
    surround(app, limits, api_key, metrics)
    return app


class Forwarding:
    """Passes requests on to replicas, and their replies to the clients.

    Args:
        replicas: The replicas.
        limits: Section `serve` of the configuration. Its `timeout_s` includes the time in which no replica is running.
    """

    def __init__(self, replicas: Replicas, limits: ServeConfig) -> None:
        self._replicas, self._timeout_s, self._waiting = replicas, limits.timeout_s, limits.max_waiting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            return
        record = scope["state"][RECORD]
        body = await _body(receive)
        if body is None:
            return
        reply = _Reply(send)
        parts = self._replicas.answer({name: scope[name] for name in SENT if name in scope}, body, record)

        async def relay() -> bool:
            last: list[Message] = []  # sent when the record is complete: with it the request is over
            async for messages, noted in parts:
                record.continue_as(noted)
                for message in messages:
                    if message["type"] == "http.response.body" and not message.get("more_body", False):
                        last = [message]
                    else:
                        await reply.send(message)
            for message in last:
                await reply.send(message)
            return True

        over = None
        try:
            async with asyncio.timeout(self._timeout_s):
                over = await unless_gone(receive, relay())
        except TimeoutError:
            await reply.fail(timed_out(self._timeout_s))
        except BackPressureError:
            await reply.fail(queue_full(f"{self._waiting} requests wait for a replica already: try again later"))
        except RayTaskError:  # a fault of the program
            raise
        except RayError as error:
            logger.warning("request %s was in a replica that ended; another takes its place", record.id)
            await reply.fail(_lost(), error)
        finally:
            if not over:
                with suppress(RayError, RayServeException):  # what the request failed with, raised once more
                    parts.cancel()


class _Reply:
    """The reply to a request, as far as it was sent.

    Args:
        send: Sends a message of it.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None

    async def send(self, message: Message) -> None:
        """Send a message."""
        if message["type"] == "http.response.start":
            self._start = message
        await self._send(message)

    async def fail(self, error: ApiError, cause: Exception | None = None) -> None:
        """Tell the client of an error: by the status, or by the last event of a stream that has begun.

        Raises:
            ApiError: The reply has not begun, so that the application can answer with the error.
            Exception: Half of another reply was sent: the connection must be closed.
        """
        if self._start is None:
            raise error from cause
        if not Headers(raw=self._start["headers"]).get("content-type", "").startswith("text/event-stream"):
            raise ConnectionAbortedError("the rest of a reply is missing") from cause
        await self._send({"type": "http.response.body", "body": event(error.body())})


async def _body(receive: Receive) -> bytes | None:
    """Return the body of a request; None if its client went away before it was complete."""
    parts = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _lost() -> ApiError:
    """Return the error for a request whose replica ended."""
    message = "the process that computed this request has ended; another takes its place: try again"
    headers = {"Retry-After": str(RETRY_AFTER_S)}
    return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, message, code="replica_lost", headers=headers)
