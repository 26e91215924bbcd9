"""Lookups by a function of distances become lookups by the distance; any other stays."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.models.t5.modeling_t5 import T5Attention

from accel.graph.cleanup.precompute_position_bias import MAX_DISTANCE, PrecomputePositionBias
from accel.graph.shapes import made_by, scalar
from tests.conftest import Build
from tests.graph.text import numbers, parse, rewritten, weight

WEIGHTS = {"w": numbers(40, 3)}
CONSTANTS = {"zero": 0, "two": 2, "eight": 8, "sixteen": 16, "top": 15}
# T5's buckets: 16 of 40 rows for each direction, 8 of them exact; from a distance of 1000 on, all are alike
BUCKETS = """
    right = Greater (x, zero)
    counted = Cast <to = 7> (right)
    shift = Mul (counted, sixteen)
    far = Abs (x)
    near = Less (far, eight)
    real = Cast <to = 1> (far)
    part = Div (real, eight_f)
    log = Log (part)
    scaled = Mul (log, factor)
    whole = Cast <to = 7> (scaled)
    large = Add (whole, eight)
    most = Min (large, top)
    one = Where (near, far, most)
    i = Add (shift, one)
"""


def graph(body: str, wide: str = "m, n") -> ir.Model:
    constants = [f"{name} = Constant <value = int64 {{{number}}}> ()" for name, number in CONSTANTS.items()]
    constants += [
        f"{name} = Constant <value = float {{{number}}}> ()" for name, number in (("eight_f", 8), ("factor", 1.66))
    ]
    text = "\n".join(constants)
    return parse(f"g (int64[{wide}] x) => (float[{wide}, 3] y) {{ {text}\n {body}\n y = Gather (w, i) }}", WEIGHTS)


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph if node.op_type != "Constant"]


def distances(least: int, most: int) -> Mapping[str, np.ndarray]:
    return {"x": np.arange(least, most + 1)[None].repeat(2, 0)}


def test_buckets_become_a_table() -> None:
    """All rows are equal, also beyond the tabulated distances; three of fifteen nodes are left."""
    model = graph(BUCKETS)
    inputs = [
        distances(-3000, 3000),
        distances(0, 0),
        distances(MAX_DISTANCE - 2, MAX_DISTANCE + 3),
        distances(-MAX_DISTANCE - 3, 2 - MAX_DISTANCE),
    ]
    rewritten(PrecomputePositionBias(), [model], inputs)
    assert operators(model) == ["Max", "Min", "Gather"]
    table = weight(model, "w.by_distance")
    assert 1000 < len(table) < 2049
    assert "w" not in model.graph.initializers


def test_only_one_direction() -> None:
    """As in a decoder, where all later positions share a row."""
    back = "b = Min (x, zero)\n far = Neg (b)\n c = Min (far, top)\n d = Add (c, two)\n i = Mul (d, two)"
    model = graph(back)
    rewritten(PrecomputePositionBias(), [model], [distances(-30, 30)])
    assert len(weight(model, "w.by_distance")) == 16


@pytest.mark.parametrize(
    "body",
    [
        "a = Abs (x)\n b = Mod (a, sixteen)\n c = Add (b, two)\n i = Add (c, eight)",  # never becomes constant
        "a = Min (x, top)\n i = Max (a, zero)",  # as few nodes as a table needs
        "a = Min (x, top)\n b = Max (a, zero)\n c = Mul (b, eight)\n d = Add (c, two)\n i = Sub (d, two)",  # up to 120
        "n = ReduceMax <keepdims = 0> (x)\n a = Sub (x, n)\n b = Max (a, zero)\n c = Min (b, top)\n i = Sub (c, n)",
    ],
)
def test_others_stay(body: str) -> None:
    """A function that never becomes constant, a short one, one with indices out of range, one of two values."""
    model = graph(body)
    before = operators(model)
    PrecomputePositionBias()(model)
    assert operators(model) == before


def test_one_weight_by_two_functions() -> None:
    """Each lookup keeps its own rows."""
    back = "b = Min (x, zero)\n far = Neg (b)\n c = Min (far, top)\n d = Add (c, two)\n e = Sub (d, two)\n"
    model = graph(
        back + "f = Add (e, two)\n p = Gather (w, e)\n q = Gather (w, f)\n z = Add (p, q)\n i = Add (e, zero)"
    )
    rewritten(PrecomputePositionBias(), [model], [distances(-30, 30)])


def test_a_whole_t5(build: Build, tiny: Path) -> None:
    """The table holds the rows that PyTorch looks up, at every distance, in each of the three graphs."""
    config = AutoConfig.from_pretrained(tiny)
    weights = load_file(tiny / "model.safetensors")
    _, artifacts = build(tiny, "optimize")
    reached = torch.arange(-500, 501)
    for component, bidirectional in (("encoder", True), ("prefill", False), ("decode", False)):
        model = ir.load(artifacts["optimize"].folder / f"{component}.onnx")
        names = [name for name in model.graph.initializers if name.endswith(".by_distance")]
        ((lookup, _),) = model.graph.initializers[names[0]].uses()
        value, limits = lookup.inputs[1], []
        while (limiting := made_by(value, "Min", "Max")) is not None:
            value = limiting.inputs[0]
            limits.append(int(scalar(limiting.inputs[1]) or 0))
        buckets = T5Attention._relative_position_bucket(
            reached, bidirectional, config.relative_attention_num_buckets, config.relative_attention_max_distance
        )
        expected = weights[names[0].removesuffix(".by_distance")][buckets].numpy()
        assert np.array_equal(weight(model, names[0])[np.clip(reached.numpy(), min(limits), max(limits))], expected)
