"""ONNX files with and without external data."""

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from accel.graph import files
from accel.graph.weights import transpose
from tests.graph.text import numbers, parse, run

TEXT = "g (float[n, 600] x) => (float[n, 4] y) { h = MatMul(x, w)\n y = MatMul(h, v) }"
INPUTS = {"x": numbers(2, 600)}


def model(width: int) -> ir.Model:
    """Return a model with weights of 600 * width * 4 bytes and a few more."""
    return parse(TEXT, {"w": numbers(600, width), "v": numbers(width, 4)})


def session(path: Path) -> np.ndarray:
    return onnxruntime.InferenceSession(str(path)).run(None, INPUTS)[0]


@pytest.mark.parametrize(("width", "external"), [(8, False), (500, True)])
def test_weights_move_out_above_a_megabyte(tmp_path: Path, width: int, external: bool) -> None:
    """Smaller models are one file, larger ones a graph and a data file; both give the same results when loaded."""
    graph = model(width)
    expected = run(graph, INPUTS)["y"]
    path = tmp_path / "decoder.onnx"
    files.save(graph, path)
    assert {entry.name for entry in tmp_path.iterdir()} == (
        {path.name, "decoder.onnx_data"} if external else {path.name}
    )
    assert (path.stat().st_size < 10_000) == external
    np.testing.assert_array_equal(session(path), expected)
    loaded = files.load(path)
    np.testing.assert_array_equal(run(inlined(loaded), INPUTS)["y"], expected)
    assert files.weight_bytes(loaded) == files.weight_bytes(graph) == 4 * (600 * width + width * 4)


def inlined(graph: ir.Model) -> ir.Model:
    """Load the weights into memory, as a session over bytes needs them."""
    for value in graph.graph.initializers.values():
        if value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
    return graph


def test_weights_that_shrank_come_back_inline(tmp_path: Path) -> None:
    """A model that was loaded from external data and became small is one file, independent of the old data file."""
    files.save(model(500), tmp_path / "large.onnx")
    graph = files.load(tmp_path / "large.onnx")
    for name, array in {"w": numbers(600, 8, seed=1), "v": numbers(8, 4)}.items():
        graph.graph.initializers[name].const_value = ir.tensor(array, name=name)
        graph.graph.initializers[name].shape = ir.Shape(array.shape)
    other = tmp_path / "elsewhere"
    other.mkdir()
    files.save(graph, other / "small.onnx")
    os.remove(tmp_path / "large.onnx_data")
    expected = run(parse(TEXT, {"w": numbers(600, 8, seed=1), "v": numbers(8, 4)}), INPUTS)["y"]
    assert [entry.name for entry in other.iterdir()] == ["small.onnx"]
    np.testing.assert_array_equal(session(other / "small.onnx"), expected)


def test_small_part_of_an_external_model_stands_alone(tmp_path: Path) -> None:
    """A weight that is still in another data file is copied, so that no file refers to another folder."""
    files.save(model(500), tmp_path / "large.onnx")
    graph = files.load(tmp_path / "large.onnx")
    first = graph.graph.initializers["w"]
    first.const_value = ir.tensor(numbers(600, 8), name="w")
    second = graph.graph.initializers["v"]  # still external: 500 x 4 numbers, 8 kB
    assert isinstance(second.const_value, ir.ExternalTensor)
    kept = second.const_value.numpy().copy()
    other = tmp_path / "elsewhere"
    other.mkdir()
    files.save(graph, other / "part.onnx")
    (tmp_path / "large.onnx_data").unlink()
    proto = onnx.load(str(other / "part.onnx"))  # raises if it refers to a file that doesn't exist
    stored = {entry.name: onnx.numpy_helper.to_array(entry) for entry in proto.graph.initializer}
    np.testing.assert_array_equal(stored["v"], kept)


def test_scalars_and_shapes_stay_in_the_graph(tmp_path: Path) -> None:
    """Shape inference reads small tensors, so they stay inline even when the weights go to a file of their own."""
    text = "g (float[n, 600] x) => (float[m, 2, 250] y) { h = MatMul(x, w)\n y = Reshape(h, to) }"
    graph = parse(text, {"w": numbers(600, 500), "to": np.array([-1, 2, 250])})
    files.save(graph, tmp_path / "g.onnx")
    proto = onnx.load(str(tmp_path / "g.onnx"), load_external_data=False)
    places = {entry.name: entry.data_location == onnx.TensorProto.EXTERNAL for entry in proto.graph.initializer}
    assert places == {"w": True, "to": False}


def test_saving_leaves_the_model_usable(tmp_path: Path) -> None:
    """After saving, the same object can be changed and saved again somewhere else."""
    graph = model(500)
    files.save(graph, tmp_path / "first.onnx")
    os.remove(tmp_path / "first.onnx_data")
    files.save(graph, tmp_path / "second.onnx")
    np.testing.assert_array_equal(session(tmp_path / "second.onnx"), run(model(500), INPUTS)["y"])


def test_nodes_are_sorted_and_subgraph_weights_counted(tmp_path: Path) -> None:
    """Nodes are written in topological order, and a weight inside a subgraph counts."""
    graph = parse("g (float[n] x) => (float[n] y) { h = Neg(x)\n y = Abs(h) }")
    nodes = list(graph.graph)
    graph.graph.remove(nodes[0])
    graph.graph.append(nodes[0])
    files.save(graph, tmp_path / "g.onnx")
    assert [node.op_type for node in onnx.load(str(tmp_path / "g.onnx")).graph.node] == ["Neg", "Abs"]
    nested = parse(
        "g (float[n] x, bool c) => (float[n] y) { y = If (c) <"
        "then_branch = t () => (float[n] z) <float[3] inner = {1.0, 2.0, 3.0}> { z = Add(x, inner) },"
        "else_branch = e () => (float[n] z) { z = Neg(x) }> }"
    )
    assert files.weight_bytes(nested) == 12
    assert files.node_count(nested) == 3


def test_graphs_over_one_file_share_it_when_saved(tmp_path: Path) -> None:
    """Also weights that passes made of the same ones in the same way, but not those that only one graph changed."""
    files.save(model(500), tmp_path / "source.onnx")
    decode, prefill, other = graphs = [files.load(tmp_path / "source.onnx") for _ in range(3)]
    for graph in graphs:
        transpose(graph.graph.initializers["w"], (0, 1))  # no exchange, but another tensor
        transpose(graph.graph.initializers["w"], (0, 1))
    other.graph.initializers["v"].const_value = ir.tensor(numbers(500, 4, seed=5), name="v")
    expected = [run(inlined(graph.clone()), INPUTS)["y"] for graph in graphs]
    out = tmp_path / "out"
    out.mkdir()
    files.save(decode, out / "decode.onnx")
    files.save_sharing(prefill, out / "prefill.onnx", decode, out / "decode.onnx")
    files.save_sharing(other, out / "other.onnx", decode, out / "decode.onnx")
    for path in tmp_path.glob("source*"):
        path.unlink()
    assert {path.name for path in out.iterdir()} == {"decode.onnx", "decode.onnx_data", "prefill.onnx", "other.onnx"}
    assert (out / "prefill.onnx").stat().st_size < 4 * 500 * 4 < (out / "other.onnx").stat().st_size < 4 * 600 * 500
    for name, values in zip(("decode", "prefill", "other"), expected, strict=True):
        np.testing.assert_array_equal(session(out / f"{name}.onnx"), values)
    assert not np.array_equal(expected[0], expected[2])


def test_weights_made_in_other_ways_are_not_shared(tmp_path: Path) -> None:
    """The same weight transposed is another one, though dtype and shape are the same."""
    text = "g (float[n, 600] x) => (float[n, 600] y) { y = MatMul(x, w) }"
    files.save(parse(text, {"w": numbers(600, 600)}), tmp_path / "source.onnx")
    decode, prefill = (files.load(tmp_path / "source.onnx") for _ in range(2))
    transpose(prefill.graph.initializers["w"], (1, 0))
    out = tmp_path / "out"
    out.mkdir()
    files.save(decode, out / "decode.onnx")
    files.save_sharing(prefill, out / "prefill.onnx", decode, out / "decode.onnx")
    np.testing.assert_array_equal(stored_weight(out / "decode.onnx"), numbers(600, 600))
    np.testing.assert_array_equal(stored_weight(out / "prefill.onnx"), numbers(600, 600).T)


def stored_weight(path: Path) -> np.ndarray:
    """Return the weight `w` of the graph at `path`."""
    value = files.load(path).graph.initializers["w"].const_value
    assert value is not None
    return value.numpy()


def test_graphs_over_different_files_are_saved_by_themselves(tmp_path: Path) -> None:
    """Their weights are not compared, even if they are equal."""
    for name in ("decode", "prefill"):
        files.save(model(500), tmp_path / f"{name}.onnx")
    decode, prefill = (files.load(tmp_path / f"{name}.onnx") for name in ("decode", "prefill"))
    out = tmp_path / "out"
    out.mkdir()
    files.save(decode, out / "decode.onnx")
    files.save_sharing(prefill, out / "prefill.onnx", decode, out / "decode.onnx")
    (out / "decode.onnx_data").unlink()
    np.testing.assert_array_equal(session(out / "prefill.onnx"), run(model(500), INPUTS)["y"])
