"""Copies of the last traced layer have their own weights and caches; layers that differ are not copied."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from accel.graph.passes import NoMatchError
from accel.graph.repeat_layers import SCOPES, RepeatLayers, Stack
from tests.graph.text import numbers, parse, run

TRACED, TOTAL, WIDTH = 3, 8, 4
CACHES = [[f"past.{layer}", f"present.{layer}"] for layer in range(TOTAL)]
WEIGHTS = {f"model.layers.{layer}.w": numbers(WIDTH, WIDTH, seed=layer) for layer in range(TOTAL)}
FLOAT = f"float[n, {WIDTH}]"


def layer(index: int, source: str, scale: str = "scale") -> str:
    return f"""
        product_{index} = MatMul ({source}, w_{index})
        scaled_{index} = Mul (product_{index}, {scale})
        present_{index} = Add (scaled_{index}, past_{index})
        h_{index} = Add (present_{index}, {source})
    """


def traced(layers: int, change: Callable[[str], str] = str, tail: str = "y = Neg (h_{last})") -> ir.Model:
    """The first layers, as the exporter describes them."""
    sources = ["start", *(f"h_{index}" for index in range(layers))]
    body = "".join(layer(index, sources[index]) for index in range(layers))
    text = "scale = Constant <value = float {0.5}> ()\n start = Exp (x)" + body + tail.format(last=layers - 1)
    inputs = ", ".join([f"{FLOAT} x", *(f"{FLOAT} past_{index}" for index in range(layers))])
    outputs = ", ".join([f"{FLOAT} y", *(f"{FLOAT} present_{index}" for index in range(layers))])
    weights = {f"w_{index}": WEIGHTS[f"model.layers.{index}.w"] for index in range(layers)}
    model = parse(change(f"g ({inputs}) => ({outputs}) {{ {text} }}"), weights)
    for node in model.graph:
        _, _, index = (node.outputs[0].name or "").partition("_")
        path = ["", "model", f"model.layers.{index}"] if index.isdecimal() else [""]
        node.metadata_props[SCOPES] = repr([*path, node.outputs[0].name])
        node.name = f"node_{node.outputs[0].name}"
    for value in (*model.graph.inputs, *model.graph.outputs, *list(model.graph.initializers.values())):
        name, _, index = (value.name or "").partition("_")  # the parser takes no dots before digits
        value.name = f"model.layers.{index}.w" if name == "w" else ".".join((name, index)).rstrip(".")
    return model


def repeat(model: ir.Model, stack: Stack | None = None) -> None:
    stack = stack or Stack("model.layers", TRACED, 1, TOTAL)
    RepeatLayers(stack, CACHES, lambda name: ir.tensor(WEIGHTS[name], name=name))(model)


@pytest.mark.parametrize("period", [1, 2])
def test_graph_of_all_layers(period: int) -> None:
    """The completed graph computes what a trace of all layers does, with the same inputs and outputs, in order."""
    traced_layers = 3 * period
    model, whole = traced(traced_layers), traced(TOTAL)
    repeat(model, Stack("model.layers", traced_layers, period, TOTAL))
    feeds = {"x": numbers(5, WIDTH)} | {f"past.{index}": numbers(5, WIDTH, seed=20 + index) for index in range(TOTAL)}
    expected, found = run(whole, feeds), run(model, feeds)
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert [value.name for value in model.graph.inputs] == [value.name for value in whole.graph.inputs]
    assert len(model.graph) == len(whole.graph)
    names = [node.name for node in model.graph] + [value.name for node in model.graph for value in node.outputs]
    assert len(set(names)) == len(names)


def test_last_layer_that_computes_the_result() -> None:
    """An output of the model comes from the last copy, under its own name."""
    model, whole = traced(TRACED, tail=""), traced(TOTAL, tail="")
    for each, last in ((model, TRACED - 1), (whole, TOTAL - 1)):
        each.graph.outputs[0] = next(node.outputs[0] for node in each.graph if node.outputs[0].name == f"h_{last}")
        each.graph.outputs[0].name = "y"
    repeat(model)
    feeds = {"x": numbers(2, WIDTH)} | {f"past.{index}": numbers(2, WIDTH, seed=20 + index) for index in range(TOTAL)}
    expected, found = run(whole, feeds), run(model, feeds)
    assert list(found) == list(expected)
    np.testing.assert_array_equal(found["y"], expected["y"])


OTHER = "other = Constant <value = float {0.25}> ()\n"


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("scaled_2 = Mul", "scaled_2 = Div", "scaled_1 and node_scaled_2 differ"),
        ("(scaled_2, past_2)", "(scaled_2, past_0)", "read different values"),
        ("(present_2, h_1)", "(present_2, start)", "read different values"),
        ("product_2 = MatMul (h_1, w_2)", f"{OTHER} product_2 = Mul (h_1, other)", "node_product_2 differ"),
        ("(product_2, scale)", "(product_2, other)", "read different values"),
        ("Neg (h_2)", "Add (h_2, h_1)", "node_y reads a value of node_h_1"),
        ("Neg (h_2)", "Add (h_2, product_2)", "node_y reads a value of node_product_2"),
    ],
)
def test_layers_that_differ(old: str, new: str, reason: str) -> None:
    """Nothing is copied, and the message names the nodes."""

    def change(text: str) -> str:
        return text.replace("start =", f"{OTHER} start =").replace(old, new.removeprefix(OTHER))

    with pytest.raises(NoMatchError, match=reason):
        repeat(traced(TRACED, change))


def test_weights_that_are_missing() -> None:
    """A copy's weight must have the shape of the traced layer's."""
    weights = {name: numbers(WIDTH, WIDTH + 1) for name in WEIGHTS}
    complete = RepeatLayers(Stack("model.layers", TRACED, 1, TOTAL), CACHES, lambda name: ir.tensor(weights[name]))
    with pytest.raises(NoMatchError, match=r"model.layers.3.w has the shape"):
        complete(traced(TRACED))
