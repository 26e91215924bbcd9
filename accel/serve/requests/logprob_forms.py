"""Log probabilities in the forms of OpenAI's two routes."""

import math
from collections.abc import Sequence
from typing import Any

from accel.serve.requests.detokenizer import INCOMPLETE
from accel.serve.requests.sequences import Delta

SMALLEST = -9999.0  # in place of minus infinity, which JSON doesn't have; OpenAI's choice too


def _finite(value: float) -> float:
    """Return a log probability as JSON can write it."""
    return value if math.isfinite(value) else SMALLEST


def _text(tokenizer: Any, token: int) -> str:
    """Return the text of one token; special ones have theirs."""
    return str(tokenizer.decode([token]))


def _bytes(text: str) -> list[int] | None:
    """Return the bytes of a token's text; None for a part of a character, which has no text."""
    return None if INCOMPLETE in text else list(text.encode())


def _entry(tokenizer: Any, token: int, value: float) -> dict[str, Any]:
    """Return a token and its log probability."""
    text = _text(tokenizer, token)
    return {"token": text, "logprob": _finite(value), "bytes": _bytes(text)}


def for_chat(tokenizer: Any, delta: Delta) -> dict[str, Any]:
    """Return the log probabilities of a delta as `/v1/chat/completions` has them."""
    content = [
        {
            **_entry(tokenizer, token, logprobs.token),
            "top_logprobs": [_entry(tokenizer, other, value) for other, value in logprobs.top],
        }
        for token, logprobs in zip(delta.ids, delta.logprobs, strict=True)
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """Log probabilities of one sequence as `/v1/completions` has them.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._offset = 0  # characters of the tokens before

    def of(self, delta: Delta) -> dict[str, Any]:
        """Return those of the next delta. `text_offset` counts the characters of the tokens before."""
        tokens = [_text(self._tokenizer, token) for token in delta.ids]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(logprobs.token) for logprobs in delta.logprobs],
            "top_logprobs": [self._top(logprobs.top) for logprobs in delta.logprobs],
            "text_offset": offsets,
        }

    def _top(self, top: Sequence[tuple[int, float]]) -> dict[str, float]:
        """Return the most likely tokens of a position. Of several with one text, the most likely counts."""
        texts: dict[str, float] = {}
        for token, value in top:
            texts.setdefault(_text(self._tokenizer, token), _finite(value))
        return texts
