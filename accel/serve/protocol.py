"""What the HTTP side and the decoding side of the server know of each other.

The HTTP side turns a body into `Request`s of one sequence each (`n=3` makes three), submits them to the `Scheduler` of
their model, and gets `Event`s back. Text is its own affair: the scheduler knows token ids only, so the HTTP side
detokenizes, looks for stop strings, and cancels a request whose text has ended or whose client went away.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from accel.errors import AccelError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LogitsProcessor


class QueueFullError(AccelError):
    """The queue of a model is full. HTTP 429."""


class RequestTooLongError(AccelError):
    """A prompt, or a prompt and its new tokens, exceed what the server allows. HTTP 413."""


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"  # an end-of-sequence token, or whatever else GenerationConfig stops at
    LENGTH = "length"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"
    ERROR = "error"


@dataclass(frozen=True, eq=False)
class Request:
    """One sequence to generate.

    Attributes:
        inputs: One input of the model, as for `AcceleratedModel.generate`: `input_ids` int64 [1, length], or features.
        generation: Options by GenerationConfig's names, over those of the deployable's `generation_config.json`.
        seed: Seed of sampling, for this request alone; None: a random one.
        logprobs: Number of most likely tokens to report beside each token; None: report nothing.
        logits_processor: Constrains this request's tokens, for instance to a grammar.
        deadline: Time on `time.monotonic()`'s clock after which the request ends with `TIMEOUT`; None: never.
        gather_s: Seconds for which tokens behind the first one may be gathered into one event, which costs less than
            one for each; infinity: until the request ends. A token that comes later than that ends the gathering.
    """

    inputs: Mapping[str, "Tensor"]
    generation: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None
    logits_processor: "LogitsProcessor | None" = None
    deadline: float | None = None
    gather_s: float = 0.0


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities at one position, of the distribution that the model gives (before temperature and filters).

    Attributes:
        token: Log probability of the token that was chosen.
        top: Ids of the most likely tokens and their log probabilities, most likely first.
    """

    token: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Tokens:
    """New tokens of a request, in order; beam searches report theirs once, at the end.

    Attributes:
        ids: Token ids. An end-of-sequence token is included.
        logprobs: One for each id where the request asked for them, else empty.
    """

    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class Finished:
    """Last event of a request.

    Attributes:
        reason: Why it ended.
        error: What went wrong, with `FinishReason.ERROR`.
    """

    reason: FinishReason
    error: Exception | None = None


Event = Tokens | Finished
Listener = Callable[[Event], None]  # called on the scheduler's thread: it must return at once and never raise


@dataclass(frozen=True)
class Status:
    """State of a scheduler at one moment, for `/metrics`.

    Attributes:
        waiting: Requests in the queue.
        running: Requests that are being decoded.
        rows: Rows of the running batch; 0 where it has none.
        cached_tokens: Tokens that the running rows hold.
        cache_tokens: Tokens that all rows can hold.
        generated_tokens: New tokens since the start.
    """

    waiting: int
    running: int
    rows: int
    cached_tokens: int
    cache_tokens: int
    generated_tokens: int


class Ticket(Protocol):
    """A submitted request."""

    async def accepted(self) -> None:
        """Wait until the request is queued.

        Raises:
            Exception: What refuses it, as `Scheduler.submit` raises it where it doesn't have to wait for that.
        """

    def cancel(self) -> None:
        """End the request with `CANCELLED` soon; of no effect once it has ended. Callable from any thread."""


class Scheduler(Protocol):
    """Decodes the requests of one model on a thread of its own."""

    def warm_up(self) -> None:
        """Run what a first request would otherwise wait for: captures, compilations, allocations."""

    def submit(self, request: Request, listener: Listener) -> Ticket:
        """Queue a request; `listener` gets its events. Callable from any thread.

        Raises:
            QueueFullError: The queue is full.
            RequestTooLongError: The prompt and its new tokens don't fit.
            ValueError: An input or an option has a wrong type, shape or range.
            RuntimeError: The scheduler is closed.
        """

    def status(self) -> Status:
        """Return the present state. Callable from any thread."""

    def close(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, wait up to `drain_s` seconds for those that run, cancel the rest and end the thread."""
