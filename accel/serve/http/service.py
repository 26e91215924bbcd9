"""What all routes share: the models, the limits, and the way of a plan through a model to a reply."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from http import HTTPStatus
from typing import Any, Protocol, TypeVar

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from torch import Tensor

from accel.config.serve import ServeConfig
from accel.errors import unknown
from accel.serve.http.middleware import RECORD
from accel.serve.protocol import Request, Status
from accel.serve.remote.model_process import ModelProcess
from accel.serve.requests.bodies import ResponseFormat
from accel.serve.requests.errors import ApiError, invalid, not_ready
from accel.serve.requests.grammar import Grammars
from accel.serve.requests.request_log import Record
from accel.serve.requests.sequences import Delta, Plan, Sequences
from accel.serve.requests.served_model import ServedModel
from accel.system.process_state import short_thread_switches

Result = TypeVar("Result")

PLANNING_THREADS = 4  # Python computes on one thread at a time, so that more of them would only take memory


class Form(Protocol):
    """Form of a route's replies."""

    def whole(self, parts: Sequence[Delta], usage: Mapping[str, int]) -> dict[str, Any]:
        """Return the body of a reply that isn't streamed, from one delta for each sequence."""

    def part(self, delta: Delta) -> dict[str, Any]:
        """Return an event of a streamed reply."""

    def first(self, index: int) -> dict[str, Any] | None:
        """Return the event that a sequence begins with, if there is one."""

    def last(self, usage: Mapping[str, int]) -> dict[str, Any] | None:
        """Return the event after all others, if there is one."""


class EventStream(StreamingResponse):
    """Reply of server-sent events, which calls `over` when it has ended, however it ended.

    https://html.spec.whatwg.org/multipage/server-sent-events.html
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], over: Callable[[], None]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._over = over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the reply."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._over()


class Service:
    """Models and limits of a server.

    Args:
        models: The models.
        limits: Section `serve` of the configuration.
        process: Process that their schedulers are in; None: this one.

    Attributes:
        models: Name -> model.
        limits: Section `serve` of the configuration.
        ready: All models are warm.
    """

    def __init__(self, models: Sequence[ServedModel], limits: ServeConfig, process: ModelProcess | None = None) -> None:
        self._process = process
        self.models = {served.name: served for served in models}
        self.limits = limits
        self.ready = False
        self._grammars = {served.name: Grammars(served) for served in models}
        self._planning = ThreadPoolExecutor(PLANNING_THREADS, "accel-plan")
        self._state = ExitStack()

    def warm_up(self) -> None:
        """Warm all models up."""
        for served in self.models.values():
            served.scheduler.warm_up()
        self._state.enter_context(short_thread_switches())  # the schedulers' threads don't wait for HTTP's
        self.ready = True

    async def is_ready(self) -> bool:
        """Return whether all models are warm."""
        return self.ready

    async def states(self) -> dict[tuple[str, ...], Status]:
        """Return the state of each model's scheduler, by the model's name."""
        return {(name,): await asyncio.to_thread(served.scheduler.status) for name, served in self.models.items()}

    def close(self) -> None:
        """Close all models."""
        self.ready = False
        self._planning.shutdown()
        self._state.close()
        for served in self.models.values():
            served.close()
        if self._process is not None:
            self._process.close()

    def watch(self, on_failure: Callable[[Exception], None]) -> None:
        """Have `on_failure` called with an error once the models' process has ended by itself."""
        if self._process is not None:
            self._process.on_lost = on_failure

    def model(self, name: str) -> ServedModel:
        """Return a model by its name.

        Raises:
            ApiError: There is none, or the server isn't ready.
        """
        if name not in self.models:
            message = str(unknown("model", name, self.models))
            raise ApiError(HTTPStatus.NOT_FOUND, message, "model", "model_not_found")
        if not self.ready:
            raise not_ready()
        return self.models[name]

    async def planned(self, plan: Callable[..., Plan], *arguments: Any) -> Plan:
        """Return `plan(*arguments)`, computed on another thread: prompts are tokenized and grammars compiled there.

        Raises:
            ApiError: The models are closed; or of `plan`.
        """
        if not self.ready:
            raise not_ready()
        return await asyncio.get_running_loop().run_in_executor(self._planning, partial(plan, *arguments))

    def requests(
        self,
        served: ServedModel,
        inputs: Sequence[Mapping[str, Tensor]],
        generation: Mapping[str, Any],
        n: int = 1,
        seed: int | None = None,
        logprobs: int | None = None,
        response_format: ResponseFormat | None = None,
    ) -> list[Request]:
        """Return the requests of `n` sequences for each input. With a seed, sequence `i` of an input has `seed + i`.

        Args:
            served: The model.
            inputs: Inputs of one sequence each.
            generation: Options by `GenerationConfig`'s names.
            n: Sequences for each input.
            seed: Seed of sampling.
            logprobs: Number of most likely tokens to report.
            response_format: Form of the output.

        Raises:
            ApiError: There are too many sequences, or the form can't be had.
        """
        beams = generation.get("num_beams") or 1
        if beams > 1 and n > 1:
            raise invalid("n: the sequences of a beam search would all be the same: use n=1", "n")
        if beams > 1 and (logprobs is not None or response_format is not None):
            raise invalid("num_beams: neither logprobs nor response_format work with beams", "num_beams")
        total = len(inputs) * n * beams
        if total > self.limits.max_sequences:
            message = f"{len(inputs)} prompts x n={n} x {beams} beams are {total} sequences: "
            raise invalid(f"{message}this server allows {self.limits.max_sequences}", "n")
        deadline = time.monotonic() + self.limits.timeout_s
        return [
            Request(
                item,
                {"max_new_tokens": self._default_new_tokens(served, item), **generation},
                None if seed is None else (seed + index) % 2**63,
                logprobs,
                self._grammars[served.name].processor(response_format),
                deadline,
            )
            for item in inputs
            for index in range(n)
        ]

    def _default_new_tokens(self, served: ServedModel, inputs: Mapping[str, Tensor]) -> int:
        """Return the number of new tokens of a request that doesn't say."""
        limits = self.limits
        default = served.model.generation_config.max_new_tokens or limits.default_new_tokens
        prompt = 1 if served.has_encoder else inputs["input_ids"].shape[1]
        room = min(limits.max_total_tokens, served.positions or limits.max_total_tokens) - prompt
        return max(1, min(default, limits.max_new_tokens, room))

    async def answer(self, http: HttpRequest, served: ServedModel, plan: Plan, form: Form, stream: bool) -> Response:
        """Generate, and return the reply.

        Args:
            http: The HTTP request.
            served: The model.
            plan: What is asked of it.
            form: Form of the reply.
            stream: Send the reply in parts.

        Raises:
            ApiError: The request is refused, took too long or failed.
        """
        record = record_of(http)
        record.stream = stream
        unread = self.limits.max_unread_tokens if stream else self.limits.max_new_tokens * self.limits.max_sequences
        sequences = Sequences(served, plan, record, unread, self.limits, stream)
        try:
            await sequences.accepted()
        except BaseException:
            sequences.cancel()
            raise
        if stream:
            return EventStream(_events(sequences, plan, form), sequences.cancel)
        try:
            body = await unless_gone(http.receive, _whole(sequences, plan, form))
        finally:
            sequences.cancel()
        return JSONResponse(body) if body is not None else Response(status_code=499)


def record_of(http: HttpRequest) -> Record:
    """Return the record of a request."""
    record: Record = getattr(http.state, RECORD)
    return record


async def unless_gone(receive: Receive, reply: Awaitable[Result]) -> Result | None:
    """Return the result of `reply`, or None once the client has gone away.

    Args:
        receive: Receives what follows the body: that the client goes away.
        reply: What to wait for. It is cancelled once the client has gone away.
    """
    task = asyncio.ensure_future(reply)
    gone = asyncio.ensure_future(receive())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        for unfinished in (task, gone):
            unfinished.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await unfinished


def _usage(plan: Plan, sequences: Sequences) -> dict[str, int]:
    """Return the numbers of tokens, by OpenAI's names."""
    prompt, completion = plan.prompt_tokens, sequences.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def _whole(sequences: Sequences, plan: Plan, form: Form) -> dict[str, Any]:
    """Return the body of a reply once all sequences have ended."""
    parts: list[list[Delta]] = [[] for _ in plan.requests]
    async for deltas in sequences.deltas():
        for delta in deltas:
            parts[delta.index].append(delta)
    joined = [Delta.joined(deltas) for deltas in parts]
    return form.whole(joined, _usage(plan, sequences))


async def _events(sequences: Sequences, plan: Plan, form: Form) -> AsyncIterator[bytes]:
    """Yield the events of a streamed reply. An error becomes the last one, as its status is long sent."""
    for index in range(len(plan.requests)):
        if (first := form.first(index)) is not None:
            yield event(first)
    try:
        async for deltas in sequences.deltas():
            for delta in deltas:
                if delta.text or delta.ids or delta.finish_reason:
                    yield event(form.part(delta))
    except ApiError as error:
        yield event(error.body())
        return
    if (last := form.last(_usage(plan, sequences))) is not None:
        yield event(last)
    yield b"data: [DONE]\n\n"


def event(data: Mapping[str, Any]) -> bytes:
    """Return one server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
