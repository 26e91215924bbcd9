"""`/v1/completions`: the continuation of a prompt, or what an encoder-decoder makes of it."""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from accel.data.texts import unpadded
from accel.serve.http.service import Service, record_of
from accel.serve.requests import options, prompts
from accel.serve.requests.bodies import CompletionBody
from accel.serve.requests.errors import invalid
from accel.serve.requests.logprob_forms import CompletionLogprobs
from accel.serve.requests.sequences import Delta, Plan, context_of
from accel.serve.requests.served_model import ServedModel


def routes(service: Service) -> APIRouter:
    """Return the route."""
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(body: CompletionBody, http: HttpRequest) -> Response:
        served = service.model(body.model)
        plan = await service.planned(_plan, service, served, body)
        return await service.answer(http, served, plan, _Form(body, served, record_of(http).id), body.stream)

    return router


def _plan(service: Service, served: ServedModel, body: CompletionBody) -> Plan:
    """Return what a body asks of the model."""
    if served.kind == "speech":
        raise invalid(f"the model {served.name} takes speech: use /v1/audio/transcriptions", "model")
    generation = options.from_openai(body, served, service.limits)
    encoded = prompts.of_completion(body, served, service.limits)
    requests = service.requests(
        served,
        [unpadded(ids) for ids in encoded],
        generation,
        n=body.n,
        seed=body.seed,
        logprobs=body.logprobs,
        response_format=body.response_format,
    )
    contexts = [context_of(ids, served) for ids in encoded for _ in range(body.n)]
    return Plan(requests, body.stops, contexts, sum(map(len, encoded)), "prompt")


class _Form:
    """Form of the replies.

    https://platform.openai.com/docs/api-reference/completions/object
    """

    def __init__(self, body: CompletionBody, served: ServedModel, request_id: str) -> None:
        self._body = body
        self._logprobs: dict[int, CompletionLogprobs] = {}
        self._new_logprobs = partial(CompletionLogprobs, served.tokenizer)
        self._head = {
            "id": f"cmpl-{request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
        }

    def _choice(self, delta: Delta) -> dict[str, Any]:
        """Return a choice, or the part of one."""
        logprobs = None
        if self._body.logprobs is not None:
            logprobs = self._logprobs.setdefault(delta.index, self._new_logprobs()).of(delta)
        return {
            "index": delta.index,
            "text": delta.text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }

    def whole(self, parts: Sequence[Delta], usage: Mapping[str, int]) -> dict[str, Any]:
        """Return the body of a reply that isn't streamed."""
        return {**self._head, "choices": [self._choice(part) for part in parts], "usage": usage}

    def first(self, index: int) -> dict[str, Any] | None:
        """Return None: text comes first."""
        return None

    def part(self, delta: Delta) -> dict[str, Any]:
        """Return an event."""
        return {**self._head, "choices": [self._choice(delta)], **self._no_usage()}

    def last(self, usage: Mapping[str, int]) -> dict[str, Any] | None:
        """Return the numbers of tokens, if the client wants them."""
        return {**self._head, "choices": [], "usage": usage} if self._body.includes_usage else None

    def _no_usage(self) -> dict[str, None]:
        """Return the field `usage` of an event that isn't the last one."""
        return {"usage": None} if self._body.includes_usage else {}
