"""Sequences of one HTTP request: from the events of their scheduler to text, log probabilities and reasons to end."""

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from accel.config.serve import ServeConfig
from accel.serve.protocol import Event, Finished, FinishReason, Request, Ticket, TokenLogprobs
from accel.serve.requests.detokenizer import Detokenizer
from accel.serve.requests.errors import refused, timed_out, unexpected
from accel.serve.requests.event_queue import EventQueue
from accel.serve.requests.request_log import Record
from accel.serve.requests.served_model import ServedModel
from accel.serve.requests.stop_strings import StopStrings

CONTEXT = 5  # ids of the prompt that the text of a continuation depends on, as in vLLM


@dataclass(frozen=True)
class Delta:
    """What one sequence has got since the last time.

    Attributes:
        index: Number of the sequence in its HTTP request.
        text: New text.
        ids: Ids of the new tokens that `logprobs` belong to.
        logprobs: Log probabilities of new tokens, where they were asked for. An end-of-sequence token has none.
        finish_reason: `stop` or `length` at the end of the sequence.
        tokens: Ids of all new tokens, those of text that is held back or follows a stop string included.
    """

    index: int
    text: str
    ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    tokens: tuple[int, ...] = ()

    @classmethod
    def joined(cls, parts: Sequence["Delta"]) -> "Delta":
        """Return parts of one sequence as one; at least one part is needed."""
        return cls(
            parts[0].index,
            "".join(part.text for part in parts),
            tuple(token for part in parts for token in part.ids),
            tuple(entry for part in parts for entry in part.logprobs),
            parts[-1].finish_reason,
            tuple(token for part in parts for token in part.tokens),
        )


@dataclass(frozen=True)
class Plan:
    """What an HTTP request asks of a model.

    Attributes:
        requests: One request for each sequence; those of one prompt follow each other.
        stops: Strings that end a text.
        contexts: Ids of the prompt that each text continues, for the detokenizer; empty for an encoder-decoder.
        prompt_tokens: Tokens of all prompts.
        param: Field of the body that holds the prompt.
    """

    requests: Sequence[Request]
    stops: Sequence[str] = ()
    contexts: Sequence[Sequence[int]] = ()
    prompt_tokens: int = 0
    param: str | None = None


class EarlyEndError(Exception):
    """A sequence that ended early, other than by its client's doing.

    Attributes:
        event: Its last event.
    """

    def __init__(self, event: Finished) -> None:
        super().__init__(event.reason.value)
        self.event = event


@dataclass(eq=False)
class _Sequence:
    """State of one sequence."""

    index: int
    detokenizer: Detokenizer
    stops: StopStrings
    ends: frozenset[int]
    ticket: Ticket | None = None
    finish_reason: str | None = None
    tokens: int = 0
    times: list[float] = field(default_factory=list)  # of the first and the last token, on `time.monotonic`'s clock

    def take(self, event: Event) -> Delta | None:
        """Return what an event adds; None after the end."""
        if self.finish_reason is not None:
            return None
        if isinstance(event, Finished):
            return self._end(event)
        self.tokens += len(event.ids)
        self.times = [*self.times[:1], time.monotonic()]
        text = self.stops.add(self.detokenizer.add(event.ids))
        if self.stops.found:
            self._stop()
        shown = [place for place, token in enumerate(event.ids) if token not in self.ends] if event.logprobs else []
        ids = tuple(event.ids[place] for place in shown)
        logprobs = tuple(event.logprobs[place] for place in shown)
        return Delta(self.index, text, ids, logprobs, self.finish_reason, event.ids)

    def _end(self, event: Finished) -> Delta:
        """Return the last delta. Raises `EarlyEndError` where the sequence ended early."""
        if event.reason not in (FinishReason.STOP, FinishReason.LENGTH):
            raise EarlyEndError(event)
        text = self.stops.add(self.detokenizer.finish())
        text += self.stops.finish()
        self.finish_reason = FinishReason.STOP.value if self.stops.found else event.reason.value
        return Delta(self.index, text, finish_reason=self.finish_reason)

    def _stop(self) -> None:
        """End the sequence, whose text is over while its tokens go on."""
        self.finish_reason = FinishReason.STOP.value
        if self.ticket is not None:
            self.ticket.cancel()


class Sequences:
    """Sequences of one HTTP request. Cancel them when the reply is over, however it ended.

    Args:
        served: The model.
        plan: What is asked of it.
        record: Line of the log, which gets the numbers of tokens.
        max_unread_tokens: Tokens that may wait to be read.
        limits: Section `serve` of the configuration.

    Raises:
        ApiError: The scheduler refuses a request.
    """

    def __init__(
        self, served: ServedModel, plan: Plan, record: Record, max_unread_tokens: int, limits: ServeConfig
    ) -> None:
        self._record, self._timeout_s = record, limits.timeout_s
        self._queue = EventQueue(max_unread_tokens, limits.coalesce_s, self.cancel)
        end_ids = frozenset(served.end_ids)
        self._sequences = [
            _Sequence(index, Detokenizer(served.tokenizer, context), StopStrings(plan.stops), end_ids)
            for index, context in enumerate(plan.contexts or [()] * len(plan.requests))
        ]
        record.model, record.prompt_tokens = served.name, plan.prompt_tokens
        record.sequences = len(plan.requests)
        try:
            for sequence, request in zip(self._sequences, plan.requests, strict=True):
                sequence.ticket = served.scheduler.submit(request, self._queue.listener(sequence.index))
        except Exception as error:  # which of them are the client's mistake, `refused` knows
            self.cancel()
            raise refused(error, plan.param) from error

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far."""
        return sum(sequence.tokens for sequence in self._sequences)

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """Yield what the sequences get, until all have ended.

        Raises:
            ApiError: A sequence took too long or failed.
        """
        while any(sequence.finish_reason is None for sequence in self._sequences):
            try:
                found = [self._sequences[index].take(event) for index, event in await self._queue.take()]
            except EarlyEndError as early:
                self._record.finish_reasons = [early.event.reason.value]
                if early.event.reason is FinishReason.TIMEOUT:
                    raise timed_out(self._timeout_s) from early
                raise unexpected() from early.event.error
            self._note()
            if deltas := _merged([delta for delta in found if delta is not None]):
                yield deltas

    def cancel(self) -> None:
        """Cancel what hasn't ended."""
        for sequence in self._sequences:
            if sequence.finish_reason is None and sequence.ticket is not None:
                sequence.ticket.cancel()
        self._note()

    def _note(self) -> None:
        """Write the numbers of tokens, their times and the reasons to end into the record."""
        self._record.completion_tokens = self.completion_tokens
        self._record.finish_reasons = [sequence.finish_reason or "cancelled" for sequence in self._sequences]
        timed = [sequence for sequence in self._sequences if sequence.times]
        if timed:
            self._record.first_token_s = min(sequence.times[0] for sequence in timed) - self._record.started
        self._record.token_times = [
            (sequence.times[-1] - sequence.times[0]) / (sequence.tokens - 1)
            for sequence in timed
            if sequence.tokens > 1 and len(sequence.times) > 1
        ]


def _merged(deltas: Sequence[Delta]) -> list[Delta]:
    """Return one delta for each sequence, of those that arrived together."""
    by_index: dict[int, list[Delta]] = {}
    for delta in deltas:
        by_index.setdefault(delta.index, []).append(delta)
    return [Delta.joined(parts) for parts in by_index.values()]


def context_of(ids: Sequence[int], served: ServedModel) -> Sequence[int]:
    """Return the end of a prompt that the text of its continuation depends on; nothing beside an encoder."""
    return () if served.has_encoder else ids[-CONTEXT:]
