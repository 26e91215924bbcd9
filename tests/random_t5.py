"""Tiny random T5 in which mistakes show."""

import torch
from transformers import T5Config, T5ForConditionalGeneration

TINY = {
    "vocab_size": 120,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 3,  # transformers sizes T5's cache by the encoder's layers, so there must not be fewer
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}


def random_t5(seed: int = 0, **changes: object) -> T5ForConditionalGeneration:
    """Return a tiny T5 whose parameters all differ, norms included, so that exchanging two changes the output."""
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(T5Config(**(TINY | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model
