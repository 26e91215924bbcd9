"""Inputs: from texts through a tokenizer, or random ids where a checkpoint has none. And how far outputs are off."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from accel.adapters.types import Architecture
from accel.data.corpus import SAMPLES, read_lines
from accel.errors import AccelError

logger = logging.getLogger(__name__)

SAMPLE_FILES = (SAMPLES / "page.txt", SAMPLES / "questions.txt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "vocab.json", "source.spm")


def has_tokenizer(folder: Path) -> bool:
    """Whether `folder` holds a tokenizer's files."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in `folder`, or None if there is none."""
    if not has_tokenizer(folder):
        return None
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    if not AutoConfig.from_pretrained(folder).is_encoder_decoder:
        tokenizer.padding_side = "left"  # what is generated follows the last token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # the mask says which of them count
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], chat: bool = False) -> dict[str, Tensor]:
    """Texts -> padded `input_ids` and `attention_mask`, [batch, source]. What is too long is cut, and said.

    `chat`: each is what a user says first, put into the tokenizer's chat template.
    """
    if chat:
        turns = [[{"role": "user", "content": text}] for text in texts]
        texts = [str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)) for turn in turns]
    special = {"add_special_tokens": not chat}  # a template writes them itself
    full = [len(ids) for ids in tokenizer(list(texts), **special)["input_ids"]]
    for text, length in zip(texts, full, strict=True):
        if length > tokenizer.model_max_length:
            logger.warning(
                f"{text[:40]!r}… is {length} tokens long, the model takes {tokenizer.model_max_length}: "
                f"the last {length - tokenizer.model_max_length} were cut off"
            )
    padded = len(texts) > 1
    encoded = tokenizer(list(texts), padding=padded, truncation=True, return_tensors="pt", **special)
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


@dataclass(frozen=True)
class Prompt:
    """A text as a model with a tokenizer is given it. `length`: the ids to continue; the model wrote the others.

    `kind`: "page" (a passage), "chat" (a question in the chat template) or "sampled" (the model's own from the start).
    """

    kind: str
    text: str
    ids: Sequence[int]
    length: int

    def inputs(self, most: int | None = None) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` of what is to be continued, [1, `length`]; at most the last `most`."""
        return unpadded(self.ids[: self.length][-(most or 0) :])

    def cut(self, most: int | None = None) -> dict[str, Tensor]:
        """The same of all ids, [1, ids]; at most the first `most`."""
        return unpadded(self.ids[:most])


def unpadded(ids: Sequence[int]) -> dict[str, Tensor]:
    """One row of `input_ids` and `attention_mask`, [1, ids]."""
    row = torch.tensor([list(ids)])
    return {"input_ids": row, "attention_mask": torch.ones_like(row)}


def write_prompts(prompts: Sequence[Prompt], path: Path) -> None:
    """Write what `read_prompts` reads."""
    path.write_text(json.dumps([asdict(prompt) for prompt in prompts]), encoding="utf-8")


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts in a file that `write_prompts` wrote."""
    return [Prompt(**values) for values in json.loads(path.read_text(encoding="utf-8"))]


@dataclass(frozen=True)
class References:
    """Inputs, and for each the outputs that count as right; none of those where nobody knows."""

    texts: Sequence[str]
    accepted: Sequence[Sequence[str]]

    @classmethod
    def read(cls, path: Path) -> "References":
        """Lines of `text <tab> accepted <tab> ...`. Raises `AccelError`."""
        rows = [line.split("\t") for line in read_lines(path)]
        for number, row in enumerate(rows, 1):
            if len(row) < 2:
                raise AccelError(f"{path}, line {number}: expected a text, a tab and an accepted output")
        return cls([row[0] for row in rows], [row[1:] for row in rows])

    @classmethod
    def pair(cls, texts: Sequence[str], targets: Sequence[str], names: tuple[str, str]) -> "References":
        """Texts and their targets, one each. Raises `AccelError` on different numbers of them; `names` says whose."""
        if len(texts) != len(targets):
            raise AccelError(
                f"{names[0]} holds {len(texts)} texts and {names[1]} {len(targets)}: each text needs its target"
            )
        return cls(texts, [[target] for target in targets])

    def first(self, count: int) -> "References":
        return References(self.texts[:count], self.accepted[:count])


def pad(batch: Sequence[Mapping[str, Tensor]], value: int, *, left: bool) -> dict[str, Tensor]:
    """Single inputs [1, length] -> one batch [batch, longest], ids filled with `value` and the mask with 0.

    `left`: on the left, as a model needs it that continues its input. Features, of one length, are not padded.
    """
    fill = {"input_ids": value, "attention_mask": 0}
    longest = max(item[name].shape[1] for item in batch for name in item)

    def row(name: str, tensor: Tensor) -> Tensor:
        if name not in fill:
            return tensor
        missing = longest - tensor.shape[1]
        return torch.nn.functional.pad(tensor, (missing, 0) if left else (0, missing), value=fill[name])

    return {name: torch.cat([row(name, item[name]) for item in batch]) for name in batch[0]}


def written(model: Any, tokenizer: Any, batch: Mapping[str, Tensor], ids: Tensor) -> list[str]:
    """The texts in `ids`, which `model` generated for `batch`; what a decoder-only model continues is left out."""
    begin = 0 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
    texts: list[str] = tokenizer.batch_decode(ids[:, begin:], skip_special_tokens=True)
    return texts


def random_inputs(
    architecture: Architecture, config: PretrainedConfig, count: int, length: int, seed: int
) -> list[Mapping[str, Tensor]]:
    """`count` single inputs of random ids, [1, up to length], of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [max(1, length - position * length // (2 * count)) for position in range(count)]
    return [architecture.sample_inputs(config, 1, size, generator) for size in lengths]
