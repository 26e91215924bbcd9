"""Decoder-only model with an ill-conditioned token, as trained models have some: its residual nearly cancels.

The first layer's feed-forward part removes all but a ten-thousandth of that token's embedding. Much of the remainder is
rounding error, and the next norm scales it to the size of other tokens' activations.
"""

import torch
from transformers import LlamaForCausalLM

from accel.testing.subject import random_model
from tests.families import LLAMA

TOKEN = 71  # an id that occurs in the random inputs of `verify`
REMAINDER = 1e-4  # share of the embedding that remains
MAGNITUDE = 1e5  # mean magnitude of its elements: more than FP16 holds


def ill_conditioned_llama() -> LlamaForCausalLM:
    """Return a tiny random Llama whose FP32 values after `TOKEN` have three correct digits instead of six."""
    config = LLAMA | {"model_type": "llama", "num_hidden_layers": 3, "tie_word_embeddings": False}
    model = random_model(config)
    assert isinstance(model, LlamaForCausalLM)
    first = model.model.layers[0]
    with torch.no_grad():
        first.self_attn.o_proj.weight.zero_()  # so that the residual depends on the token alone
        embedding = model.model.embed_tokens.weight
        embedding[TOKEN] *= MAGNITUDE / embedding[TOKEN].abs().mean()
        hidden = first.post_attention_layernorm(embedding[TOKEN][None])  # [1, width]
        inner = first.mlp.act_fn(first.mlp.gate_proj(hidden)) * first.mlp.up_proj(hidden)  # [1, intermediate]
        down = first.mlp.down_proj
        correction = -(1 - REMAINDER) * embedding[TOKEN] - down(inner)[0]
        down.weight += torch.outer(correction, inner[0]) / inner.square().sum()
    return model
