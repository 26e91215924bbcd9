"""Attention: what is fused with it, and what must not be."""

from pathlib import Path
from typing import Any

import pytest
import torch

from accel.engine.operations.attention import Attention, Bias, Heads
from accel.engine.planning.activations import ELEMENTWISE
from accel.engine.planning.attention import FUSED, SOFTMAX, WRITE
from accel.engine.planning.linear_maps import LINEAR
from accel.engine.planning.patterns import NORMS
from accel.engine.planning.planner import SKIP_NORMS
from accel.engine.planning.trace import PRODUCTS
from accel.engine.registry import OPERATORS
from tests.engine.planning.attention import BODY, ROTARY, WEIGHTS, attention_of, run
from tests.engine.planning.graphs import LENGTHS, compared, operations, others, specs


def test_only_operators_of_the_engine_are_matched() -> None:
    kinds = LINEAR | ELEMENTWISE | PRODUCTS | set(NORMS) | set(SKIP_NORMS) | {SOFTMAX, FUSED, WRITE}
    assert kinds <= set(OPERATORS)


def test_the_whole_is_fused(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert operations(result) == ["product", "attention", "product"]
    assert set(others(result)) == {"Cast", "Unsqueeze", "Mul", "Concat", "Cos", "Sin", "Where"}
    spec = attention_of(result)
    kv = Heads(0, 1, 2, 16, 8, 8)
    bias = Bias(True, False)
    assert spec == Attention(
        Heads(0, 1, 4, 32, 8, 8), kv, kv, 2, ROTARY, pytest.approx(0.35), 0.0, (bias,), torch.float32
    )


# Changes, and what the attention has then instead.
VARIANTS: dict[str, tuple[list[tuple[str, str]], dict[str, Any]]] = {
    "angles of half the features": (
        [
            (
                "angles = Concat<axis = -1>(half_angles, half_angles) cos2 = Cos(angles) sin2 = Sin(angles)",
                "c1 = Cos(half_angles) s1 = Sin(half_angles) cos2 = Concat<axis = -1>(c1, c1) sin2 = "
                "Concat<axis = -1>(s1, s1)",
            )
        ],
        {"rotary": ROTARY},
    ),
    "cosine and sine exchanged": (
        [("cos2 = Cos(angles) sin2 = Sin(angles)", "cos2 = Sin(angles) sin2 = Cos(angles)")],
        {"rotary": ROTARY},
    ),
    "a rotation the other way": (
        [
            ("q_neg = Neg(q_high)", "q_neg = Neg(q_low)"),
            ("(q_neg, q_low)", "(q_high, q_neg)"),
            ("k_neg = Neg(k_high)", "k_neg = Neg(k_low)"),
            ("(k_neg, k_low)", "(k_high, k_neg)"),
        ],
        {"rotary": None},
    ),
    "a cosine twice": (
        [
            ("q_cos = Mul(q, cos)", "q_once = Mul(q, cos) q_cos = Mul(q_once, cos)"),
            ("k_cos = Mul(k, cos)", "k_once = Mul(k, cos) k_cos = Mul(k_once, cos)"),
        ],
        {"rotary": None},
    ),
    "a product of cosine and sine": (
        [
            ("q_turned = Add(q_cos, q_sin)", "q_s = Add(q_cos, q_sin) q_b = Mul(q_cos, sin) q_turned = Add(q_s, q_b)"),
            ("k_turned = Add(k_cos, k_sin)", "k_s = Add(k_cos, k_sin) k_b = Mul(k_cos, sin) k_turned = Add(k_s, k_b)"),
        ],
        {"rotary": None},
    ),
    "heads that cross those of the norm before": (
        [
            (
                "q0 = MatMul(x, wq) q1 = Reshape(q0, four)",
                "q5 = MatMul(x, wq5) q6 = Reshape(q5, five_heads) q7 = SimplifiedLayerNormalization(q6, n8) "
                "q8 = Reshape(q7, five_flat) q9 = Slice(q8, middle, thirty_six, second_axis) q1 = Reshape(q9, four)",
            )
        ],
        {"norm": None, "query": Heads(4, 1, 4, 32, 8, 8), "rotary": ROTARY},
    ),
    "values that are sums of others": (
        [
            (
                "v = Transpose<perm = [0, 2, 1, 3]>(v1)",
                "v2 = Transpose<perm = [0, 2, 1, 3]>(v1) v_first, v_six, v_last = Split<axis = 3>(v2, ones_six) "
                "v_low = Slice(v2, zero, six, third) v_high = Slice(v2, second_axis, end, third) "
                "v_less = Sub(v_low, v_six) v_sum = Add(v_less, v_high) v = Concat<axis = 3>(v_first, v_sum, v_last)",
            )
        ],
        {"value": Heads(0, 1, 2, 16, 8, 8)},
    ),
    "a factor of the query": (
        [("q_turned = Add(q_cos, q_sin)", "q_sum = Add(q_cos, q_sin) q_turned = Mul(q_sum, two)")],
        {"query": Heads(0, 1, 4, 32, 8, 8, 2.0)},
    ),
    "heads in another order": (
        [
            (
                "q_turned = Add(q_cos, q_sin)",
                "q_t = Add(q_cos, q_sin) q_u = Reshape(q_t, grouped) q_turned = Transpose<perm = [0, 2, 1, 3]>(q_u)",
            ),
            (
                "turned_keys = Transpose<perm = [0, 1, 3, 2]>(keys)",
                "turned_keys = Transpose<perm = [0, 1, 3, 2]>(present_key)",
            ),
            (
                "attended = MatMul(probabilities, values)",
                "a4 = MatMul(probabilities, present_value) attended = Reshape(a4, ungrouped)",
            ),
        ],
        {"query": Heads(0, 2, 2, 8, 16, 8), "rotary": ROTARY},
    ),
    "factors of each head": (
        [("q1 = Reshape(q0, four)", "q00 = Mul(q0, n32) q1 = Reshape(q00, four)")],
        {"rotary": ROTARY},
    ),
    "a soft cap": (
        [
            (
                "scaled = Mul(products, scale)",
                "divided = Mul(products, scale) tanh = Tanh(divided) scaled = Mul(five, tanh)",
            )
        ],
        {"softcap": 5.0, "scale": pytest.approx(1.75)},
    ),
    "a soft cap and a factor after the mask": (
        [
            ("scaled = Mul(products, scale)", "tanh = Tanh(products) scaled = Mul(tanh, five)"),
            ("masked = Add(scaled, bias)", "sum = Add(scaled, bias) masked = Mul(sum, two)"),
        ],
        {"softcap": 10.0, "scale": 10.0, "biases": (Bias(True, False, 2.0),)},
    ),
    "the same bias twice": (
        [("masked = Add(scaled, bias)", "once = Add(scaled, bias) masked = Add(bias, once)")],
        {"biases": (Bias(True, False), Bias(True, False))},
    ),
    "a norm of each head before the rotation": (
        [
            (
                "q = Transpose<perm = [0, 2, 1, 3]>(q1)",
                "q2 = SimplifiedLayerNormalization<epsilon = 0.3>(q1, n8) q = Transpose<perm = [0, 2, 1, 3]>(q2)",
            )
        ],
        {"norm": 0.3, "rotary": ROTARY},
    ),
    "a norm after the rotation": (
        [
            (
                "q_turned = Add(q_cos, q_sin)",
                "q_s = Add(q_cos, q_sin) q_turned = SimplifiedLayerNormalization<epsilon = 0.3>(q_s, n8)",
            ),
            (
                "k_turned = Add(k_cos, k_sin)",
                "k_s = Add(k_cos, k_sin) k_turned = SimplifiedLayerNormalization<epsilon = 0.3>(k_s, n8)",
            ),
        ],
        {"norm": 0.3, "rotary": None},
    ),
    "a norm of all heads together": (
        [
            (
                "q1 = Reshape(q0, four)",
                "q00 = SimplifiedLayerNormalization<epsilon = 0.3>(q0, n32) q1 = Reshape(q00, four)",
            )
        ],
        {"norm": None, "rotary": ROTARY},
    ),
    "a factor before the norm": (
        [
            (
                "q = Transpose<perm = [0, 2, 1, 3]>(q1)",
                "q2 = Mul(q1, two) q3 = SimplifiedLayerNormalization<epsilon = 0.3>(q2, n8) q = "
                "Transpose<perm = [0, 2, 1, 3]>(q3)",
            )
        ],
        {"norm": 0.3, "rotary": ROTARY},
    ),
    "a layer norm of each head": (
        [
            (
                "q = Transpose<perm = [0, 2, 1, 3]>(q1)",
                "q2 = LayerNormalization(q1, n8) q = Transpose<perm = [0, 2, 1, 3]>(q2)",
            )
        ],
        {"norm": None, "rotary": ROTARY},
    ),
    "a bias of each head": (
        [
            (
                "masked = Add(scaled, bias)",
                "alibi = Mul(column4, distances) d = Add(scaled, bias) masked = Add(d, alibi)",
            ),
            ("bias2 = Where", "column3 = Where(mask, five, two) column4 = Unsqueeze(column3, axes12) bias2 = Where"),
        ],
        {"biases": (Bias(True, True), Bias(True, False))},
    ),
    "values with a norm of each head": (
        [
            (
                "v = Transpose<perm = [0, 2, 1, 3]>(v1)",
                "v2 = SimplifiedLayerNormalization(v1, n8) v = Transpose<perm = [0, 2, 1, 3]>(v2)",
            )
        ],
        {"value": Heads(0, 1, 2, 16, 8, 8), "rotary": ROTARY},
    ),
    "scores that are returned": (
        [("=> (float[B,1,N] y,", "=> (float[B,1,N] y, float[B,4,1,S] masked,")],
        {"rotary": ROTARY},
    ),
    "a rotated query that is returned": (
        [("=> (float[B,1,N] y,", "=> (float[B,1,N] y, float[B,4,1,8] q_turned,")],
        {"rotary": ROTARY},
    ),
}

# Changes after which nothing is fused, and why.
MISSES = {
    "a bias before the soft cap": (
        [("masked = Add(scaled, bias)", "sum = Add(scaled, bias) tanh = Tanh(sum) masked = Mul(tanh, five)")],
        "adds no bias of the positions, or before the soft cap",
    ),
    "a factor of each head": ([("Mul(products, scale)", "Mul(products, head_scales)")], "lies between the softmax"),
    "softmax over the heads": ([("Softmax<axis = -1>", "Softmax<axis = 1>")], "is not over the keys"),
    "softmax over the scores of all heads": (
        [
            (
                "probabilities = Softmax<axis = -1>(masked)",
                "flat = Reshape(masked, all_scores) p = Softmax<axis = -1>(flat) probabilities = Reshape(p, by_head)",
            )
        ],
        "is not multiplied with values alone",
    ),
    "probabilities that are returned": (
        [("=> (float[B,1,N] y,", "=> (float[B,1,N] y, float[B,4,1,S] probabilities,")],
        "not multiplied with values alone",
    ),
    "a mask that differs within a group": (
        [
            ("q_turned = Add(q_cos, q_sin)", "q_t = Add(q_cos, q_sin) q_turned = Reshape(q_t, grouped)"),
            (
                "turned_keys = Transpose<perm = [0, 1, 3, 2]>(keys)",
                "turned_keys = Transpose<perm = [0, 1, 3, 2]>(present_key)",
            ),
            (
                "attended = MatMul(probabilities, values)",
                "a4 = MatMul(probabilities, present_value) attended = Reshape(a4, ungrouped)",
            ),
            ("masked = Add(scaled, bias)", "rows = Concat<axis = 2>(bias, bias2x) masked = Add(scaled, rows)"),
            ("bias2 = Where", "bias2y = Where(mask, five, low) bias2x = Unsqueeze(bias2y, axes12) bias2 = Where"),
        ],
        "does not broadcast to scores",
    ),
    "a rotated value": (
        [("TensorScatter<axis = 2>(past_value, v,", "TensorScatter<axis = 2>(past_value, k_turned,")],
        "values are rotated",
    ),
    "a query that is not rotated": (
        [("MatMul(q_turned, turned_keys)", "MatMul(q, turned_keys)")],
        "rotated differently",
    ),
    "a key that is rotated by other angles": (
        [("k_cos = Mul(k, cos)", "k_cos = Mul(k, sin)"), ("k_sin = Mul(k_half, sin)", "k_sin = Mul(k_half, cos)")],
        "rotated differently",
    ),
    "heads that are sums of others": (
        [
            (
                "q = Transpose<perm = [0, 2, 1, 3]>(q1)",
                "q2 = Transpose<perm = [0, 2, 1, 3]>(q1) h0, h1, h2, h3 = Split<axis = 1>(q2, ones4) d0 = Sub(h0, h1) "
                "s0 = Add(d0, h2) d1 = Sub(h1, h2) s1 = Add(d1, h3) q = Concat<axis = 1>(h0, s0, s1, h3)",
            )
        ],
        "rotated differently",
    ),
    "heads that are repeated as a whole": (
        [
            (
                "keys5 = Unsqueeze(present_key, second_axis) keys6 = Expand(keys5, repeated)",
                "keys5 = Unsqueeze(present_key, first_axis) keys6 = Expand(keys5, repeated_first)",
            )
        ],
        "is not present_key with every head repeated",
    ),
    "heads of queries that share another head's keys": (
        [
            ("q_turned = Add(q_cos, q_sin)", "q_t = Add(q_cos, q_sin) q_turned = Reshape(q_t, five_axes)"),
            (
                "turned_keys = Transpose<perm = [0, 1, 3, 2]>(keys)",
                "keys_t = Transpose<perm = [0, 1, 3, 2]>(present_key) turned_keys = Unsqueeze(keys_t, first_axis)",
            ),
            (
                "products = MatMul(q_turned, turned_keys)",
                "p5 = MatMul(q_turned, turned_keys) products = Reshape(p5, by_head)",
            ),
        ],
        "are not shared by consecutive query heads",
    ),
    "values at another position": (
        [
            ("(past_value, v, position)", "(past_value, v, other)"),
            ("numbers = Cast", "other = Sub(position, position) numbers = Cast"),
        ],
        "not written at the same position",
    ),
    "scores that are rounded to integers": (
        [("masked = Add(scaled, bias)", "i = Cast<to = 7>(scaled) f = Cast<to = 1>(i) masked = Add(f, bias)")],
        "lies between",
    ),
    "a query that depends on the new key": (
        [
            ("(past_key, k_turned,", "(past_key, k,"),
            (
                "products = MatMul(q_turned,",
                "seen = ReduceMax(present_key, axes123) late = Add(q_turned, seen) products = MatMul(late,",
            ),
        ],
        "depends on present_key",
    ),
}


def test_a_cache_that_is_filled_in_turn(tmp_path: Path) -> None:
    """Positions behind its end take the place of the oldest ones."""
    body = BODY.replace("TensorScatter<axis = 2>", 'TensorScatter<axis = 2, mode = "circular">')
    assert body.count("circular") == 2
    length = LENGTHS["S"]
    position = torch.tensor([0, 3, length, 3 * length - 2])
    mask = torch.arange(length) <= position[:, None]
    mask[2, 4] = False
    result = compared(body, WEIGHTS, tmp_path, {"position": position, "mask": mask})
    assert operations(result) == ["product", "attention", "product"]


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str, tmp_path: Path) -> None:
    changes, expected = VARIANTS[name]
    result = run(tmp_path, *changes)
    assert "attention" in operations(result)
    assert "Softmax" not in others(result) or "returned" in name
    spec = attention_of(result)
    for attribute, value in expected.items():
        if attribute == "norm":
            assert (spec.query.norm.epsilon if spec.query.norm else None) == (value and pytest.approx(value))
        else:
            assert getattr(spec, attribute) == value, attribute


@pytest.mark.parametrize("name", MISSES)
def test_misses(name: str, tmp_path: Path) -> None:
    changes, reason = MISSES[name]
    result = run(tmp_path, *changes)
    assert not {"attention", "cross attention"} & set(operations(result))
    assert any(reason in message for message in result.misses.values()), result.misses


def test_a_cache_that_another_layer_reads(tmp_path: Path) -> None:
    """A second attention over the same cache reads what the first one writes."""
    second = """r0 = MatMul(y0, wq) r1 = Reshape(r0, four) r = Transpose<perm = [0, 2, 1, 3]>(r1)
    products2 = MatMul(r, turned_keys) masked2 = Add(products2, bias) probabilities2 = Softmax<axis = -1>(masked2)
    attended2 = MatMul(probabilities2, values) heads2 = Transpose<perm = [0, 2, 1, 3]>(attended2)
    row2 = Reshape(heads2, row) y = MatMul(row2, wo)"""
    result = run(tmp_path, ("y = MatMul(row_of_heads, wo)", f"y0 = MatMul(row_of_heads, wo) {second}"))
    assert [name for name in operations(result) if "attention" in name] == ["attention", "cross attention"]
    assert "Softmax" not in others(result)


def test_a_cache_of_which_only_keys_are_written(tmp_path: Path) -> None:
    """Then the operation writes neither, and reads the keys as they are after the write."""
    result = run(
        tmp_path,
        ("present_value = TensorScatter<axis = 2>(past_value, v, position)", "present_value = Mul(past_value, two)"),
        ("Unsqueeze(present_value, second_axis)", "Unsqueeze(past_value, second_axis)"),
    )
    assert "cross attention" in operations(result)
    assert "TensorScatter" in others(result)


def test_parts_that_nothing_reads(tmp_path: Path) -> None:
    """They are not computed."""
    result = run(
        tmp_path,
        ("TensorScatter<axis = 2>(past_value, v, position)", "TensorScatter<axis = 2>(past_value, k, position)"),
    )
    assert len(specs(result)[0].parts) == 2
