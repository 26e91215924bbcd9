"""Answers to Triton's requests: the way of text or token ids through the scheduler to text and token ids."""

import asyncio
import json
import logging
import threading
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Protocol

from accel.config.serve import ServeConfig
from accel.serve.http import generate
from accel.serve.http.service import Service
from accel.serve.requests import prompts
from accel.serve.requests.errors import ApiError, invalid
from accel.serve.requests.request_log import Record
from accel.serve.requests.sequences import Delta, Plan, Sequences
from accel.serve.requests.served_model import ServedModel, open_served, scheduler_limits
from accel.serve.scheduling.opening import open_scheduler

CANCELLED = 499  # status of a request whose client went away, as in the server's log
POLL_S = 0.05  # between two questions whether a request was cancelled
CLOSE_S = 10.0  # that cancelled requests have to send their last response

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """Inputs of one request.

    Attributes:
        text: Text to generate from, or None.
        ids: Token ids to generate from instead, or None.
        parameters: Options by `GenerationConfig`'s names, `seed` and `stop_strings`, as a JSON object.
        stream: Send a response whenever there are new tokens, instead of one at the end.
    """

    text: str | None = None
    ids: list[int] | None = None
    parameters: str = "{}"
    stream: bool = False


class Receiver(Protocol):
    """Gets the responses to one request. All methods are called on the thread of `Answering`."""

    def part(self, delta: Delta) -> None:
        """Send new text and tokens; those with a `finish_reason` are the last."""

    def fail(self, status: int, message: str) -> None:
        """Send an error, by its HTTP status, as the last response."""

    def is_cancelled(self) -> bool:
        """Return whether the client has given the request up."""


class Answering:
    """A model and the event loop, on a thread of its own, that its requests are answered on.

    Args:
        name: Name of the model, for messages.
        folder: The deployable.
        limits: Limits of requests.

    Raises:
        AccelError: The folder isn't a deployable, or has no tokenizer.
    """

    def __init__(self, name: str, folder: Path, limits: ServeConfig) -> None:
        scheduler = partial(open_scheduler, limits=scheduler_limits(limits))
        self._served: ServedModel = open_served(name, folder, None, scheduler)
        self._service = Service([self._served], limits)
        self._service.warm_up()
        self._pending: set[Future[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="accel-triton", daemon=True)
        self._thread.start()

    def submit(self, inputs: Inputs, receiver: Receiver) -> None:
        """Answer a request, without waiting for the answer."""
        future = asyncio.run_coroutine_threadsafe(self._answer(inputs, receiver), self._loop)
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)

    def close(self) -> None:
        """Cancel the requests that have no answer yet, and free the model."""
        self._service.close()
        wait(list(self._pending), CLOSE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_S)
        if not self._thread.is_alive():
            self._loop.close()

    async def _answer(self, inputs: Inputs, receiver: Receiver) -> None:
        """Send the responses to a request; whatever happens, exactly one of them is the last."""
        try:
            await self._generate(inputs, receiver)
        except ApiError as error:
            if receiver.is_cancelled():
                receiver.fail(CANCELLED, "the request was cancelled")
            elif not self._service.ready:
                receiver.fail(HTTPStatus.SERVICE_UNAVAILABLE, "the server is stopping")
            else:
                receiver.fail(error.status_code, error.detail)
        except Exception:  # of any library: the client is told nothing of this machine
            logger.exception("a request failed")
            receiver.fail(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error: Triton's log tells more")

    async def _generate(self, inputs: Inputs, receiver: Receiver) -> None:
        """Generate, and send the responses of a request that succeeds. Raises `ApiError` for any other."""
        plan = await self._service.planned(self._plan, inputs)
        limits = self._service.limits
        sequences = Sequences(self._served, plan, Record("TRITON"), limits.max_new_tokens, limits, inputs.stream)
        watch = asyncio.ensure_future(_cancel_when_asked(receiver, sequences))
        parts: list[Delta] = []
        try:
            async for deltas in sequences.deltas():
                parts += deltas
                if inputs.stream or parts[-1].finish_reason is not None:
                    receiver.part(Delta.joined(parts))
                    parts = []
        finally:
            sequences.cancel()
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch

    def _plan(self, inputs: Inputs) -> Plan:
        """Return what a request asks of the model."""
        served, limits = self._served, self._service.limits
        if (inputs.text is None) == (inputs.ids is None):
            raise invalid("a request needs text_input or input_ids, and only one of them")
        try:
            parameters = json.loads(inputs.parameters)
        except ValueError as error:
            raise invalid(f"generation_parameters is no valid JSON: {error}") from error
        if not isinstance(parameters, dict):
            raise invalid("generation_parameters must be a JSON object")
        if parameters.get("num_return_sequences") not in (None, 1):
            raise invalid("num_return_sequences can't be set: a request has one sequence")
        if inputs.text is not None:
            encoded = prompts.of_texts([inputs.text], served, limits, "text_input")
        else:
            encoded = prompts.of_ids([inputs.ids or []], served, limits, "input_ids")
        return generate.plan_of_ids(self._service, served, encoded, parameters)


async def _cancel_when_asked(receiver: Receiver, sequences: Sequences) -> None:
    """Cancel the sequences of a request once its client has given it up."""
    while not receiver.is_cancelled():
        await asyncio.sleep(POLL_S)
    sequences.cancel()
