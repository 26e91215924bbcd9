"""Products with weights of 8 or 4 bits, and lookups in them. Weights are dequantized, and products computed in FP32."""

from torch import Tensor
from torch.nn import functional

from accel.engine.low_bits import LowBits, integers, middle
from accel.engine.operators.indexing import gather
from accel.engine.registry import MICROSOFT, operator, unsupported


@operator("MatMulNBits", MICROSOFT)
def matmul_n_bits(
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    g_idx: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    K: int,  # noqa: N803  (ONNX's names)
    N: int,  # noqa: N803
    bits: int = 4,
    block_size: int,
    accuracy_level: int = 0,  # of ONNX Runtime's kernels alone
) -> Tensor:
    """Return a @ weight.T + bias, in the dtype of a.

    Args:
        a: [..., K].
        b: Integers of the weight; see `LowBits`.
        scales: [N, blocks], or as many in another shape.
        zero_points: Packed along a row.
        g_idx: Not supported.
        bias: [N].
        K: Features of a.
        N: Features of the result.
        bits: Bits of an integer.
        block_size: Features that share a scale.
        accuracy_level: Not used: products are summed in FP32.

    Raises:
        AccelError: Blocks are not of consecutive features, or zero points are no integers.
    """
    if g_idx is not None:
        raise unsupported("g_idx", list(g_idx.shape), "blocks of consecutive features")
    if zero_points is not None and zero_points.is_floating_point():
        raise unsupported("dtype of zero_points", zero_points.dtype, "uint8")
    weight = LowBits(bits, block_size, K, zero_points is not None).dequantize(b, scales, zero_points)
    product = functional.linear(a.float(), weight, None if bias is None else bias.float())
    return product.to(a.dtype)


@operator("GatherBlockQuantized", MICROSOFT)
def gather_block_quantized(
    data: Tensor,
    indices: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    *,
    bits: int = 4,
    block_size: int = 128,
    gather_axis: int = 0,
    quantize_axis: int = 1,
) -> Tensor:
    """Return the entries of a quantized table at `indices` along its first axis, dequantized to the dtype of scales.

    Args:
        data: Integers, uint8 [rows, ..., n], packed along the last axis in 4 bits.
        indices: Any shape, whose axes take the place of the first.
        scales: [rows, ..., ceil(n / block_size)].
        zero_points: As scales, packed as data; None: the middle of the integers' range.
        bits: Bits of an integer.
        block_size: Features along the last axis that share a scale.
        gather_axis: 0.
        quantize_axis: The last axis.

    Raises:
        AccelError: It is along other axes, or data are not bytes.
    """
    if gather_axis or quantize_axis % data.ndim != data.ndim - 1 or data.element_size() != 1:
        given = (gather_axis, quantize_axis, data.dtype)
        raise unsupported("(gather_axis, quantize_axis, dtype)", given, "the first axis, the last axis and uint8")
    values, factors = integers(gather(data, indices), bits), gather(scales, indices)
    zeros: Tensor | int = middle(bits)
    if zero_points is not None:
        zeros = _spread(integers(gather(zero_points, indices), bits), block_size, values)
    return (values.to(factors.dtype) - zeros) * _spread(factors, block_size, values)


def _spread(numbers: Tensor, block: int, values: Tensor) -> Tensor:
    """Return one number a block as one for each value, unless there is one block, which broadcasts."""
    if values.shape[-1] <= block:
        return numbers[..., :1]
    return numbers.repeat_interleave(block, -1)[..., : values.shape[-1]]
