"""Products of one value are joined, alike in every graph that has the weights, and only there."""

import numpy as np
import onnx_ir as ir
import pytest

from accel.graph.files import weight_bytes
from accel.graph.fusion.pack_qkv import PackQkv
from accel.graph.weights import initializers, shared_bytes
from tests.graph.text import numbers, parse, rewritten, weight

NAMES = ("q", "k", "v")
INPUTS = [{"x": numbers(b, t, 8), "e": numbers(b, 7, 8, seed=3)} for b, t in ((2, 3), (1, 1), (3, 0))]
HEADS = {"q": 4, "k": 4, "v": 4}
JOINED = ["MatMul", "Reshape", "Transpose", "Split"]
DONE = "a = Add (qt, kt)\n y = Add (a, vt)"
OUT = "=> (float[b, 4, t, 2] y)"


def weights(heads: dict[str, int] = HEADS, width: int = 2) -> dict[str, np.ndarray]:
    """Matrices, biases and target shapes for products that are cut into heads."""
    made: dict[str, np.ndarray] = {}
    for seed, (name, count) in enumerate(heads.items()):
        made[f"layer_{name}_weight"] = numbers(8, count * width, seed=seed)
        made[f"layer_{name}_bias"] = numbers(count * width, seed=seed + 10)
        made[f"{name}s"] = np.array([0, 0, count, width])
    return made


def product(name: str, x: str = "x", bias: bool = False, perm: str = "0, 2, 1, 3", heads: bool = True) -> str:
    """x times a weight, plus a bias, cut into heads and turned: as `<name>t`."""
    end = "r" if heads else "t"
    lines = [f"{name}{'p' if bias else end} = MatMul ({x}, layer_{name}_weight)"]
    if bias:
        lines.append(f"{name}{end} = Add ({name}p, layer_{name}_bias)")
    if heads:
        lines += [f"{name}h = Reshape ({name}r, {name}s)", f"{name}t = Transpose <perm: ints = [{perm}]> ({name}h)"]
    return "\n".join(lines)


def graph(*lines: str, out: str = OUT, heads: dict[str, int] = HEADS) -> ir.Model:
    """A graph of `lines`, with just the weights it uses."""
    body = "\n".join(lines)
    held = {name: array for name, array in weights(heads).items() if name in body}
    return parse(f"g (float[b, t, 8] x, float[b, u, 8] e) {out} {{ {body} }}", held)


def test_queries_keys_and_values() -> None:
    """One product, one cut into heads; the old weights are gone and no byte is added."""
    models = [graph(*(product(name) for name in NAMES), DONE) for _ in range(2)]
    before = sum(array.nbytes for name, array in weights().items() if "weight" in name)
    left = rewritten(PackQkv(), models, INPUTS)
    assert left == [[*JOINED, "Add", "Add"]] * 2
    for model in models:
        joined = weight(model, "layer_q+k+v_weight")
        np.testing.assert_array_equal(joined, np.hstack([weights()[f"layer_{name}_weight"] for name in NAMES]))
        assert not any(f"layer_{name}_weight" in model.graph.initializers for name in NAMES)
        assert sum(v.const_value.nbytes for v in initializers(model) if v.dtype == ir.DataType.FLOAT) == before
    assert shared_bytes(initializers(models[0]), initializers(models[1])) == weight_bytes(models[1])


def test_fewer_heads_for_keys_and_values() -> None:
    """Grouped queries: keys and values are joined, and cut into equal parts; the queries' wider product stays."""
    heads = {"q": 4, "k": 2, "v": 2}
    lines = [*(product(name) for name in NAMES), "a = Concat <axis: int = 1> (kt, vt)", "y = Add (qt, a)"]
    model = graph(*lines, heads=heads)
    left = rewritten(PackQkv(), [model], INPUTS)[0]
    assert sorted(left) == sorted([*JOINED, *JOINED[:-1], "Concat", "Add"])
    assert "layer_q_weight" in model.graph.initializers
    assert "layer_k+v_weight" in model.graph.initializers


def test_keys_turned_for_the_scores() -> None:
    """Keys whose transposes were merged into one of another order take one more node."""
    lines = [product("q"), product("k", perm="0, 2, 3, 1"), product("v"), "a = MatMul (qt, kt)", "y = MatMul (a, vt)"]
    assert rewritten(PackQkv(), [graph(*lines)], INPUTS[:2])[0] == [*JOINED, "Transpose", "MatMul", "MatMul"]


def test_turns_that_cost_what_joining_saves() -> None:
    """Two products, both turned in another order: a node each for the turn is as many as now."""
    lines = [product(name, perm="0, 2, 3, 1") for name in ("q", "k")]
    model = graph(*lines, "y = Add (qt, kt)", out="=> (float[b, 4, 2, t] y)")
    assert rewritten(PackQkv(), [model], INPUTS)[0].count("MatMul") == 2


def test_parts_that_are_outputs() -> None:
    """Prefill returns keys and values as they are: names and numbers stay."""
    out = "=> (float[b, 4, t, 2] y, float[b, 4, t, 2] kt, float[b, 4, t, 2] vt)"
    model = graph(*(product(name) for name in NAMES), DONE, out=out)
    assert rewritten(PackQkv(), [model], INPUTS)[0][:4] == JOINED


@pytest.mark.parametrize("biased", [("q", "k", "v"), ("q", "v")])
def test_biases_are_joined_too(biased: tuple[str, ...]) -> None:
    """With zeros for a product that has none."""
    models = [graph(*(product(name, bias=name in biased) for name in NAMES), DONE) for _ in range(2)]
    assert rewritten(PackQkv(), models, INPUTS)[0] == ["MatMul", "Add", *JOINED[1:], "Add", "Add"]
    assert shared_bytes(initializers(models[0]), initializers(models[1])) == weight_bytes(models[1])
    assert not any(name.endswith("_bias") and "+" not in name for name in models[0].graph.initializers)


def test_without_heads_the_product_is_split() -> None:
    """What follows is not a cut into heads, as with a norm of the queries: one product and one Split."""
    lines = [*(product(name, heads=False) for name in NAMES), DONE]
    assert rewritten(PackQkv(), [graph(*lines, out="=> (float[b, t, 8] y)")], INPUTS)[0] == [
        "MatMul",
        "Split",
        "Add",
        "Add",
    ]


def test_two_products_without_heads_stay(caplog: pytest.LogCaptureFixture) -> None:
    """A product and a Split are no fewer nodes than two products, and the Split copies; with biases they are."""
    caplog.set_level("DEBUG", "accel.graph.passes")
    lines = [product("q", heads=False), product("k", heads=False), "y = Mul (qt, kt)"]
    assert rewritten(PackQkv(), [graph(*lines, out="=> (float[b, t, 8] y)")], INPUTS)[0] == [
        "MatMul",
        "MatMul",
        "Mul",
    ]
    assert "leaves no fewer nodes" in caplog.text
    lines = [product("q", heads=False, bias=True), product("k", heads=False, bias=True), "y = Mul (qt, kt)"]
    left = rewritten(PackQkv(), [graph(*lines, out="=> (float[b, t, 8] y)")], INPUTS)[0]
    assert left == ["MatMul", "Add", "Split", "Mul"]


def test_a_group_that_one_graph_lacks_stays_apart() -> None:
    """Prefill alone makes keys and values of the encoder's output; decode alone has another input for one weight."""
    cross = [product("k", "e"), product("v", "e"), "a = Add (kt, vt)"]
    prefill = graph(product("q"), *cross, "n = ReduceSum <keepdims: int = 1> (a)", "y = Add (qt, n)")
    decode = graph(product("q"), "y = Neg (qt)")
    left = rewritten(PackQkv(), [prefill, decode], INPUTS[:2])
    assert left[0].count("MatMul") == 3
    assert "layer_k_weight" in prefill.graph.initializers
    same = graph(*(product(name) for name in NAMES), DONE)
    other = graph(product("q"), product("k"), "m = Neg (x)", product("v", "m"), DONE)
    left = rewritten(PackQkv(), [same, other], INPUTS)
    assert [ops.count("MatMul") for ops in left] == [2, 2]
    assert "layer_v_weight" in same.graph.initializers
    assert "layer_q+k_weight" in same.graph.initializers


@pytest.mark.parametrize(
    "lines",
    [
        (*(product(name) for name in NAMES), "z = MatMul (x, layer_v_weight)", DONE),
        (product("q", "x"), product("k", "n"), product("v", "m"), DONE),
    ],
    ids=["weight used twice", "three inputs"],
)
def test_weights_that_are_left_alone(lines: tuple[str, ...]) -> None:
    """A weight that something else uses keeps its name and shape; nothing is joined over different inputs."""
    out = OUT[:-1] + (", float[b, t, 8] z)" if "z = " in "".join(lines) else ")")
    model = graph("n = Neg (x)", "m = Abs (x)", *lines, out=out)
    left = rewritten(PackQkv(), [model], INPUTS)[0]
    assert "layer_v_weight" in model.graph.initializers
    assert left.count("MatMul") == 3


def test_heads_of_different_width_are_split_without_them() -> None:
    """Values wider than keys can't be cut in one go: the plain way."""
    held = weights() | {"vs": np.array([0, 0, 2, 4])}
    body = "\n".join([*(product(name) for name in NAMES), "y = Add (qt, kt)"])
    specs = "(float[b, t, 8] x) => (float[b, 4, t, 2] y, float[b, 2, t, 4] vt)"
    model = parse(f"g {specs} {{ {body} }}", {name: array for name, array in held.items() if name in body})
    assert rewritten(PackQkv(), [model], INPUTS)[0][:2] == ["MatMul", "Split"]
