"""Checkpoint of T5's shape with random weights that generates many distinct tokens."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

DIMENSIONS = {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}
SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")


def save_random_t5(folder: Path, **dimensions: int) -> None:
    """Write a T5 with random weights, and a tokenizer with one word per id, which CTranslate2's converter asks for.

    A T5 with untrained weights repeats one token: its output layer is the embedding, so the likeliest next token is the
    last one. Here random signs in the decoder's last norm take that similarity away, and larger feed-forward outputs
    beside smaller attention outputs let the next token depend on the last one more than on the source.

    Args:
        folder: Created, with its parents.
        dimensions: Fields of `T5Config` in place of those of T5-small.
    """
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    values: dict[str, Any] = {**DIMENSIONS, **dimensions, "decoder_start_token_id": 0}
    config = T5Config(**values)
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        norm = model.decoder.final_layer_norm.weight
        norm.mul_(torch.randint(2, norm.shape, generator=generator) * 2.0 - 1)
        for name, parameter in model.decoder.named_parameters():
            if name.endswith(".o.weight"):
                parameter.mul_(0.3)
            elif name.endswith(".wo.weight"):
                parameter.mul_(2)
    model.save_pretrained(folder)
    word_tokenizer(config.vocab_size).save_pretrained(folder)


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one word for each of so many ids."""
    words = [*SPECIAL_TOKENS, *(f"w{number}" for number in range(len(SPECIAL_TOKENS), vocabulary))]
    pad, end, unknown = SPECIAL_TOKENS
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=unknown))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token=end, unk_token=unknown)
