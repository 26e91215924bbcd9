"""Routes about the server itself: health, readiness, metrics, and the page at `/`."""

from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from accel.serve.http.backend import Backend
from accel.serve.http.metrics import Metrics
from accel.serve.requests.errors import not_ready

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


def routes(backend: Backend, metrics: Metrics) -> APIRouter:
    """Return the routes."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @router.get("/ready")
    async def ready() -> dict[str, str]:
        if not await backend.is_ready():
            raise not_ready()
        return {"status": "ready"}

    @router.get("/metrics")
    async def scrape() -> Response:
        text = metrics.text(await backend.states())
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    for path, (name, media_type) in PAGE_FILES.items():
        router.add_api_route(path, _file(name, media_type), include_in_schema=False)
    return router


def _file(name: str, media_type: str) -> Any:
    """Return the handler of one file of the page."""
    content = (files("accel.serve.http") / "page" / name).read_bytes()

    async def handler() -> Response:
        return Response(content, media_type=f"{media_type}; charset=utf-8", headers=PAGE_HEADERS)

    return handler
