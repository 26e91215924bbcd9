"""Checks of what callers pass to `forward` and `generate`: it is honoured, or refused in a message that names it."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

# Arguments of transformers' models that an exported graph has no input or output for, and why.
UNAVAILABLE = {
    "output_attentions": "an exported graph returns logits and caches, no attentions",
    "output_hidden_states": "an exported graph returns logits and caches, no hidden states",
    "inputs_embeds": "an exported graph takes ids, no embeddings",
    "decoder_inputs_embeds": "an exported graph takes ids, no embeddings",
    "token_type_ids": "an exported graph has no token types",
    "head_mask": "heads can't be masked in an exported graph",
    "decoder_head_mask": "heads can't be masked in an exported graph",
    "cross_attn_head_mask": "heads can't be masked in an exported graph",
}


def reject(arguments: Mapping[str, Any], forward: Callable[..., Any]) -> None:
    """Refuse arguments that can't be honoured. None and False ask for nothing and pass.

    Args:
        arguments: The arguments that `forward` doesn't handle.
        forward: The method; its signature is read for the message only, as this runs at every token.

    Raises:
        ValueError: One asks for something that the graphs don't have.
        TypeError: One is unknown.
    """
    reject_unavailable(arguments)
    for name, value in arguments.items():
        if value is not None and value is not False:
            known = [parameter for parameter in inspect.signature(forward).parameters if parameter != "kwargs"]
            raise TypeError(f"forward() has no argument {name!r}. Arguments: {', '.join(known)}")


def reject_unavailable(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of transformers' models that an exported graph has no input or output for, with the reason.

    Raises:
        ValueError: One of them is neither None nor False.
    """
    for name, value in arguments.items():
        if name in UNAVAILABLE and value is not None and value is not False:
            raise ValueError(f"{name} is not supported: {UNAVAILABLE[name]}")


def check_ids(name: str, ids: Tensor, vocabulary: int) -> None:
    """Check ids before the graphs look them up, which would take any address for a row of the embedding.

    Args:
        name: The argument's name, for the message.
        ids: Expected to be integers [batch, length] from 0 to `vocabulary - 1`.
        vocabulary: Number of rows of the embedding.

    Raises:
        ValueError: Another type, number of axes or range.
    """
    if ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool:
        raise ValueError(f"{name} has dtype {ids.dtype}, expected integers")
    if ids.ndim != 2:
        raise ValueError(f"{name} has shape {list(ids.shape)}, expected [batch, length]")
    if ids.numel() == 0:
        return
    low, high = torch.stack(torch.aminmax(ids)).tolist()  # one wait for a device, not two
    if low < 0 or high >= vocabulary:
        raise ValueError(f"{name} contains {low if low < 0 else high}, expected ids from 0 to {vocabulary - 1}")


def check_mask(name: str, mask: Tensor, batch: int, length: int) -> None:
    """Check a mask of tokens: [batch, length], not 0 where a token is seen.

    Raises:
        ValueError: Another shape, such as the four axes of a mask for scores.
    """
    if mask.ndim != 2:
        raise ValueError(
            f"{name} has shape {list(mask.shape)}, expected [batch, length]: the graph derives its own mask"
        )
    if tuple(mask.shape) != (batch, length):
        raise ValueError(f"{name} has shape {list(mask.shape)}, expected [{batch}, {length}]")


def vocabulary_sizes(config: PretrainedConfig) -> tuple[int, int]:
    """Return the number of rows of the encoder's and of the decoder's embedding."""
    source = int(config.get_text_config().vocab_size)
    target = getattr(config, "decoder_vocab_size", None) or config.get_text_config(decoder=True).vocab_size
    return source, int(target)
