"""Sequences of one HTTP request: from the events of their scheduler to text, log probabilities and reasons to end."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from math import inf

from accel.config.serve import ServeConfig
from accel.serve.protocol import Finished, FinishReason, Request, Ticket, TokenLogprobs
from accel.serve.requests.detokenizer import Detokenizer
from accel.serve.requests.errors import refused, timed_out, unexpected
from accel.serve.requests.event_queue import Arrivals, EventQueue
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
    times: tuple[float, ...] = ()  # of the first and, behind some others, the last token, on `time.monotonic`'s clock

    def take(self, arrivals: Arrivals) -> Delta | None:
        """Return what events add; None after the end.

        Raises:
            EarlyEndError: The sequence ended early.
        """
        if self.finish_reason is not None:
            return None
        ids, text = self._text_of(arrivals.ids)
        self.tokens += len(ids)
        self.times = (*self.times[:1], *arrivals.times) if arrivals.times else self.times
        if self.stops.found:
            self._stop()
        elif arrivals.end is not None:
            text += self._end(arrivals.end)
        shown = [place for place, token in enumerate(ids) if token not in self.ends] if arrivals.logprobs else []
        return Delta(
            self.index,
            text,
            tuple(ids[place] for place in shown),
            tuple(arrivals.logprobs[place] for place in shown),
            self.finish_reason,
            tuple(ids),
        )

    def _text_of(self, ids: list[int]) -> tuple[list[int], str]:
        """Return new tokens and their text, up to the token that completes a stop string."""
        if not self.stops.any:
            return ids, self.detokenizer.add(ids)
        text = ""
        for count, token in enumerate(ids, 1):
            text += self.stops.add(self.detokenizer.add([token]))
            if self.stops.found:
                return ids[:count], text
        return ids, text

    def _end(self, event: Finished) -> str:
        """End the sequence, and return the text that was held back. Raises `EarlyEndError` where it ended early."""
        if event.reason not in (FinishReason.STOP, FinishReason.LENGTH):
            raise EarlyEndError(event)
        text = self.stops.add(self.detokenizer.finish())
        text += self.stops.finish()
        self.finish_reason = FinishReason.STOP.value if self.stops.found else event.reason.value
        return text

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
        stream: Report tokens while others are generated. Without it each sequence is reported once, when it has ended.

    Raises:
        ApiError: The scheduler refuses a request.
    """

    def __init__(
        self,
        served: ServedModel,
        plan: Plan,
        record: Record,
        max_unread_tokens: int,
        limits: ServeConfig,
        stream: bool = True,
    ) -> None:
        self._record, self._timeout_s, self._param = record, limits.timeout_s, plan.param
        ends_only = not stream and not plan.stops  # a stop string is to be found before the sequence has ended
        self._queue = EventQueue(max_unread_tokens, limits.coalesce_s, self.cancel, ends_only)
        gather_s = inf if ends_only else limits.coalesce_s
        end_ids = frozenset(served.end_ids)
        self._sequences = [
            _Sequence(index, Detokenizer(served.tokenizer, context), StopStrings(plan.stops), end_ids)
            for index, context in enumerate(plan.contexts or [()] * len(plan.requests))
        ]
        record.model, record.prompt_tokens = served.name, plan.prompt_tokens
        record.sequences = len(plan.requests)
        try:
            for sequence, request in zip(self._sequences, plan.requests, strict=True):
                gathering = replace(request, gather_s=gather_s)
                sequence.ticket = served.scheduler.submit(gathering, self._queue.listener(sequence.index))
        except Exception as error:  # which of them are the client's mistake, `refused` knows
            self.cancel()
            raise refused(error, plan.param) from error

    async def accepted(self) -> None:
        """Wait until all requests are queued.

        Raises:
            ApiError: The scheduler refuses one of them.
        """
        try:
            for sequence in self._sequences:
                if sequence.ticket is not None:
                    await sequence.ticket.accepted()
        except Exception as error:
            raise refused(error, self._param) from error

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
                found = [self._sequences[each.index].take(each) for each in await self._queue.take()]
            except EarlyEndError as early:
                self._record.finish_reasons = [early.event.reason.value]
                if early.event.reason is FinishReason.TIMEOUT:
                    raise timed_out(self._timeout_s) from early
                raise unexpected() from early.event.error
            self._note()
            if deltas := [delta for delta in found if delta is not None]:
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


def context_of(ids: Sequence[int], served: ServedModel) -> Sequence[int]:
    """Return the end of a prompt that the text of its continuation depends on; nothing beside an encoder."""
    return () if served.has_encoder else ids[-CONTEXT:]
