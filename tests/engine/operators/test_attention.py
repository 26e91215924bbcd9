"""Attention and rotary embeddings, against ONNX Runtime."""

from pathlib import Path

import pytest
import torch

from accel.errors import AccelError
from tests.engine.one_node import HALF, Case, check, check_16_bits, ints, normal, parameters, run

MICROSOFT = "com.microsoft"
QUERY, KEY, VALUE = normal(2, 1, 24), normal(2, 3, 7, 8), normal(2, 3, 7, 8, scale=2)  # B, H, S, D = 2, 3, 7, 8
LOWEST = -3.4028234663852886e38
MASK = torch.zeros(2, 1, 1, 7)
MASK[0, ..., 5:] = MASK[1, ..., 1:3] = LOWEST
COS, SIN = normal(11, 4).cos(), normal(11, 4).sin()
ATTENTION = [
    Case("MultiHeadAttention", [QUERY, KEY, VALUE], {"num_heads": 3}, MICROSOFT),
    Case("MultiHeadAttention", [QUERY, KEY, VALUE], {"num_heads": 3, "scale": 1.0}, MICROSOFT),
    Case("MultiHeadAttention", [QUERY, KEY, VALUE, None, None, normal(1, 3, 1, 7)], {"num_heads": 3}, MICROSOFT),
    Case("MultiHeadAttention", [QUERY, KEY, VALUE, None, None, normal(2, 1, 1, 7)], {"num_heads": 3}, MICROSOFT),
    Case("MultiHeadAttention", [normal(2, 4, 24), normal(2, 5, 24), normal(2, 5, 24)], {"num_heads": 3}, MICROSOFT),
    Case(
        "MultiHeadAttention",
        [normal(2, 4, 24), normal(2, 5, 24), normal(2, 5, 24), None, None, normal(2, 3, 4, 5)],
        {"num_heads": 3, "scale": 0.5},
        MICROSOFT,
    ),
]
MASKED = Case("MultiHeadAttention", [QUERY, KEY, VALUE, None, None, MASK], {"num_heads": 3}, MICROSOFT)
ROTARY = [
    Case("RotaryEmbedding", [normal(2, 5, 24), ints([0, 1, 2, 3, 4], [3, 4, 5, 6, 7]), COS, SIN], {}, MICROSOFT),
    Case("RotaryEmbedding", [normal(2, 5, 24), ints(3), COS, SIN], {}, MICROSOFT),
    Case("RotaryEmbedding", [normal(2, 3, 5, 8), ints([0, 1, 2, 3, 4], [3, 4, 5, 6, 7]), COS, SIN], {}, MICROSOFT),
    Case("RotaryEmbedding", [normal(2, 1, 24), ints([4], [9]), COS, SIN], {"interleaved": 1}, MICROSOFT),
    Case(
        "RotaryEmbedding",
        [normal(2, 1, 30), ints([4], [9]), COS, SIN],
        {"num_heads": 3, "rotary_embedding_dim": 8},
        MICROSOFT,
    ),
    Case(
        "RotaryEmbedding",
        [normal(2, 3, 1, 10), ints([4], [9]), COS[:, :3], SIN[:, :3]],
        {"num_heads": 3, "rotary_embedding_dim": 6, "interleaved": 1},
        MICROSOFT,
    ),
]


@parameters([*ATTENTION, MASKED, *ROTARY])
def test_against_onnxruntime(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path / "node.onnx")


@HALF
@parameters([*ATTENTION, *ROTARY])
def test_in_16_bits(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    check_16_bits(case, tmp_path / "node.onnx", dtype)


@HALF
def test_a_mask_in_16_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    """Masked entries have no weight at all, with the lowest number of the dtype as mask."""
    mask = MASK.clamp(min=torch.finfo(dtype).min)
    case = Case("MultiHeadAttention", [QUERY, KEY, VALUE, None, None, mask], {"num_heads": 3}, MICROSOFT).to(dtype)
    path = tmp_path / "node.onnx"
    found = run(case, path)
    others = [KEY.clone(), VALUE.clone()]
    for entries in others:
        entries[MASK.expand(2, 3, 1, 7)[:, :, 0] < 0] = 100.0
    changed = Case("MultiHeadAttention", [QUERY, *others, None, None, mask], {"num_heads": 3}, MICROSOFT).to(dtype)
    assert torch.equal(run(changed, path), found)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            Case("MultiHeadAttention", [QUERY, KEY, VALUE, normal(72)], {"num_heads": 3}, MICROSOFT),
            r"node \(MultiHeadAttention\): bias='torch.float32 \[72\]' is not supported, only without it",
        ),
        (
            Case("MultiHeadAttention", [QUERY, KEY, VALUE], {"num_heads": 3, "unidirectional": 1}, MICROSOFT),
            r"node \(MultiHeadAttention\): the attribute 'unidirectional' is not supported. Supported: num_heads",
        ),
        (
            Case("MultiHeadAttention", [QUERY, *[KEY] * 2, None, None, None, KEY], {"num_heads": 3}, MICROSOFT),
            r"node \(MultiHeadAttention\): 7 inputs are not supported. Supported: query, key, value, bias",
        ),
    ],
    ids=["bias", "attribute", "inputs"],
)
def test_what_is_refused(case: Case, message: str, tmp_path: Path) -> None:
    with pytest.raises(AccelError, match=message):
        run(case, tmp_path / "node.onnx")
