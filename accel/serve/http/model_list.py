"""Routes that list the models, with the figures of their verification."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter

from accel.errors import unknown
from accel.evaluation.verification_result import how_verified
from accel.serve.http.service import Service
from accel.serve.requests.errors import ApiError
from accel.serve.requests.served_model import ServedModel


def routes(service: Service) -> APIRouter:
    """Return the routes."""
    router = APIRouter()

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [describe(served) for served in service.models.values()]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name not in service.models:
            message = str(unknown("model", name, service.models))
            raise ApiError(HTTPStatus.NOT_FOUND, message, "model", "model_not_found")
        return describe(service.models[name])

    return router


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
