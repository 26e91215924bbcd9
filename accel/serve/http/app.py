"""The application: routes, error handlers and what surrounds them."""

from fastapi import FastAPI

from accel.config.serve import ServeConfig
from accel.serve.http import chat, completions, generate, information, model_list, transcriptions
from accel.serve.http.metrics import Metrics
from accel.serve.http.middleware import ApiKey, BodyLimits, Recording
from accel.serve.http.service import Service
from accel.serve.requests import errors, request_log
from accel.serve.requests.request_log import Record


def create_app(service: Service, limits: ServeConfig, api_key: str | None = None) -> FastAPI:
    """Return the application.

    Args:
        service: Models to serve.
        limits: Section `serve` of the configuration.
        api_key: Key that clients must send; None: none.
    """
    metrics = Metrics()
    app = FastAPI(title="accel", docs_url=None, redoc_url=None)  # their pages load scripts from other servers
    errors.install(app)
    for module in (completions, chat, generate, transcriptions, model_list):
        app.include_router(module.routes(service))
    app.include_router(information.routes(service, metrics))
    surround(app, limits, api_key, metrics)
    return app


def surround(app: FastAPI, limits: ServeConfig, api_key: str | None, metrics: Metrics) -> None:
    """Add what happens to every request: limits of the body, the API key, log and metrics.

    Args:
        app: The application.
        limits: Section `serve` of the configuration.
        api_key: Key that clients must send; None: none.
        metrics: Count the requests.
    """

    def finish(record: Record) -> None:
        metrics.add(record)
        request_log.write(record)

    app.add_middleware(BodyLimits, max_bytes=int(limits.max_body_mb * 1e6), timeout_s=limits.body_timeout_s)
    if api_key is not None:
        app.add_middleware(ApiKey, key=api_key)
    app.add_middleware(Recording, finish=finish)  # the outermost, which also sees what the others refuse
