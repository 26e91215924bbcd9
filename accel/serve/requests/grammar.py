"""`response_format`: output that is JSON, or JSON by a schema, by masking all tokens that would break it.

llguidance computes the masks: https://github.com/guidance-ai/llguidance
"""

import json
import threading
from typing import Any

import llguidance.hf
import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from accel.serve.requests.bodies import ResponseFormat
from accel.serve.requests.errors import invalid
from accel.serve.requests.served_model import ServedModel

SILENT = 0  # log level
# One way of writing white space, that of Python's `json`: else a model may write white space without end.
WHITE_SPACE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """Grammars over the vocabulary of one model. The vocabulary is read at the first request that needs it."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served
        self._lock = threading.Lock()
        self._vocabulary: Any = None

    def processor(self, form: ResponseFormat | None) -> "GrammarProcessor | None":
        """Return the logits processor of one sequence; None where any text will do.

        Raises:
            ApiError: The schema can't be used, or the tokenizer's tokens have no text that is known beforehand.
        """
        if form is None or form.type == "text":
            return None
        schema = form.json_schema.definition if form.json_schema is not None else {"type": "object"}
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=WHITE_SPACE)
        except ValueError as error:
            raise invalid(f"response_format: {error}", "response_format") from error
        return self.of(grammar)

    def of(self, grammar: str) -> "GrammarProcessor":
        """Return the logits processor of one sequence.

        Args:
            grammar: The grammar, as llguidance serializes it.

        Raises:
            ApiError: As `processor`.
        """
        matcher = llguidance.LLMatcher(self._tokens(), grammar, log_level=SILENT)
        if matcher.is_error():
            reason = str(matcher.get_error()).splitlines()[0]
            raise invalid(f"response_format: the schema can't be used: {reason}", "response_format")
        return GrammarProcessor(grammar, matcher, self._served.end_ids)

    def _tokens(self) -> Any:
        """Return the vocabulary as llguidance needs it."""
        with self._lock:
            if self._vocabulary is None:
                try:
                    self._vocabulary = llguidance.hf.from_tokenizer(
                        self._served.tokenizer,  # type: ignore[arg-type]
                        eos_token=self._served.end_ids or None,
                    )
                except (ValueError, RuntimeError) as error:
                    name = self._served.name
                    message = f"response_format: the tokenizer of {name} has no bytes for its tokens"
                    raise invalid(message, "response_format") from error
            return self._vocabulary


class GrammarProcessor(LogitsProcessor):
    """Masks the tokens that a grammar forbids, for one sequence. It is called once for each new token, in order.

    Args:
        grammar: The grammar, as llguidance serializes it.
        matcher: The grammar's state.
        end_ids: Ids that end a sequence.

    Attributes:
        grammar: The grammar.
    """

    def __init__(self, grammar: str, matcher: Any, end_ids: list[int]) -> None:
        self.grammar = grammar
        self._matcher, self._end_ids = matcher, end_ids
        self._length: int | None = None  # of the ids that the grammar knows, those before the first new token counted

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `scores` [1, vocabulary] with minus infinity where the grammar forbids the token.

        Args:
            input_ids: Ids up to here, [1, length].
            scores: Scores of the next token.

        Raises:
            RuntimeError: A token was chosen that the grammar forbids, or the grammar grew beyond llguidance's limits.
        """
        known = input_ids.shape[1] if self._length is None else self._length
        for token in input_ids[0, known:].tolist():
            if not self._matcher.is_stopped():
                self._matcher.consume_token(token)
        self._length = input_ids.shape[1]
        if self._matcher.is_error():
            raise RuntimeError(self._matcher.get_error())
        allowed = np.zeros(scores.shape[1], dtype=bool)
        if self._matcher.is_stopped():
            allowed[self._end_ids] = True
        else:
            bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
            size = min(len(bits), len(allowed))  # the model's vocabulary may be padded, and the mask is
            allowed[:size] = bits[:size]
        return scores.masked_fill(~torch.from_numpy(allowed).to(scores.device), -torch.inf)
