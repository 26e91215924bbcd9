"""Attention, and the rotation of its queries and keys."""

import torch
from torch import Tensor
from torch.nn import functional

from accel.engine.registry import MICROSOFT, operator, unsupported


@operator("MultiHeadAttention", MICROSOFT)
def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    attention_bias: Tensor | None = None,
    *,
    num_heads: int,
    scale: float = 0.0,
) -> Tensor:
    """Return softmax(scale * query @ key.T + attention_bias) @ value of each head.

    Args:
        query: [B, N, H * D].
        key: [B, H, S, D], or [B, S, H * D].
        value: The same.
        bias: Not supported.
        key_padding_mask: Not supported.
        attention_bias: [B or 1, H or 1, N, S].
        num_heads: H.
        scale: Factor of the scores; 0 for 1 / sqrt(D).

    Returns:
        [B, N, H * D].
    """
    for name, given in (("bias", bias), ("key_padding_mask", key_padding_mask)):
        if given is not None:
            raise unsupported(name, f"{given.dtype} {list(given.shape)}", "without it")
    attended = functional.scaled_dot_product_attention(
        _heads(query, num_heads),
        _heads(key, num_heads),
        _heads(value, num_heads),
        attn_mask=attention_bias,
        scale=scale or None,
    )
    return attended.transpose(1, 2).flatten(2)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """Return [B, S, H * D] as [B, H, S, D], and what has four axes as it is."""
    return x if x.ndim == 4 else x.unflatten(2, (num_heads, -1)).transpose(1, 2)


@operator("RotaryEmbedding", MICROSOFT)
def rotary_embedding(
    x: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """Return x with pairs of features rotated by the angles of their positions.

    The source of the method: https://arxiv.org/abs/2104.09864

    Args:
        x: [B, N, H * D], or [B, H, N, D].
        positions: Position of every token, int64 [B, N]; or [1], of the first token of every sequence.
        cos: Cosines of the angles, [maximum, R / 2].
        sin: Sines.
        interleaved: Pairs are neighbours, instead of feature i and i + R / 2.
        num_heads: H, for an x of three axes; needed where `rotary_embedding_dim` is given.
        rotary_embedding_dim: R, if only the first R of D features are rotated; 0 for all.
    """
    rotated = rotary_embedding_dim or 2 * cos.shape[-1]
    heads = x if x.ndim == 4 else _split_heads(x, num_heads, rotated)
    if positions.ndim == 1:
        positions = positions + torch.arange(heads.shape[2], device=x.device)[None]  # [1, N]
    cosines, sines = (torch.ops.aten.index(table, [positions])[:, None] for table in (cos, sin))  # [B, 1, N, R / 2]
    part, rest = heads[..., :rotated], heads[..., rotated:]
    if interleaved:
        first, second = part[..., 0::2], part[..., 1::2]
    else:
        first, second = part.chunk(2, -1)
    turned = (first * cosines - second * sines, second * cosines + first * sines)
    result = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    if rest.shape[-1]:
        result = torch.cat([result, rest], -1)
    return result if x.ndim == 4 else result.transpose(1, 2).flatten(2)


def _split_heads(x: Tensor, num_heads: int, size: int) -> Tensor:
    """Return [B, N, H * D] as [B, H, N, D], D being `size` where the number of heads isn't given."""
    split: Tensor = x.unflatten(2, (num_heads, -1) if num_heads else (-1, size))
    return split.transpose(1, 2)
