"""Routes that generate nothing: the list of models, health, readiness, metrics, and the page at `/`."""

from collections.abc import Mapping
from http import HTTPStatus
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from accel.errors import unknown
from accel.evaluation.parity import how_verified
from accel.serve.http.metrics import Metrics
from accel.serve.http.service import Service
from accel.serve.requests.errors import ApiError
from accel.serve.requests.served_model import ServedModel

PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
# The page loads its own two files and calls this server; nothing else can be loaded, run or framed.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def routes(service: Service, metrics: Metrics) -> APIRouter:
    """Return the routes."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @router.get("/ready")
    async def ready() -> dict[str, str]:
        if not service.ready:
            raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "the models are warming up", code="not_ready")
        return {"status": "ready"}

    @router.get("/metrics")
    async def scrape() -> Response:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [describe(served) for served in service.models.values()]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name not in service.models:
            message = str(unknown("model", name, service.models))
            raise ApiError(HTTPStatus.NOT_FOUND, message, "model", "model_not_found")
        return describe(service.models[name])

    for path, (name, media_type) in PAGE_FILES.items():
        router.add_api_route(path, _file(name, media_type), include_in_schema=False)
    return router


def _file(name: str, media_type: str) -> Any:
    """Return the handler of one file of the page."""
    content = (files("accel.serve.http") / "page" / name).read_bytes()

    async def handler() -> Response:
        return Response(content, media_type=f"{media_type}; charset=utf-8", headers=PAGE_HEADERS)

    return handler


def describe(served: ServedModel) -> dict[str, Any]:
    """Return a model as OpenAI's API lists it, with the field `accel`: its input and its verification's figures."""
    description = {"kind": served.kind, "encoder_decoder": served.has_encoder, "positions": served.positions}
    verification = None if served.verification is None else figures(served.verification)
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "accel",
        "accel": {**description, "verification": verification},
    }


def figures(verification: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a verification result. It holds paths of the machine that made it, so only these pass.

    Args:
        verification: As `verify` wrote it.
    """
    worst = max(verification["outputs"].values(), key=lambda output: output["error"])
    return {
        "precision": verification["precision"],
        "how": how_verified(verification),
        "identical": verification["identical"],
        "sequences": verification["sequences"],
        "largest_error": worst["error"],
        "allowed_error": worst["allowed"],
        "metrics": verification["metrics"],
    }
