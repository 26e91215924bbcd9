"""Attention of one token against its reference in numpy."""

from dataclasses import replace
from math import prod

import numpy as np
import pytest
import torch
from torch import Tensor

from accel.engine.operations.attention import ANGLES, Attention, Bias, Heads, Rotary, attention, reference
from accel.engine.operations.normalize import Norm
from tests.engine.operations.numbers import Numbers, arrays, check

LENGTH = 23


def spec_of(heads: int, kv_heads: int, size: int, **changes: object) -> Attention:
    """Return self-attention whose query lies alone in a row, and whose key and value share one, the value first."""
    query = Heads(0, 1, heads, heads * size, size, size)
    value = Heads(0, 1, kv_heads, kv_heads * size, size, size)
    key = replace(value, start=kv_heads * size)
    spec = Attention(query, key, value, kv_heads, None, size**-0.5, 0.0, (), torch.float32)
    return replace(spec, **changes)  # type: ignore[arg-type]


def tensors_of(spec: Attention, numbers: Numbers, rows: int) -> list[Tensor]:
    """Return random tensors for attention, in its order. Positions differ from row to row."""
    size = spec.query.size
    tensors = [numbers(rows, 1, int(spec.query.features().max()) + 3)]
    if spec.key is not None:
        row = numbers(rows, 1, int(spec.key.features().max()) + 1)
        positions = torch.arange(rows) * 7 % LENGTH
        tensors += [row, row, positions]
    tensors += [numbers(rows, spec.kv_heads, LENGTH, size) for _ in range(2)]
    tensors += [numbers(size) + 1 for heads in (spec.query, spec.key) if heads and heads.norm]
    if spec.rotary is not None:
        count = spec.rotary.size if spec.rotary.angles == "full" else spec.rotary.size // 2
        tensors += [numbers(rows, 1, count), numbers(1, 1, count)]
    for bias in spec.biases:
        tensors.append(numbers(rows if bias.batched else 1, spec.query.count if bias.per_head else 1, 1, LENGTH))
    return tensors


def compare(spec: Attention, rows: int, dtype: torch.dtype = torch.float32) -> None:
    """Compare attention with its reference, in its output and in the caches."""
    spec = replace(spec, dtype=dtype)
    tensors = tensors_of(spec, Numbers(dtype), rows)
    expected = reference(*arrays(tensors), spec=spec)
    found = attention(*tensors, spec=spec)
    heads, *caches = found if isinstance(found, tuple) else (found,)
    assert heads.shape == (rows, 1, spec.query.count * spec.query.size)
    assert heads.dtype is dtype
    check(heads, expected[0], dtype)
    first = 4 if spec.key is not None else 1
    assert [cache is given for cache, given in zip(caches, tensors[first:], strict=False)] == [True] * len(caches)
    assert len(caches) == (0 if spec.key is None else 2)
    for cache, array in zip(caches, expected[1:], strict=False):
        assert array is not None
        check(cache, array, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(3, 3, 16), (6, 2, 64), (4, 1, 80), (2, 2, 96), (8, 4, 128), (2, 1, 256)]
)
def test_heads(heads: int, kv_heads: int, size: int, rows: int, dtype: torch.dtype) -> None:
    compare(spec_of(heads, kv_heads, size), rows, dtype)


@pytest.mark.parametrize("heads", [1, 4])
def test_a_fixed_cache(heads: int) -> None:
    """Nothing is written, as in cross-attention."""
    compare(spec_of(heads, heads, 16, key=None, value=None), 3)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("size", [16, 6])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("angles", ANGLES)
def test_rotations(angles: str, interleaved: bool, size: int, fixed: bool) -> None:
    """Of all of a head's features or the first ones. Cosines differ from row to row here, sines do not."""
    spec = spec_of(4, 2, 16, rotary=Rotary(size, interleaved, angles))
    compare(replace(spec, key=None, value=None) if fixed else spec, 3)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_biases(batched: bool, per_head: bool) -> None:
    """Two are added, with and without a factor, after the soft cap."""
    biases = (Bias(batched, per_head), Bias(True, False, 0.3))
    compare(spec_of(4, 2, 16, biases=biases, softcap=0.5), 3)


def test_a_soft_cap() -> None:
    compare(spec_of(4, 2, 16, softcap=0.2), 2)


@pytest.mark.parametrize("softcap", [0.0, 0.3])
def test_caches_that_are_filled_in_turn(softcap: float) -> None:
    """Behind their end, positions take the place of the oldest ones, and all entries are seen; before it, only some."""
    spec = spec_of(4, 2, 16, biases=(Bias(True, False),), softcap=softcap)
    tensors = tensors_of(spec, Numbers(), 4)
    tensors[3] = torch.tensor([LENGTH - 1, LENGTH, 3 * LENGTH + 5, 4])
    expected = reference(*arrays(tensors), spec=spec)
    assert expected[1] is not None
    caches = tensors[4].clone()
    found = attention(*tensors, spec=spec)
    check(found[0], expected[0], torch.float32)
    for row, (entry, seen) in enumerate(((LENGTH - 1, LENGTH), (0, LENGTH), (5, LENGTH), (4, 5))):
        changed = (tensors[4][row] != caches[row]).any(-1).any(0)
        assert changed.nonzero().flatten().tolist() == [entry]
        check(tensors[4][row], expected[1][row], torch.float32)
        changed_values = [each.clone() for each in tensors]
        changed_values[5][row, :, seen:] = 9.0
        assert torch.equal(attention(*changed_values, spec=spec)[0], found[0])
        changed_values[5][row, :, seen - 2] += 1.0
        assert not torch.allclose(attention(*changed_values, spec=spec)[0][row], found[0][row])


def test_masks_of_infinity() -> None:
    """Entries beyond the position, which are masked, don't count."""
    spec = spec_of(2, 1, 16, biases=(Bias(True, False),))
    tensors = tensors_of(spec, Numbers(), 3)
    position = tensors[3]
    tensors[-1] = torch.where(torch.arange(LENGTH) <= position[:, None], 0.0, -torch.inf)[:, None, None]
    before = [each.clone() for each in tensors]
    (first, *_) = attention(*tensors, spec=spec)
    for cache in before[4:6]:
        cache[torch.arange(LENGTH).expand(3, 1, LENGTH) > position[:, None, None]] = 1e4
    (second, *_) = attention(*before, spec=spec)
    assert torch.equal(first, second)


@pytest.mark.parametrize("rotary", [None, Rotary(8, False, "halves")])
def test_norms_and_factors(rotary: Rotary | None) -> None:
    """The norm comes first, then the factor and the rotation."""
    spec = spec_of(4, 2, 16, rotary=rotary)
    assert spec.key is not None
    norm = Norm("rms", 0.3)
    compare(replace(spec, query=replace(spec.query, scale=0.5, norm=norm), key=replace(spec.key, norm=norm)), 3)


def test_grouped_features() -> None:
    """Queries, keys and values of a group side by side, as Falcon has them: q q q k v, q q q k v."""
    size, groups = 16, 2
    query = Heads(0, groups, 3, 5 * size, size, size)
    key, value = Heads(3 * size, groups, 1, 5 * size, size, size), Heads(4 * size, groups, 1, 5 * size, size, size)
    spec = Attention(query, key, value, groups, None, 0.25, 0.0, (), torch.float32)
    numbers = Numbers()
    row = numbers(3, 1, 10 * size)
    tensors = [row, row, row, torch.tensor([0, 5, LENGTH - 1])]
    tensors += [numbers(3, groups, LENGTH, size) for _ in range(2)]
    expected = reference(*arrays(tensors), spec=spec)
    for found, array in zip(attention(*tensors, spec=spec), expected, strict=True):
        assert array is not None
        check(found, array, torch.float32)


def test_the_reference_is_softmax() -> None:
    """It agrees with torch's own attention where that computes the same."""
    numbers = Numbers()
    spec = spec_of(4, 2, 16, key=None, value=None)
    query, keys, values = numbers(2, 1, 64), numbers(2, 2, LENGTH, 16), numbers(2, 2, LENGTH, 16)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(2, 4, 1, 16), keys.repeat_interleave(2, 1), values.repeat_interleave(2, 1)
    )
    found, *_ = reference(*arrays([query, keys, values]), spec=spec)
    assert prod(found.shape) == expected.numel()
    np.testing.assert_allclose(found, expected.reshape(2, 64).numpy(), rtol=1e-4, atol=1e-5)
