"""The fused operations as torch's large products, its attention and the kernels in `kernels.py` compute them.

Inputs and outputs have the formats of `accel.engine.operations`, but rows are the tokens of all prompts. Values between
two launches are rounded to the format of the weights, where the decode kernel keeps FP32; products add up in FP32.
"""

import torch
from torch import Tensor
from torch.nn import functional

from accel.engine.operations.attention import Attention
from accel.engine.operations.normalize import Norm, Normalize
from accel.engine.operations.product import Part, Product, Weight
from accel.engine.prefill.kernels import gated, heads_of


def prefill_normalize(x: Tensor, *tensors: Tensor, spec: Normalize) -> Tensor:
    """Return the norm of rows plus residuals; arguments and result as of `normalize`."""
    rest = list(tensors)
    weight = rest.pop(0) if spec.has_weight else None
    result = _normed(x.reshape(len(x), 1, -1), spec.norm, weight, rest.pop(0) if spec.has_bias else None)
    for residual in rest:
        result = result + residual.reshape(result.shape)
    return result.to(spec.dtype)


def prefill_product(x: Tensor, *tensors: Tensor, spec: Product) -> tuple[Tensor, ...]:
    """Return the output of every part; arguments and result as of `product`, without weights of few bits."""
    rest = list(tensors)
    rows = x.reshape(len(x), -1)  # [R, K]
    if spec.norm is not None:
        weight = rest.pop(0) if spec.norm_weight else None
        rows = _normed(rows, spec.norm, weight, rest.pop(0) if spec.norm_bias else None)
    weights = [(part, list(part.take(rest))) for part in spec.parts]
    added = _added(weights, rest, rows.dtype)
    if added is not None:
        ((_, (weight_of_part,)),) = weights
        outputs = [torch.addmm(added, rows, _matrix(weight_of_part, spec.parts[0]), alpha=spec.parts[0].alpha)]
    else:
        outputs = [_part(rows, part, *matrices) for part, matrices in weights]
        for residual in rest:
            outputs[0] = outputs[0] + residual.reshape(outputs[0].shape)
    return tuple(output.to(spec.dtype)[:, None] for output in outputs)


def _added(
    weights: list[tuple[Part, list[Weight[Tensor]]]], residuals: list[Tensor], dtype: torch.dtype
) -> Tensor | None:
    """Return a residual [R, N] that the product itself can add, in the same launch; None if it can't."""
    if len(residuals) != 1:
        return None
    part, (weight, *gates) = weights[0]
    plain = not gates and weight.bias is None and part.beta == 1 and part.activation.name == "none"
    fits = plain and residuals[0].dtype == weight.matrix.dtype == dtype
    return residuals[0].reshape(len(residuals[0]), -1) if fits else None


def _normed(x: Tensor, norm: Norm, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return the norm of the last axis, rounded to x's dtype once where the weights are of it too; else in FP32."""
    if any(each is not None and each.dtype != x.dtype for each in (weight, bias)):
        return norm(x, weight, bias)
    if norm.kind == "rms":
        return functional.rms_norm(x, x.shape[-1:], weight, norm.epsilon)
    return functional.layer_norm(x, x.shape[-1:], weight, bias, norm.epsilon)


def _part(rows: Tensor, part: Part, weight: Weight[Tensor], gate: Weight[Tensor] | None = None) -> Tensor:
    """Return activation(alpha * rows @ weight + bias) [* (rows @ gate + its bias)] * beta, [R, N]."""
    y = _linear(rows, weight, part, part.alpha)
    if gate is not None:
        return gated(y, _linear(rows, gate, part, 1.0), part.activation, part.beta)
    y = part.activation(y)
    return y * part.beta if part.beta != 1 else y


def _linear(rows: Tensor, weight: Weight[Tensor], part: Part, alpha: float) -> Tensor:
    """Return alpha * rows @ weight + bias, [R, N].

    A factor below 1 comes before the product, which 16-bit formats may have to hold, and one above after it.
    """
    matrix = _matrix(weight, part)
    rows = (rows * alpha if abs(alpha) < 1 else rows).to(matrix.dtype)
    alpha = alpha if abs(alpha) > 1 else 1
    if weight.bias is not None and weight.bias.dtype == matrix.dtype:
        return torch.addmm(weight.bias, rows, matrix, alpha=alpha)
    y = rows @ matrix
    y = y * alpha if alpha != 1 else y
    return y if weight.bias is None else y + weight.bias


def _matrix(weight: Weight[Tensor], part: Part) -> Tensor:
    """Return a weight as [K, N]."""
    return weight.matrix.mT if part.transposed else weight.matrix


def prefill_attention(
    query: Tensor, key: Tensor, value: Tensor, prompts: Tensor, seen: Tensor | None, *tensors: Tensor, spec: Attention
) -> tuple[Tensor, Tensor, Tensor]:
    """Return attention of every token to those before it in its prompt and to itself, and the caches of all prompts.

    Args:
        query: Rows that hold the queries, [R, ..., features], of all tokens of B prompts of N tokens, one after
            the other.
        key: Rows that hold the keys.
        value: Rows that hold the values.
        prompts: Any tensor [B, N].
        seen: bool [B, 1, N, N], the keys that each query sees; None for all up to its own.
        tensors: Weights of the norms of queries, keys and values, where they have them; cosines and sines.
        spec: What is computed. It has a key, no biases and no soft cap.

    Returns:
        [R, 1, H * D], keys and values [B, KV, N, D].
    """
    batch, length = prompts.shape
    q, keys, values = heads_of((query, key, value), (batch, length), list(tensors), spec)
    grouped = seen is None and spec.query.count != spec.kv_heads
    all_keys, all_values = keys, values
    if not grouped and spec.query.count != spec.kv_heads:  # no fast kernel of torch takes both a mask and groups
        all_keys, all_values = (each.repeat_interleave(spec.query.count // spec.kv_heads, 1) for each in (keys, values))
    attended = functional.scaled_dot_product_attention(
        q, all_keys, all_values, attn_mask=seen, is_causal=seen is None, scale=spec.scale, enable_gqa=grouped
    )
    return attended.transpose(1, 2).reshape(len(query), 1, -1).to(spec.dtype), keys, values
