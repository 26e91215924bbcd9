"""A submitted request: its events on the scheduler's thread, its cancellation from any thread."""

import logging
import threading
import time
from collections.abc import Callable
from math import inf

from accel.models.decoding.sequence import Sequence
from accel.serve.protocol import Event, Finished, FinishReason, Listener, Request, TokenLogprobs, Tokens

logger = logging.getLogger(__name__)


class Job:
    """A submitted request. Implements `protocol.Ticket`; all other methods are for the scheduler's thread.

    Args:
        request: The request.
        listener: Gets its events.
        sequence: Its options and tokens.
        wake: Called when the request is cancelled.

    Attributes:
        alone: Why `generate` has to run the request by itself; None if it can be a row of a batch.
        submitted: Time of its submission on `time.monotonic()`'s clock.
        finished: True once it has its last event.
    """

    def __init__(
        self,
        request: Request,
        listener: Listener,
        sequence: Sequence,
        alone: str | None,
        wake: Callable[[], None],
    ) -> None:
        self.request, self.sequence, self.alone = request, sequence, alone
        self._listener, self._wake = listener, wake
        self._cancelled = threading.Event()
        self.submitted = time.monotonic()
        self.finished = False
        self._gathered: list[int] = []  # tokens that aren't reported yet, and their log probabilities
        self._gathered_logprobs: list[TokenLogprobs] = []
        self._gather_until = -inf  # on `time.monotonic()`'s clock; the first token is reported at once

    async def accepted(self) -> None:
        """Return at once: what refuses a request was raised before there was a job for it."""

    def cancel(self) -> None:
        """End the request with `CANCELLED` soon; of no effect once it has ended. Callable from any thread."""
        self._cancelled.set()
        self._wake()

    @property
    def reason_to_end(self) -> FinishReason | None:
        """Why the request ends before its last token: it was cancelled or its deadline is over; None if it goes on."""
        if self._cancelled.is_set():
            return FinishReason.CANCELLED
        deadline = self.request.deadline
        return FinishReason.TIMEOUT if deadline is not None and time.monotonic() >= deadline else None

    def add(self, token: int, logprobs: tuple[TokenLogprobs, ...] = ()) -> bool:
        """Append a token to the sequence, report it, at once or with later ones, and finish the request at its end.

        Args:
            token: The token.
            logprobs: Its log probabilities, one entry where the request asked for them.

        Returns:
            True if the request is finished.
        """
        self.sequence.append(token)
        self._gathered.append(token)
        self._gathered_logprobs += logprobs
        if self._gather_until != inf and (now := time.monotonic()) >= self._gather_until:
            self._gather_until = now + self.request.gather_s
            self._report_gathered()
        if not self.finished and self.sequence.finished:
            self.finish(FinishReason.STOP if self.sequence.ended else FinishReason.LENGTH)
        return self.finished

    def _report_gathered(self) -> None:
        """Report the tokens that were gathered."""
        if self._gathered:
            event = Tokens(tuple(self._gathered), tuple(self._gathered_logprobs))
            self._gathered, self._gathered_logprobs = [], []
            self.report(event)

    def report(self, event: Event) -> None:
        """Pass an event to the listener. A listener that raises gets no further ones, and its request is cancelled."""
        if self.finished:
            return
        try:
            self._listener(event)
        except Exception:  # of the HTTP side: the other requests go on
            logger.exception("the listener of a request failed: the request is cancelled")
            self.finished = True

    def finish(self, reason: FinishReason, error: Exception | None = None) -> None:
        """Report the last event; of no effect if the request has finished."""
        self._report_gathered()
        self.report(Finished(reason, error))
        self.finished = True
