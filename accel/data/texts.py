"""Text inputs: token ids of texts, prompts and references; random ids where a checkpoint has no tokenizer."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from accel.adapters.types import Architecture
from accel.data import pretrained
from accel.data.corpus import SAMPLES, read_lines
from accel.errors import AccelError

logger = logging.getLogger(__name__)

SAMPLE_FILES = (SAMPLES / "page.txt", SAMPLES / "questions.txt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "vocab.json", "source.spm")


def has_tokenizer(folder: Path) -> bool:
    """Return whether a checkpoint has a tokenizer's files."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a checkpoint, with a padding token; None if there is no tokenizer."""
    if not has_tokenizer(folder):
        return None
    tokenizer = pretrained.load_tokenizer(folder)
    if not pretrained.load_config(folder).is_encoder_decoder:
        tokenizer.padding_side = "left"  # decoder-only models continue after the last token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # any id will do: the attention mask excludes padding
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], chat: bool = False) -> dict[str, Tensor]:
    """Tokenize texts into one padded batch. Texts that are too long are truncated, with a warning.

    Args:
        tokenizer: The checkpoint's tokenizer.
        texts: The texts.
        chat: Put each text into the tokenizer's chat template, as a user's first message.

    Returns:
        `input_ids` and `attention_mask`, [batch, source].
    """
    if chat:
        conversations = [[{"role": "user", "content": text}] for text in texts]
        texts = [
            str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
            for conversation in conversations
        ]
    add_special_tokens = not chat  # a chat template writes them itself
    lengths = [len(ids) for ids in tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]]
    for text, length in zip(texts, lengths, strict=True):
        excess = length - tokenizer.model_max_length
        if excess > 0:
            logger.warning(
                f"{text[:40]!r}… is {length} tokens long, the model takes {tokenizer.model_max_length}: "
                f"the last {excess} were cut off"
            )
    encoded = tokenizer(
        list(texts),
        padding=len(texts) > 1,
        truncation=True,
        return_tensors="pt",
        add_special_tokens=add_special_tokens,
    )
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


@dataclass(frozen=True)
class Prompt:
    """Ids to run a model with a tokenizer on: those of a text, and those that the model generated from them.

    Attributes:
        kind: `page` (a passage), `chat` (a question in the chat template) or `sampled` (generated from the start).
        text: The text.
        ids: Ids of the text, followed by generated ones.
        length: Number of ids that are the prompt; the model generated the others.
    """

    kind: str
    text: str
    ids: Sequence[int]
    length: int

    def inputs(self, max_length: int | None = None) -> dict[str, Tensor]:
        """Return the inputs for generation: the prompt, or its last `max_length` ids.

        Returns:
            `input_ids` and `attention_mask`, [1, length].
        """
        ids = self.ids[: self.length]
        if max_length is not None:
            ids = ids[-max_length:]
        return unpadded(ids)

    def full_inputs(self, max_length: int | None = None) -> dict[str, Tensor]:
        """Return the inputs for one forward pass: all ids, generated ones included, or the first `max_length`.

        Returns:
            `input_ids` and `attention_mask`, [1, ids].
        """
        return unpadded(self.ids[:max_length])


def unpadded(ids: Sequence[int]) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask` of one sequence without padding, [1, ids]."""
    input_ids = torch.tensor([list(ids)])
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def write_prompts(prompts: Sequence[Prompt], path: Path) -> None:
    """Write prompts as JSON, for `read_prompts`."""
    path.write_text(json.dumps([asdict(prompt) for prompt in prompts]), encoding="utf-8")


def read_prompts(path: Path) -> list[Prompt]:
    """Read the prompts that `write_prompts` wrote."""
    return [Prompt(**values) for values in json.loads(path.read_text(encoding="utf-8"))]


@dataclass(frozen=True)
class References:
    """Texts with the outputs that count as right.

    Attributes:
        texts: The inputs.
        accepted: Per input, its accepted outputs. Empty where none are known.
    """

    texts: Sequence[str]
    accepted: Sequence[Sequence[str]]

    @classmethod
    def read(cls, path: Path) -> "References":
        """Read a file with lines of `text <tab> accepted output <tab> ...`.

        Raises:
            AccelError: The file can't be read, or a line has no tab.
        """
        rows = [line.split("\t") for line in read_lines(path)]
        for number, row in enumerate(rows, 1):
            if len(row) < 2:
                raise AccelError(f"{path}, line {number}: expected a text, a tab and an accepted output")
        return cls([row[0] for row in rows], [row[1:] for row in rows])

    @classmethod
    def pair(cls, texts: Sequence[str], targets: Sequence[str], names: tuple[str, str]) -> "References":
        """Pair each text with its one target.

        Args:
            texts: The inputs.
            targets: The accepted outputs, one per input.
            names: Where texts and targets come from, for the message.

        Raises:
            AccelError: The numbers of texts and targets differ.
        """
        if len(texts) != len(targets):
            raise AccelError(
                f"{names[0]} holds {len(texts)} texts and {names[1]} {len(targets)}: give one target per text"
            )
        return cls(texts, [[target] for target in targets])

    def first(self, count: int) -> "References":
        """Return the first `count` references."""
        return References(self.texts[:count], self.accepted[:count])


def pad(batch: Sequence[Mapping[str, Tensor]], value: int, *, left: bool) -> dict[str, Tensor]:
    """Pad single inputs to the longest and concatenate them into one batch.

    Args:
        batch: Inputs of one sequence each: `input_ids` and `attention_mask` [1, length], or features [1, ...], which
            have one length and are not padded.
        value: The padding id. The mask is padded with 0.
        left: Pad on the left, for models that continue their input, instead of on the right.

    Returns:
        The inputs, [batch, longest].
    """
    fill_values = {"input_ids": value, "attention_mask": 0}
    longest = max(item[name].shape[1] for item in batch for name in item)

    def padded(name: str, tensor: Tensor) -> Tensor:
        if name not in fill_values:
            return tensor
        missing = longest - tensor.shape[1]
        return torch.nn.functional.pad(tensor, (missing, 0) if left else (0, missing), value=fill_values[name])

    return {name: torch.cat([padded(name, item[name]) for item in batch]) for name in batch[0]}


def decode_new_tokens(model: Any, tokenizer: Any, batch: Mapping[str, Tensor], ids: Tensor) -> list[str]:
    """Decode the texts that a model generated, without the prompt that a decoder-only model continues.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        batch: The inputs of `generate`, [batch, source].
        ids: The result of `generate`, [batch, length].
    """
    start = 0 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
    texts: list[str] = tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
    return texts


def random_inputs(
    architecture: Architecture, config: PretrainedConfig, count: int, length: int, seed: int
) -> list[Mapping[str, Tensor]]:
    """Return `count` inputs of random ids, [1, up to `length`] each, whose lengths fall to about half of `length`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [max(1, length - position * length // (2 * count)) for position in range(count)]
    return [architecture.sample_inputs(config, 1, size, generator) for size in lengths]
