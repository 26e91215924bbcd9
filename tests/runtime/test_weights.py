"""External weights are read from the graph's folder only, by accel's own reader and by ONNX Runtime."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from accel.errors import AccelError
from accel.runtime.providers import RUNTIME_ERRORS
from accel.runtime.session import SessionSettings, open_session
from accel.runtime.weights import SharedWeights

SECRET = np.arange(8, dtype=np.float32)


def graph_over(folder: Path, location: str) -> Path:
    """Write a graph that adds a weight of 8 numbers, which is in the file `location`."""
    folder.mkdir(parents=True, exist_ok=True)
    weight = onnx.TensorProto(name="weight", data_type=onnx.TensorProto.FLOAT, dims=[8])
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "32")):
        weight.external_data.add(key=key, value=value)
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [8]) for name in "xy"]
    node = onnx.helper.make_node("Add", ["x", "weight"], ["y"])
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    path = folder / "graph.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def load(graph: Path) -> np.ndarray:
    """Return the weight as accel reads it."""
    return SharedWeights(torch.device("cpu")).initializers(graph)["weight"].numpy()


def test_tensors_share_the_memory_of_initializers(tmp_path: Path) -> None:
    """What runs graphs in torch reads the same copy as ONNX Runtime's sessions."""
    (tmp_path / "weights.bin").write_bytes(SECRET.tobytes())
    graph, weights = graph_over(tmp_path, "weights.bin"), SharedWeights(torch.device("cpu"))
    tensors, values = weights.tensors(graph), weights.initializers(graph)
    assert torch.equal(tensors["weight"], torch.from_numpy(SECRET))
    assert {name: tensor.data_ptr() for name, tensor in tensors.items()} == {"weight": values["weight"].data_ptr()}


def test_inside(tmp_path: Path) -> None:
    """A data file beside the graph, or in a subfolder, is read."""
    for location in ("graph.onnx.data", "data/weights"):
        graph = graph_over(tmp_path, location)
        (tmp_path / location).parent.mkdir(exist_ok=True)
        SECRET.tofile(tmp_path / location)
        assert load(graph).tolist() == SECRET.tolist()
        open_session(graph, SessionSettings())


@pytest.mark.parametrize("kind", ["parent", "absolute", "inner parent", "link"])
def test_outside(tmp_path: Path, kind: str) -> None:
    """Neither reader leaves the folder, by whatever kind of path."""
    folder = tmp_path / "model"
    secret = tmp_path / "secret"
    SECRET.tofile(secret)
    location = {"parent": "../secret", "absolute": str(secret), "inner parent": "a/../../secret", "link": "link"}[kind]
    graph = graph_over(folder, location)
    (folder / "a").mkdir()
    if kind == "link":
        (folder / "link").symlink_to(secret)
    with pytest.raises(AccelError, match="outside its folder"):
        load(graph)
    with pytest.raises((AccelError, *RUNTIME_ERRORS)):
        open_session(graph, SessionSettings())


def test_links_of_the_hub(tmp_path: Path) -> None:
    """In the hub's cache, graph and data file are links to files that are beside each other."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    graph = graph_over(blobs, "graph.onnx.data")
    graph.rename(blobs / "1234")
    SECRET.tofile(blobs / "5678")
    for name, blob in (("graph.onnx", "1234"), ("graph.onnx.data", "5678")):
        (snapshot / name).symlink_to(os.path.relpath(blobs / blob, snapshot))
    assert load(snapshot / "graph.onnx").tolist() == SECRET.tolist()


@pytest.mark.parametrize("content", [None, b"", b"\0" * 31])
def test_missing_or_short(tmp_path: Path, content: bytes | None) -> None:
    """A data file that is missing or too short is named."""
    graph = graph_over(tmp_path, "graph.onnx.data")
    if content is not None:
        (tmp_path / "graph.onnx.data").write_bytes(content)
    with pytest.raises(AccelError, match=r"graph\.onnx\.data"):
        load(graph)
