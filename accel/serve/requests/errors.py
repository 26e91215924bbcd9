"""Errors of the HTTP side, in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.

https://platform.openai.com/docs/guides/error-codes
"""

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from accel.errors import AccelError
from accel.serve.protocol import QueueFullError, RequestTooLongError

RETRY_AFTER_S = 1
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}  # status -> OpenAI's type


class ApiError(HTTPException):
    """An error that a client is told of.

    Args:
        status: HTTP status.
        message: What is wrong. It names no path of this machine.
        param: Field of the body that is wrong.
        code: OpenAI's code, which clients compare.
        headers: Headers of the reply.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        """Return the reply's body."""
        server_side = self.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR
        kind = TYPES.get(self.status_code, "server_error" if server_side else "invalid_request_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """Return the reply, in ASCII: the message may quote a name that no UTF-8 can be written for."""
        return Response(json.dumps(self.body()), self.status_code, self.headers, "application/json")


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error for a body that can't be used."""
    return ApiError(HTTPStatus.BAD_REQUEST, message, param, code)


def too_long(message: str, param: str | None) -> ApiError:
    """Return the error for a prompt, or a sum of prompt and new tokens, that exceeds a limit."""
    return ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message, param, "context_length_exceeded")


def timed_out(timeout_s: float) -> ApiError:
    """Return the error for a request that took too long."""
    return ApiError(HTTPStatus.GATEWAY_TIMEOUT, f"the request took longer than {timeout_s:g} s", code="timeout")


def not_ready() -> ApiError:
    """Return the error for a request before the models are warm."""
    return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "the models are warming up: see /ready", code="not_ready")


def queue_full(message: str) -> ApiError:
    """Return the error for a request that finds no place in a queue."""
    headers = {"Retry-After": str(RETRY_AFTER_S)}
    return ApiError(HTTPStatus.TOO_MANY_REQUESTS, message, code="queue_full", headers=headers)


def unexpected() -> ApiError:
    """Return the error for a fault of the server, whose details only the log tells."""
    message = "internal error: the server's log tells more, under this reply's x-request-id"
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, message, code="internal_error")


def refused(error: Exception, param: str | None) -> ApiError:
    """Return the error for a request that a scheduler refused.

    Args:
        error: What `Scheduler.submit` raised.
        param: Field of the body that holds the prompt.
    """
    if isinstance(error, QueueFullError):
        return queue_full(str(error))
    if isinstance(error, RequestTooLongError):
        return too_long(str(error), param)
    if isinstance(error, ValueError | AccelError):
        return invalid(str(error))
    if isinstance(error, RuntimeError):  # it is closed
        return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "the server is stopping", code="stopping")
    raise error


def install(app: FastAPI) -> None:
    """Have `app` answer every error in OpenAI's shape."""

    async def http_error(request: Request, error: Exception) -> Response:
        if isinstance(error, ApiError):
            return error.response()
        if not isinstance(error, HTTPException):
            raise error
        message = error.detail
        if error.status_code == HTTPStatus.NOT_FOUND:
            message = f"{request.method} {request.url.path}: no such route; the page at / and /openapi.json list them"
        elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            message = f"{request.url.path} doesn't take {request.method}"
        return ApiError(error.status_code, message, headers=error.headers).response()

    async def invalid_body(request: Request, error: Exception) -> Response:
        if not isinstance(error, RequestValidationError):
            raise error
        return _first_mistake(error).response()

    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, invalid_body)


def _first_mistake(error: RequestValidationError) -> ApiError:
    """Return the error for the first field of a body in which pydantic found a mistake."""
    first, *others = error.errors()
    path = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return invalid(f"the body is no valid JSON: {reason} at character {path[0] if path else 0}")
    if first["type"] == "value_error":  # of a whole body, or a whole part of one: the message names the fields
        return invalid(first["msg"].removeprefix("Value error, "), path[0] if path else None)
    if not path:
        return invalid("the body must be a JSON object, with the header Content-Type: application/json")
    same = [first, *(other for other in others if other["loc"][:2] == first["loc"][:2])]  # of a field with many types
    reasons = dict.fromkeys(_lower(mistake["msg"].removeprefix("Value error, ")) for mistake in same)
    return invalid(f"{path[0] if len(reasons) > 1 else '.'.join(path)}: {', or '.join(reasons)}", path[0])


def _lower(text: str) -> str:
    """Return a text that begins with a small letter."""
    return f"{text[:1].lower()}{text[1:]}"
