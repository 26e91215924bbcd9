"""A graph of one attention with grouped queries, rotary embedding and a mask, whose text tests change."""

from pathlib import Path

import torch

from accel.engine.operations.attention import Attention, Rotary
from accel.engine.planning.planner import Plan
from tests.engine.one_node import normal
from tests.engine.planning.graphs import LENGTHS, compared, specs

WEIGHTS = {
    "wq": normal(32, 32, scale=0.3),
    "wk": normal(32, 16, scale=0.31),
    "wv": normal(32, 16, scale=0.32),
    "wo": normal(32, 32, scale=0.33),
    "wq5": normal(32, 40, scale=0.3),
    "five_heads": torch.tensor([-1, 1, 5, 8]),
    "five_flat": torch.tensor([-1, 1, 40]),
    "thirty_six": torch.tensor([36]),
    "ones_six": torch.tensor([1, 6, 1]),
    "six": torch.tensor([6]),
    "ones4": torch.tensor([1, 1, 1, 1]),
    "n8": normal(8) + 1.5,
    "n32": normal(32) + 1.5,
    "freq": torch.tensor([1.0, 0.5, 0.25, 0.125]),
    "scale": torch.tensor(0.35),
    "two": torch.tensor(2.0),
    "five": torch.tensor(5.0),
    "head_scales": torch.tensor([0.1, 0.2, 0.3, 0.4]).reshape(4, 1, 1),
    "four": torch.tensor([-1, 1, 4, 8]),
    "kv": torch.tensor([-1, 1, 2, 8]),
    "row": torch.tensor([-1, 1, 32]),
    "grouped": torch.tensor([0, 2, 2, 8]),
    "ungrouped": torch.tensor([-1, 4, 1, 8]),
    "repeated": torch.tensor([1, 1, 2, 1, 1]),
    "repeated_first": torch.tensor([1, 2, 1, 1, 1]),
    "merged": torch.tensor([0, 4, -1, 8]),
    "first_axis": torch.tensor([1]),
    "second_axis": torch.tensor([2]),
    "last": torch.tensor([1, 2]),
    "axes12": torch.tensor([1, 2]),
    "axes123": torch.tensor([1, 2, 3]),
    "zero": torch.tensor([0]),
    "middle": torch.tensor([4]),
    "end": torch.tensor([8]),
    "third": torch.tensor([3]),
    "low": torch.tensor(-1e4),
    "high": torch.tensor(0.0),
    "one_row": torch.tensor([-1, 1, 8]),
    "all_scores": torch.tensor([0, 1, 1, -1]),
    "five_axes": torch.tensor([0, 2, 2, 1, 8]),
    "by_head": torch.tensor([0, 4, 1, -1]),
    "distances": torch.arange(16.0).reshape(4, 1, 4)[:, :, :1] * -0.1,
}
BODY = """agraph (float[B,1,32] x, float[B,2,S,8] past_key, float[B,2,S,8] past_value, int64[B] position,
bool[B,S] mask) => (float[B,1,N] y, float[B,2,S,8] present_key, float[B,2,S,8] present_value) {
numbers = Cast<to = 1>(position) column = Unsqueeze(numbers, axes12) half_angles = Mul(column, freq)
angles = Concat<axis = -1>(half_angles, half_angles) cos2 = Cos(angles) sin2 = Sin(angles)
cos = Unsqueeze(cos2, first_axis) sin = Unsqueeze(sin2, first_axis)
q0 = MatMul(x, wq) q1 = Reshape(q0, four) q = Transpose<perm = [0, 2, 1, 3]>(q1)
k0 = MatMul(x, wk) k1 = Reshape(k0, kv) k = Transpose<perm = [0, 2, 1, 3]>(k1)
v0 = MatMul(x, wv) v1 = Reshape(v0, kv) v = Transpose<perm = [0, 2, 1, 3]>(v1)
q_low = Slice(q, zero, middle, third) q_high = Slice(q, middle, end, third) q_neg = Neg(q_high)
q_half = Concat<axis = -1>(q_neg, q_low) q_cos = Mul(q, cos) q_sin = Mul(q_half, sin) q_turned = Add(q_cos, q_sin)
k_low = Slice(k, zero, middle, third) k_high = Slice(k, middle, end, third) k_neg = Neg(k_high)
k_half = Concat<axis = -1>(k_neg, k_low) k_cos = Mul(k, cos) k_sin = Mul(k_half, sin) k_turned = Add(k_cos, k_sin)
present_key = TensorScatter<axis = 2>(past_key, k_turned, position)
present_value = TensorScatter<axis = 2>(past_value, v, position)
keys5 = Unsqueeze(present_key, second_axis) keys6 = Expand(keys5, repeated) keys = Reshape(keys6, merged)
values5 = Unsqueeze(present_value, second_axis) values6 = Expand(values5, repeated) values = Reshape(values6, merged)
turned_keys = Transpose<perm = [0, 1, 3, 2]>(keys)
bias2 = Where(mask, high, low) bias = Unsqueeze(bias2, axes12)
products = MatMul(q_turned, turned_keys) scaled = Mul(products, scale) masked = Add(scaled, bias)
probabilities = Softmax<axis = -1>(masked) attended = MatMul(probabilities, values)
heads = Transpose<perm = [0, 2, 1, 3]>(attended) row_of_heads = Reshape(heads, row) y = MatMul(row_of_heads, wo)
}"""
ROTARY = Rotary(8, False, "full")


def run(folder: Path, *changes: tuple[str, str]) -> Plan:
    """Plan and compare the graph with parts of its text replaced."""
    body = BODY
    for old, new in changes:
        assert old in body, old
        body = body.replace(old, new)
    rows, length = LENGTHS["B"], LENGTHS["S"]
    position = torch.tensor([0, 3, 5, length - 1])
    mask = torch.arange(length) <= position[:, None]
    mask[1, 0] = False  # padding
    assert len(position) == rows
    return compared(body, WEIGHTS, folder, {"position": position, "mask": mask})


def attention_of(result: Plan) -> Attention:
    """Return the specification of a plan's only attention."""
    (spec,) = [spec for spec in specs(result) if isinstance(spec, Attention)]
    return spec
