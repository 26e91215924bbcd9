"""Inputs: from texts through a tokenizer, or random ids where a checkpoint has none. And how far outputs are off."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from accel import console
from accel.adapter import Architecture
from accel.errors import AccelError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "vocab.json", "source.spm")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in `folder`, or None if there is none."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, Tensor]:
    """Texts -> padded `input_ids` and `attention_mask`, [batch, source]. What is too long is cut, and said."""
    full = [len(ids) for ids in tokenizer(list(texts))["input_ids"]]
    for text, length in zip(texts, full, strict=True):
        if length > tokenizer.model_max_length:
            console.warn(
                f"{text[:40]!r}… is {length} tokens long, the model takes {tokenizer.model_max_length}: "
                f"the last {length - tokenizer.model_max_length} were cut off"
            )
    encoded = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file. Raises `AccelError` if it is missing, empty or not UTF-8."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise AccelError(
            f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}"
        ) from error
    except OSError as error:
        raise AccelError(f"can't read {path}: {error.strerror}") from error
    if not any(line.strip() for line in lines):
        raise AccelError(f"{path} holds no text")
    return lines


@dataclass(frozen=True)
class References:
    """Inputs with the outputs that count as right."""

    texts: Sequence[str]
    accepted: Sequence[Sequence[str]]

    @classmethod
    def read(cls, path: Path, limit: int) -> "References":
        """The first `limit` lines of `text <tab> accepted <tab> ...`. Raises `AccelError`."""
        rows = [line.split("\t") for line in read_lines(path)[:limit]]
        for number, row in enumerate(rows, 1):
            if len(row) < 2:
                raise AccelError(f"{path}, line {number}: expected a text, a tab and an accepted output")
        return cls([row[0] for row in rows], [row[1:] for row in rows])

    def error_rates(self, outputs: Sequence[str]) -> dict[str, float]:
        """Percent of outputs that match no accepted one, and word edits to the nearest over its words."""
        wrong = sum(output not in accepted for output, accepted in zip(outputs, self.accepted, strict=True))
        edits = words = 0
        for output, accepted in zip(outputs, self.accepted, strict=True):
            distance, length = min((_edits(output.split(), right.split()), len(right.split())) for right in accepted)
            edits, words = edits + distance, words + length
        return {"sequence_error_rate": 100 * wrong / len(outputs), "token_error_rate": 100 * edits / max(1, words)}


def _edits(first: Sequence[str], second: Sequence[str]) -> int:
    """Levenshtein distance."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, 1):
        previous, row[0] = row[0], i
        for j, right in enumerate(second, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (left != right))
    return row[-1]


def pad(batch: Sequence[Mapping[str, Tensor]], value: int) -> dict[str, Tensor]:
    """Single inputs [1, length] -> one batch [batch, longest], ids filled with `value` and the mask with 0."""
    longest = max(item["input_ids"].shape[1] for item in batch)
    fill = {"input_ids": value, "attention_mask": 0}
    return {
        name: torch.cat(
            [torch.nn.functional.pad(item[name], (0, longest - item[name].shape[1]), value=filler) for item in batch]
        )
        for name, filler in fill.items()
    }


def random_inputs(
    architecture: Architecture, config: PretrainedConfig, count: int, length: int, seed: int
) -> list[Mapping[str, Tensor]]:
    """`count` single inputs of random ids, [1, up to length], of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [max(1, length - position * length // (2 * count)) for position in range(count)]
    return [architecture.feeds(config, 1, size, generator) for size in lengths]
