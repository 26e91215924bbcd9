"""Caches of layers with a window: as few entries as the window needs, with the outputs of whole caches."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from accel.graph.decode.window_cache import AXIS, WindowCache
from accel.graph.passes import snapshot
from accel.graph.shapes import dims
from accel.runtime.layout import WINDOW
from tests.graph.text import numbers, parse

HEADER = '<ir_version: 11, opset_import: ["" : 24]>'
W, BUCKET = 5, 24
INPUTS = (
    "float[batch, 4, 1, 8] q, float[batch, 2, 1, 8] k, float[batch, 2, 1, 8] v, int64[batch, bucket] mask, "
    "float[batch, 2, bucket, 8] past_k, float[batch, 2, bucket, 8] past_v, int64[batch] position"
)
OUTPUTS = "float[batch, 2, bucket, 8] present_k, float[batch, 2, bucket, 8] present_v"
HEAD = """
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    window = Constant <value = int64 {5}> ()
    first_axis = Constant <value = int64[1] {1}> ()
    two = Constant <value = int64[1] {2}> ()
    four = Constant <value = int64[1] {4}> ()
    eight = Constant <value = int64[1] {8}> ()
    three_axes = Constant <value = int64[3] {1, 2, 3}> ()
    both_axes = Constant <value = int64[2] {1, 2}> ()
    least = Constant <value = float {-3e38}> ()
    none = Constant <value = float {0}> ()
    cap = Constant <value = float {3}> ()
    batch_length = Shape <start: int = 0, end: int = 1> (past_k)
    length = Shape <start: int = 2, end: int = 3> (past_k)
    count = Gather (length, zero)
    keys = Range (zero, count, one)
    query = Unsqueeze (position, both_axes)
    given = Cast <to: int = 9> (mask)
    given_rows = Unsqueeze (given, both_axes)
    place = Unsqueeze (query, first_axis)
    causal = LessOrEqual (keys, place)
    shown = And (causal, given_rows)
    present_k = TensorScatter <axis: int = 2> (past_k, k, position)
    present_v = TensorScatter <axis: int = 2> (past_v, v, position)
"""
# Repeated heads, as exported, with a soft cap of the scores before the bias.
ATTENTION = """
    wide_shape = Concat <axis: int = 0> (batch_length, two, two, length, eight)
    flat_shape = Concat <axis: int = 0> (batch_length, four, length, eight)
    wide_k = Unsqueeze (present_k, two)
    repeated_k = Expand (wide_k, wide_shape)
    own_k = Reshape (repeated_k, flat_shape)
    wide_v = Unsqueeze (present_v, two)
    repeated_v = Expand (wide_v, wide_shape)
    own_v = Reshape (repeated_v, flat_shape)
    turned = Transpose <perm: ints = [0, 1, 3, 2]> (own_k)
    products = MatMul (q, turned)
    small = Div (products, cap)
    bent = Tanh (small)
    scores = Mul (bent, cap)
    biased = Add (scores, bias)
    shares = Softmax <axis: int = -1> (biased)
    y = MatMul (shares, own_v)
"""
SHAPES = {
    "bucket": "keys numbered",
    "bucket 1": "column",
    "batch 1 bucket 1": "moved",
    "1 4 1 bucket": "ramp",
    "batch 1 1 bucket": "causal given_rows shown inside flat all bias hidden back distance",
    "batch 4 1 bucket": "sloped slope mixed products small bent scores biased shares",
    "batch 2 2 bucket 8": "repeated_k repeated_v",
    "batch 4 bucket 8": "own_k own_v",
    "batch 4 8 bucket": "turned",
}
WINDOWS = {
    "after": "limit = Sub (place, window)\n inside = Greater (keys, limit)",
    "from": "last = Sub (window, one)\n limit = Sub (place, last)\n inside = GreaterOrEqual (keys, limit)",
    "distance": "distance = Sub (place, keys)\n inside = Less (distance, window)",
    "reverse": "limit = Sub (place, window)\n inside = Less (limit, keys)",
    "widened": "limit = Sub (place, window)\n flat = Greater (keys, limit)\n inside = Identity (flat)",
}
ROWS = """
    row_length = Gather (batch_length, zero)
    numbers = Range (zero, row_length, one)
    row = Unsqueeze (numbers, three_axes)
    limit = Sub (place, window)
    late = Greater (row, limit)
    inside = And (late, causal)
"""
COLUMNS = """
    target = Constant <value = int64[4] {-1, 1, 1, 24}> ()
    column = Unsqueeze (keys, first_axis)
    limit = Sub (place, window)
    moved = Greater (column, limit)
    inside = Reshape (moved, target)
"""
# A bias of its own for each head and key, but not for each sequence.
SLOPES = """
    slopes = Constant <value = float[1,4,1,1] {0.5, 0.25, 0.125, 0.0625}> ()
    numbered = Cast <to: int = 1> (keys)
    ramp = Mul (numbered, slopes)
"""
SLOPED = ATTENTION.replace("Add (scores, bias)", "Add (sloped, bias)").replace(
    "    biased", "    sloped = Add (scores, ramp)\n    biased"
)
MASK = "all = And (inside, shown)\n bias = Where (all, none, least)"


def graph(body: str, outputs: str = "float[batch, 4, 1, 8] y", inputs: str = INPUTS) -> ir.Model:
    """A graph whose shapes are as known as those of an exported one."""
    model = parse(f"g ({inputs}) => ({outputs}, {OUTPUTS}) {{ {HEAD} {body} }}", header=HEADER)
    for node in model.graph:
        for shape, names in SHAPES.items():
            if node.outputs[0].name in names.split():
                node.outputs[0].shape = ir.Shape(int(dim) if dim.isdigit() else dim for dim in shape.split())
    return model


def decode(model: ir.Model, length: int, starts: Sequence[int], steps: int) -> list[np.ndarray]:
    """Outputs of consecutive steps, each sequence from its own position on; the first tokens of the second are hidden.

    Entries that were never written are noise.
    """
    batch = len(starts)
    mask = np.zeros((batch, BUCKET), np.int64)
    for row, start in enumerate(starts):
        mask[row, 2 * row : start] = 1
    caches = {name: 9 * numbers(batch, 2, length, 8, seed=seed) for seed, name in enumerate(("past_k", "past_v"))}
    for row, start in enumerate(starts):
        for past in range(max(0, start - length), start):
            for seed, name in enumerate(("past_k", "past_v")):
                caches[name][row, :, past % length] = numbers(2, 8, seed=100 * row + past + 50 * seed)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    outputs = []
    for step in range(steps):
        position = np.array(starts) + step
        mask[np.arange(batch), position] = 1
        new = {name: numbers(batch, heads, 1, 8, seed=step) for name, heads in (("q", 4), ("k", 2))}
        inputs = {**new, "v": -new["k"][..., ::-1], **caches, "mask": mask, "position": position}
        output, *written = session.run(["y", "present_k", "present_v"], inputs)
        caches = dict(zip(caches, written, strict=True))
        outputs.append(output)
    return outputs


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("length", [W, W + 2, BUCKET])
def test_outputs(window: str, length: int) -> None:
    """Of whole caches, at positions before and behind the caches' end, which other sequences have reached or not."""
    body = f"{WINDOWS[window]}\n{MASK}\n{ATTENTION}"
    whole, short = graph(body), graph(body)
    assert WindowCache()(short).modified
    for starts in ((0, 3), (9, 4), (0, 12)):
        expected = decode(whole, BUCKET, starts, 11)
        for ours, right in zip(decode(short, length, starts, 11), expected, strict=True):
            np.testing.assert_allclose(ours, right, rtol=1e-5, atol=1e-6)
    for name in ("past_k", "past_v", "present_k", "present_v"):
        value = next(each for each in (*short.graph.inputs, *short.graph.outputs) if each.name == name)
        assert dims(value) == ("batch", 2, "window_5", 8)
    assert not WindowCache()(short).modified


def test_a_bias_of_each_head() -> None:
    """As ALiBi: numbers by head and distance beside the window."""
    body = f"""{WINDOWS["after"]}
        slopes = Constant <value = float[1,4,1,1] {{0.5, 0.25, 0.125, 0.0625}}> ()
        back = Sub (keys, place)
        distance = Cast <to: int = 1> (back)
        slope = Mul (distance, slopes)
        all = And (inside, shown)
        hidden = Where (all, none, least)
        mixed = Add (hidden, slope)
        bias = Cast <to: int = 1> (mixed)
        {ATTENTION}"""
    whole, short = graph(body), graph(body)
    for model in (whole, short):
        bias = next(node.outputs[0] for node in model.graph if node.outputs[0].name == "bias")
        bias.shape = ir.Shape(["batch", 4, 1, "bucket"])
    assert WindowCache()(short).modified
    for ours, right in zip(decode(short, W + 1, (3, 8), 11), decode(whole, BUCKET, (3, 8), 11), strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        (f"{ROWS}\n{MASK}\n{ATTENTION}", ""),
        (f"{COLUMNS}\n{MASK}\n{ATTENTION}", ""),
        (f"{WINDOWS['after']}\n{MASK}\n{SLOPES}\n{SLOPED}", ""),
        (f"all = Identity (shown)\n bias = Where (all, none, least)\n{ATTENTION}", ""),
        (f"limit = Sub (place, window)\n inside = Less (keys, limit)\n{MASK}\n{ATTENTION}", ""),
        (f"limit = Mul (place, window)\n inside = Greater (keys, limit)\n{MASK}\n{ATTENTION}", ""),
        (f"{WINDOWS['after']}\n all = Or (inside, shown)\n bias = Where (all, none, least)\n{ATTENTION}", ""),
        (f"{WINDOWS['after']}\n all = And (inside, shown)\n bias = Where (all, none, cap)\n{ATTENTION}", ""),
        (f"{WINDOWS['after']}\n{MASK}\n{ATTENTION}\n seen = Identity (biased)", "float[batch, 4, 1, bucket] seen, "),
        (f"{WINDOWS['after']}\n{MASK}\n{ATTENTION}\n seen = Identity (present_k)", "float[a, b, c, d] seen, "),
        (f"{WINDOWS['after']}\n{MASK}\n{ATTENTION}\n seen = ReduceMax (past_k)", "float[a, b, c, d] seen, "),
    ],
    ids=[
        "rows",
        "another axis",
        "a bias without rows",
        "no window",
        "the other way",
        "not a distance",
        "or",
        "not hidden",
        "scores",
        "keys",
        "cache",
    ],
)
def test_whole_caches(body: str, outputs: str) -> None:
    """Where no window limits what is seen, or something else reads the cache, or what is as long."""
    model = graph(body, f"{outputs}float[batch, 4, 1, 8] y")
    before = snapshot(model)
    assert not WindowCache()(model).modified
    assert snapshot(model) == before


def test_no_other_input_of_the_buckets_length() -> None:
    """Then nothing would say how long the mask is."""
    inputs = INPUTS.replace("int64[batch, bucket] mask, ", "int64[batch, 1] mask, ")
    model = graph(f"{WINDOWS['after']}\n{MASK}\n{ATTENTION}", inputs=inputs)
    assert not WindowCache()(model).modified


def test_name_of_the_axis() -> None:
    """The runtime knows it."""
    assert AXIS.format(7) == f"{WINDOW}7"
