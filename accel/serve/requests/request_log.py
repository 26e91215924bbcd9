"""One line of JSON for each request, without any text of prompts or outputs."""

import json
import logging
import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

LOGGER = "accel.serve.requests"
NOTED = (  # fields of a record that the process notes that computes the reply
    "route",
    "model",
    "stream",
    "sequences",
    "prompt_tokens",
    "completion_tokens",
    "finish_reasons",
    "first_token_s",
    "token_times",
)
logger = logging.getLogger(LOGGER)


@dataclass
class Record:
    """What the log and the metrics tell of a request. Times are in seconds.

    Attributes:
        method: Its HTTP method.
        id: Name that the reply has in the header x-request-id, and the body as `id`.
        started: When it began, on `time.monotonic`'s clock.
        route: Path of its route, or `other`.
        status: HTTP status; 499 where the client went away before the reply began.
        model: Name of the model.
        stream: The reply was streamed.
        sequences: Sequences that were generated.
        prompt_tokens: Tokens of all prompts.
        completion_tokens: New tokens of all sequences.
        finish_reasons: Why each sequence ended.
        first_token_s: Time to the first token.
        token_times: Time per output token of each sequence.
    """

    method: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: float = field(default_factory=time.monotonic)
    route: str = "other"
    status: int = 499
    model: str = ""
    stream: bool = False
    sequences: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    first_token_s: float | None = None
    token_times: list[float] = field(default_factory=list)

    def continue_as(self, other: "Record") -> None:
        """Take over what another process noted about the same request, times and status of this process excepted.

        Args:
            other: The record as the other process has it.
        """
        for name in NOTED:
            setattr(self, name, getattr(other, name))

    def line(self) -> str:
        """Return the record as JSON on one line."""
        values: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": self.id,
            "method": self.method,
            "route": self.route,
            "status": self.status,
            "duration_s": round(time.monotonic() - self.started, 4),
        }
        if self.sequences:
            values |= {
                "model": self.model,
                "stream": self.stream,
                "sequences": self.sequences,
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": self.completion_tokens,
                "finish_reasons": self.finish_reasons,
                "first_token_s": None if self.first_token_s is None else round(self.first_token_s, 4),
            }
        return json.dumps(values)


def write(record: Record) -> None:
    """Write a record to the log."""
    logger.info("%s", record.line())
