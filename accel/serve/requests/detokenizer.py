"""Incremental detokenization: text of tokens that arrive one by one, never cut within a character."""

from collections.abc import Sequence
from typing import Any

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what tokenizers decode bytes to that are no whole character
MAX_HELD = 16  # tokens held back at most: a character has 4 bytes, so more of them are no character at all


class Detokenizer:
    """Text of one sequence.

    A token's text depends on the tokens before it (a space at the beginning is dropped, a character may have several
    tokens). So the tokens since the last complete character are decoded together with the few before, and once without:
    the difference is the new text. The method is that of text-generation-inference and vLLM:
    https://github.com/huggingface/text-generation-inference/blob/main/server/text_generation_server/models/model.py
    (`decode_token`).

    Args:
        tokenizer: The model's tokenizer.
        context: Ids before the sequence, whose text is not returned: the end of the prompt that it continues.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context)
        self._start = 0  # where decoding begins
        self._read = len(self._ids)  # tokens before here are in the returned text

    def add(self, ids: Sequence[int]) -> str:
        """Return the text that is complete with `ids`, which are decoded at once unless they end within a character."""
        first, (start, read) = len(self._ids), (self._start, self._read)
        text = self._extend(ids)
        if text is not None:
            return text
        del self._ids[first:]
        self._start, self._read = start, read
        return "".join(self._extend([token]) or "" for token in ids)

    def _extend(self, ids: Sequence[int]) -> str | None:
        """Return the text that is complete with more ids; None if they end within a character, perhaps."""
        self._ids += ids
        before, after = self._decode(self._read), self._decode(len(self._ids))
        if after.endswith(INCOMPLETE) and (len(ids) > 1 or len(self._ids) - self._read < MAX_HELD):
            return None
        if len(after) > len(before):
            self._start, self._read = self._read, len(self._ids)
            return after[len(before) :]
        return ""

    def finish(self) -> str:
        """Return the text that was held back, its incomplete characters included."""
        if self._read == len(self._ids):
            return ""
        before, after = self._decode(self._read), self._decode(len(self._ids))
        self._start = self._read = len(self._ids)
        return after[len(before) :]

    def _decode(self, end: int) -> str:
        """Return the text of the ids from the start up to `end`."""
        return str(self._tokenizer.decode(self._ids[self._start : end], skip_special_tokens=True))
