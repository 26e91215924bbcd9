"""`/v1/generate`: texts from texts, with any option of transformers' `GenerationConfig`.

Body and events have the fields of text-generation-inference's `/generate`: `inputs`, `parameters`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from accel.data.texts import unpadded
from accel.serve.http.service import Service, record_of
from accel.serve.requests import options, prompts
from accel.serve.requests.bodies import GenerateBody
from accel.serve.requests.errors import invalid
from accel.serve.requests.sequences import Delta, Plan, context_of
from accel.serve.requests.served_model import ServedModel

MAX_SEED = 2**63 - 1


def routes(service: Service) -> APIRouter:
    """Return the route."""
    router = APIRouter()

    @router.post("/v1/generate")
    async def generate(body: GenerateBody, http: HttpRequest) -> Response:
        served = service.model(body.model)
        plan = await service.planned(_plan, service, served, body)
        return await service.answer(http, served, plan, _Form(served, record_of(http).id), body.stream)

    return router


def _plan(service: Service, served: ServedModel, body: GenerateBody) -> Plan:
    """Return what a body asks of the model."""
    if served.kind == "speech":
        raise invalid(f"the model {served.name} takes speech: use /v1/audio/transcriptions", "model")
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    return plan_of_ids(service, served, prompts.of_texts(texts, served, service.limits, "inputs"), body.parameters)


def plan_of_ids(
    service: Service, served: ServedModel, encoded: Sequence[Sequence[int]], given: Mapping[str, Any]
) -> Plan:
    """Return what prompts and parameters ask of the model.

    Args:
        service: The limits.
        served: The model.
        encoded: Token ids of each prompt.
        given: Options by `GenerationConfig`'s names, and `seed`.

    Raises:
        ApiError: A parameter can't be used, or there are too many sequences.
    """
    parameters = dict(given)
    seed, n = parameters.pop("seed", None), parameters.pop("num_return_sequences", None) or 1
    stops = parameters.pop("stop_strings", None) or []
    stops = [stops] if isinstance(stops, str) else stops
    for name, value, valid in (
        ("seed", seed, seed is None or (type(seed) is int and 0 <= seed <= MAX_SEED)),
        ("num_return_sequences", n, type(n) is int and n >= 1),
        ("stop_strings", stops, isinstance(stops, list) and all(isinstance(item, str) and item for item in stops)),
    ):
        if not valid:
            raise invalid(f"parameters.{name}={value!r} can't be used", name)
    generation = options.checked(parameters, served, service.limits)
    requests = service.requests(served, [unpadded(ids) for ids in encoded], generation, n=n, seed=seed)
    contexts = [context_of(ids, served) for ids in encoded for _ in range(n)]
    return Plan(requests, stops, contexts, sum(map(len, encoded)), "inputs")


class _Form:
    """Form of the replies: the sequences of each input follow each other."""

    def __init__(self, served: ServedModel, request_id: str) -> None:
        self._head = {"id": request_id, "model": served.name}

    def _output(self, delta: Delta) -> dict[str, Any]:
        """Return an output, or a part of one."""
        return {"index": delta.index, "generated_text": delta.text, "finish_reason": delta.finish_reason}

    def whole(self, parts: Sequence[Delta], usage: Mapping[str, int]) -> dict[str, Any]:
        """Return the body of a reply that isn't streamed."""
        return {**self._head, "outputs": [self._output(part) for part in parts], "usage": usage}

    def first(self, index: int) -> dict[str, Any] | None:
        """Return None: text comes first."""
        return None

    def part(self, delta: Delta) -> dict[str, Any]:
        """Return an event."""
        return {**self._head, "outputs": [self._output(delta)]}

    def last(self, usage: Mapping[str, int]) -> dict[str, Any] | None:
        """Return the numbers of tokens."""
        return {**self._head, "outputs": [], "usage": usage}
