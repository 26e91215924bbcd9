"""`/v1/chat/completions`: the next message of a conversation."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from accel.data.texts import unpadded
from accel.serve.http.service import Service, record_of
from accel.serve.requests import logprob_forms, options, prompts
from accel.serve.requests.bodies import ChatBody
from accel.serve.requests.sequences import Delta, Plan, context_of
from accel.serve.requests.served_model import ServedModel


def routes(service: Service) -> APIRouter:
    """Return the route."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, http: HttpRequest) -> Response:
        served = service.model(body.model)
        plan = await service.planned(_plan, service, served, body)
        return await service.answer(http, served, plan, _Form(body, served, record_of(http).id), body.stream)

    return router


def _plan(service: Service, served: ServedModel, body: ChatBody) -> Plan:
    """Return what a body asks of the model."""
    ids = prompts.of_chat(body, served, service.limits)
    requests = service.requests(
        served,
        [unpadded(ids)],
        options.from_openai(body, served, service.limits),
        n=body.n,
        seed=body.seed,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        response_format=body.response_format,
    )
    return Plan(requests, body.stops, [context_of(ids, served)] * body.n, len(ids), "messages")


class _Form:
    """Form of the replies.

    https://platform.openai.com/docs/api-reference/chat/object and .../chat/streaming
    """

    def __init__(self, body: ChatBody, served: ServedModel, request_id: str) -> None:
        self._body, self._tokenizer = body, served.tokenizer
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        self._head = {
            "id": f"chatcmpl-{request_id}",
            "object": kind,
            "created": int(time.time()),
            "model": served.name,
        }

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        """Return the log probabilities of a delta, if the client wants them."""
        return logprob_forms.for_chat(self._tokenizer, delta) if self._body.logprobs else None

    def whole(self, parts: Sequence[Delta], usage: Mapping[str, int]) -> dict[str, Any]:
        """Return the body of a reply that isn't streamed."""
        choices = [
            {
                "index": part.index,
                "message": {"role": "assistant", "content": part.text, "refusal": None},
                "logprobs": self._logprobs(part),
                "finish_reason": part.finish_reason,
            }
            for part in parts
        ]
        return {**self._head, "choices": choices, "usage": usage}

    def first(self, index: int) -> dict[str, Any] | None:
        """Return the event that names the role."""
        return self._event(index, {"role": "assistant", "content": ""}, None, None)

    def part(self, delta: Delta) -> dict[str, Any]:
        """Return an event."""
        content = {"content": delta.text} if delta.text or delta.ids else {}
        return self._event(delta.index, content, self._logprobs(delta), delta.finish_reason)

    def _event(self, index: int, delta: Mapping[str, Any], logprobs: Any, reason: str | None) -> dict[str, Any]:
        """Return an event with one choice."""
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        usage = {"usage": None} if self._body.includes_usage else {}
        return {**self._head, "choices": [choice], **usage}

    def last(self, usage: Mapping[str, int]) -> dict[str, Any] | None:
        """Return the numbers of tokens, if the client wants them."""
        return {**self._head, "choices": [], "usage": usage} if self._body.includes_usage else None
