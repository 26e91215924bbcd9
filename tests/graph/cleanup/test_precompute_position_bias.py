"""What a model looks up by a function of distances, it looks up by the distance; any other lookup stays."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.models.t5.modeling_t5 import T5Attention

from accel.graph.cleanup.precompute_position_bias import REACH, precompute_position_bias
from accel.graph.shapes import made_by, scalar
from tests.conftest import Build
from tests.graph.text import numbers, parse, rewritten, weight

WEIGHTS = {"w": numbers(40, 3)}
CONSTANTS = {"zero": 0, "two": 2, "eight": 8, "sixteen": 16, "top": 15}
# T5's buckets, with 16 of 40 rows a direction, 8 of them exact, and 1000 as the largest distance that differs
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
    held = [f"{name} = Constant <value = int64 {{{number}}}> ()" for name, number in CONSTANTS.items()]
    held += [
        f"{name} = Constant <value = float {{{number}}}> ()" for name, number in (("eight_f", 8), ("factor", 1.66))
    ]
    text = "\n".join(held)
    return parse(f"g (int64[{wide}] x) => (float[{wide}, 3] y) {{ {text}\n {body}\n y = Gather (w, i) }}", WEIGHTS)


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph if node.op_type != "Constant"]


def distances(least: int, most: int) -> Mapping[str, np.ndarray]:
    return {"x": np.arange(least, most + 1)[None].repeat(2, 0)}


def test_buckets_become_a_table() -> None:
    """The same rows, near and far, left and right, and beyond what was looked at; three nodes are left of fifteen."""
    model = graph(BUCKETS)
    inputs = [
        distances(-3000, 3000),
        distances(0, 0),
        distances(REACH - 2, REACH + 3),
        distances(-REACH - 3, 2 - REACH),
    ]
    rewritten(precompute_position_bias, [model], inputs)
    assert operators(model) == ["Max", "Min", "Gather"]
    table = weight(model, "w.by_distance")
    assert 1000 < len(table) < 2049
    assert "w" not in model.graph.initializers


def test_only_one_way() -> None:
    """As in a decoder, which looks back: what lies ahead is all alike."""
    back = "b = Min (x, zero)\n far = Neg (b)\n c = Min (far, top)\n d = Add (c, two)\n i = Mul (d, two)"
    model = graph(back)
    rewritten(precompute_position_bias, [model], [distances(-30, 30)])
    assert len(weight(model, "w.by_distance")) == 16


@pytest.mark.parametrize(
    "body",
    [
        "a = Abs (x)\n b = Mod (a, sixteen)\n c = Add (b, two)\n i = Add (c, eight)",  # never settles
        "a = Min (x, top)\n i = Max (a, zero)",  # as few nodes as a table's
        "a = Min (x, top)\n b = Max (a, zero)\n c = Mul (b, eight)\n d = Add (c, two)\n i = Sub (d, two)",  # up to 120
        "n = ReduceMax <keepdims = 0> (x)\n a = Sub (x, n)\n b = Max (a, zero)\n c = Min (b, top)\n i = Sub (c, n)",
    ],
)
def test_others_stay(body: str) -> None:
    """A function that goes on changing, a short one, one that leads out of the weight, one of several values."""
    model = graph(body)
    before = operators(model)
    precompute_position_bias([model])
    assert operators(model) == before


def test_one_weight_by_two_functions() -> None:
    """Each lookup keeps its own numbers."""
    back = "b = Min (x, zero)\n far = Neg (b)\n c = Min (far, top)\n d = Add (c, two)\n e = Sub (d, two)\n"
    model = graph(
        back + "f = Add (e, two)\n p = Gather (w, e)\n q = Gather (w, f)\n z = Add (p, q)\n i = Add (e, zero)"
    )
    rewritten(precompute_position_bias, [model], [distances(-30, 30)])


def test_a_whole_t5(build: Build, tiny: Path) -> None:
    """The rows are those that PyTorch looks up, at every distance, in each of the three graphs."""
    config = AutoConfig.from_pretrained(tiny)
    weights = load_file(tiny / "model.safetensors")
    _, made = build(tiny, "optimize")
    reached = torch.arange(-500, 501)
    for component, both_ways in (("encoder", True), ("prefill", False), ("decode", False)):
        model = ir.load(made["optimize"].folder / f"{component}.onnx")
        names = [name for name in model.graph.initializers if name.endswith(".by_distance")]
        ((lookup, _),) = model.graph.initializers[names[0]].uses()
        value, limits = lookup.inputs[1], []
        while (limiting := made_by(value, "Min", "Max")) is not None:
            value = limiting.inputs[0]
            limits.append(int(scalar(limiting.inputs[1]) or 0))
        buckets = T5Attention._relative_position_bucket(
            reached, both_ways, config.relative_attention_num_buckets, config.relative_attention_max_distance
        )
        expected = weights[names[0].removesuffix(".by_distance")][buckets].numpy()
        assert np.array_equal(weight(model, names[0])[np.clip(reached.numpy(), min(limits), max(limits))], expected)
