"""Products and lookups of weights of 8 and 4 bits, against ONNX Runtime."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from accel.engine.low_bits import LowBits
from accel.errors import AccelError
from tests.engine.one_node import HALF, Case, check, check_16_bits, ints, normal, parameters, run
from tests.engine.operators.test_products import MICROSOFT

N, K = 6, 72


def weight(bits: int, block: int, with_zeros: bool = False, n: int = N, k: int = K) -> list[Tensor | None]:
    """Return integers, scales and zero points of a weight, as `MatMulNBits` reads them."""
    generator = torch.Generator().manual_seed(bits * block)
    blocks = -(-k // block)
    data = torch.randint(0, 256, (n, blocks, block * bits // 8), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 256, (n, -(-blocks * bits // 8)), generator=generator, dtype=torch.uint8)
    return [data, normal(n, blocks).abs() / 2 ** (bits - 1), zeros if with_zeros else None]


def product(bits: int, block: int, with_zeros: bool = False, bias: bool = False, rows: Tensor | None = None) -> Case:
    tensors = weight(bits, block, with_zeros)
    while tensors[-1] is None and not bias:
        tensors.pop()
    tensors += [None, normal(N)] if bias else []
    inputs = [normal(2, 3, K) if rows is None else rows, *tensors]
    return Case("MatMulNBits", inputs, {"K": K, "N": N, "bits": bits, "block_size": block}, MICROSOFT)


def lookup(bits: int, block: int, with_zeros: bool, ids: Tensor, blocks: int = 1) -> Case:
    """Return a lookup in a table whose rows are blocks, as `convert` writes it, or in one of rows of several."""
    data, scales, zeros = weight(bits, block, with_zeros, 9, K)
    assert data is not None
    assert scales is not None
    if blocks > 1:
        data = data[:, :blocks].flatten(1)
        scales = scales[:, :blocks]
        zeros = None if zeros is None else zeros[:, : -(-blocks * bits // 8)]
    else:
        scales = scales[..., None]
        zeros = None if zeros is None else torch.full(scales.shape, 5, dtype=torch.uint8)
    inputs = [data, ids, scales, *([zeros] if zeros is not None else [])]
    attributes = {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 2 if blocks == 1 else 1}
    return Case("GatherBlockQuantized", inputs, attributes, MICROSOFT)


CASES = [
    *(product(bits, block, zeros) for bits in (8, 4) for block in (16, 64) for zeros in (False, True)),
    product(8, 32, bias=True),
    product(4, 32, True, bias=True),
    *(lookup(bits, 16, zeros, ints([3, 0], [8, 5])) for bits in (8, 4) for zeros in (False, True)),
    *(lookup(bits, 16, zeros, ints(7), 4) for bits in (8, 4) for zeros in (False, True)),
]


@parameters(CASES)
def test_against_onnxruntime(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path / "node.onnx", rtol=1e-4, atol=1e-4)


@HALF
@parameters(CASES[:4])
def test_products_in_16_bits(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    check_16_bits(case, tmp_path / "node.onnx", dtype)


def test_padding_of_the_last_block_is_not_read() -> None:
    low, (data, scales, _) = LowBits(8, 64, K), weight(8, 64)
    assert data is not None
    assert scales is not None
    expected = low.dequantize(data, scales)
    data[:, 1, K - 64 :] = 77
    assert torch.equal(low.dequantize(data, scales), expected)
    assert expected.shape == (N, K)


def test_what_is_not_supported_is_named(tmp_path: Path) -> None:
    case = product(8, 64)
    order = Case(case.operator, [*case.inputs, None, torch.zeros(K, dtype=torch.int32)], case.attributes, MICROSOFT)
    with pytest.raises(AccelError, match=r"g_idx=\[72\] is not supported"):
        run(order, tmp_path / "order.onnx")
    with pytest.raises(AccelError, match="bits=2 is not supported, only 8 and 4"):
        run(Case(case.operator, case.inputs, {**case.attributes, "bits": 2}, MICROSOFT), tmp_path / "bits.onnx")
    along = lookup(8, 16, False, ints(1))
    with pytest.raises(AccelError, match="gather_axis"):
        run(Case(along.operator, along.inputs, {**along.attributes, "gather_axis": 1}, MICROSOFT), tmp_path / "a.onnx")
