"""What happens to every request before its route and after it: records, the API key, limits of the body.

Plain ASGI, as Starlette's own base class hides disconnected clients from the routes.
https://asgi.readthedocs.io/en/latest/specs/www.html
"""

import asyncio
import hmac
import logging
from collections.abc import Callable
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from accel.serve.requests.errors import ApiError, unexpected
from accel.serve.requests.request_log import Record

logger = logging.getLogger(__name__)

RECORD = "record"  # key of the scope's state
OPEN_PATHS = frozenset({"/", "/page.css", "/page.js", "/health", "/ready"})  # without an API key
DISCARD_S = 5.0  # seconds for which the rest of a body that is too large is read, so that its client reads the reply


class Recording:
    """Writes a record of each request, and its id into the reply.

    Args:
        app: The application inside.
        finish: Gets each record at the end of its request.
    """

    def __init__(self, app: ASGIApp, finish: Callable[[Record], None]) -> None:
        self._app, self._finish = app, finish

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # A replica's application continues the record of the process that the client called.
        record: Record = scope.setdefault("state", {}).setdefault(RECORD, Record(scope["method"]))

        started = False

        async def noting(message: Message) -> None:
            nonlocal started
            started = True
            if message["type"] == "http.response.start":
                record.status = message["status"]
                record.route = _route(scope, record.route)
                MutableHeaders(scope=message)["x-request-id"] = record.id
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception as error:  # a fault of the server: its client gets no details
            logger.error("request %s failed", record.id, exc_info=error)
            if started:
                raise  # the connection is closed, so that the client sees that the reply isn't whole
            await unexpected().response()(scope, receive, noting)
        finally:
            record.route = _route(scope, record.route)
            self._finish(record)


def _route(scope: Scope, default: str) -> str:
    """Return the path of the route that handles a request; `default` where none does."""
    route: BaseRoute | None = scope.get("route")
    return getattr(route, "path", default)


class ApiKey:
    """Refuses requests without the API key.

    Args:
        app: The application inside.
        key: The key.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key):
                message = "this server needs an API key: send it in the header Authorization: Bearer KEY"
                headers = {"WWW-Authenticate": "Bearer"}
                error = ApiError(HTTPStatus.UNAUTHORIZED, message, code="invalid_api_key", headers=headers)
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyLimits:
    """Limits the size of bodies and the time in which they must arrive.

    Args:
        app: The application inside.
        max_bytes: Largest size.
        timeout_s: Seconds for a whole body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self._app, self._max_bytes, self._timeout_s = app, max_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        received, complete = 0, False

        async def limited() -> Message:
            nonlocal received, complete
            if complete:  # what comes next is that the client goes away
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):  # unlike `wait_for`, it makes no task, which waits its turn
                    message = await receive()
            except TimeoutError as error:
                text = f"the body didn't arrive within {self._timeout_s:g} s"
                raise ApiError(HTTPStatus.REQUEST_TIMEOUT, text, headers={"Connection": "close"}) from error
            complete = not message.get("more_body", False)
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                await _discard(receive, complete)
                raise self._too_large()
            return message

        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length) > self._max_bytes:
            await _discard(receive, complete=False)
            await self._too_large().response()(scope, receive, send)
            return
        await self._app(scope, limited, send)

    def _too_large(self) -> ApiError:
        """Return the error for a body that is too large."""
        text = f"the body is larger than {self._max_bytes / 1e6:g} MB, which this server allows"
        return ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text, headers={"Connection": "close"})


async def _discard(receive: Receive, complete: bool) -> None:
    """Read the rest of a body and drop it: many clients read no reply before they have sent everything."""
    try:
        async with asyncio.timeout(DISCARD_S):
            while not complete:
                message = await receive()
                complete = not message.get("more_body", False)
    except TimeoutError:
        return
