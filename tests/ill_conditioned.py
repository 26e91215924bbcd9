"""A decoder-only model with an ill-conditioned point, as trained ones have some: one token's residual nearly cancels.

The first layer's feed-forward part takes all but a ten-thousandth of that token's embedding away. Much of what is left
is rounding, and the norm after it makes it as large as any other token's activations.
"""

import torch
from transformers import LlamaForCausalLM

from accel.testing.subject import random_model
from tests.families import LLAMA

TOKEN = 71  # one that the random inputs of `verify` hold
LEFT = 1e-4  # the share of the embedding that stays
SIZE = 1e5  # of its elements: more than FP16 holds


def ill_conditioned_llama() -> LlamaForCausalLM:
    """A tiny random Llama in which everything after `TOKEN` is known to three digits, not to six."""
    config = LLAMA | {"model_type": "llama", "num_hidden_layers": 3, "tie_word_embeddings": False}
    model = random_model(config)
    assert isinstance(model, LlamaForCausalLM)
    first = model.model.layers[0]
    with torch.no_grad():
        first.self_attn.o_proj.weight.zero_()  # so that the residual depends on the token alone
        embedding = model.model.embed_tokens.weight
        embedding[TOKEN] *= SIZE / embedding[TOKEN].abs().mean()
        hidden = first.post_attention_layernorm(embedding[TOKEN][None])  # [1, width]
        inner = first.mlp.act_fn(first.mlp.gate_proj(hidden)) * first.mlp.up_proj(hidden)  # [1, intermediate]
        down = first.mlp.down_proj
        missing = -(1 - LEFT) * embedding[TOKEN] - down(inner)[0]
        down.weight += torch.outer(missing, inner[0]) / inner.square().sum()
    return model
