"""Opening of sessions, and detection of graphs that can't be captured."""

import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from accel.config.presets import runtime_preset
from accel.errors import AccelError
from accel.graph import files
from accel.graph.quantization.blocks import BlockFormat
from accel.graph.quantization.quantize_products import QuantizedWeights, QuantizeProducts
from accel.runtime import session
from accel.runtime.session import SessionSettings, capture_obstacle, open_session
from accel.system.host_memory import release, resident_data
from tests.graph.text import numbers, parse

DOUBLE = "g (float[n] x) => (float[n] y) { y = Add(x, x) }"


def test_environment_is_set_before_a_session_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime reads its environment variables while it creates the session."""
    name = "ACCEL_TEST_OF_A_SESSION"
    monkeypatch.setenv(name, "before")
    seen: list[str] = []
    opened = session.Session

    def record(*arguments: Any) -> Any:
        seen.append(os.environ[name])
        return opened(*arguments)

    monkeypatch.setattr(session, "Session", record)
    open_session(ir.to_proto(parse(DOUBLE)).SerializeToString(), SessionSettings(environment={name: "set"}))
    assert seen == ["set"]


def test_cudnn_attention_is_off_on_cuda() -> None:
    """cuDNN's attention builds a plan for every length, so the preset disables it."""
    assert SessionSettings.of(runtime_preset("cuda")).environment == {"ORT_ENABLE_CUDNN_FLASH_ATTENTION": "0"}


IF = """g (float[n] x, bool c) => (float[n] y) {
    y = If (c) <then_branch = t () => (float[n] z) { z = Neg(x) }, else_branch = e () => (float[n] z) { z = Abs(x) }>
}"""
ROUTED = "g (float[n] x) => (int64[1, m] y) { d = Add (x, x)\n y = NonZero (d) }"
CUT = "g (float[8] x) => (float[a] y, float[b] z) <int64[2] sizes = SIZES> { y, z = Split (x, sizes) }"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (DOUBLE, None),
        (IF, r"node .*\(If\) selects a subgraph at run time"),
        (ROUTED, r"node .*\(NonZero\) has an output shape that depends on"),
        (CUT.replace("SIZES", "{4, 4}"), None),
        (CUT.replace("SIZES", "{6, 2}"), r"node .*\(Split\) reads the sizes of unequal parts from host memory"),
    ],
    ids=["plain", "branches", "values", "even", "uneven"],
)
def test_capture_obstacles(tmp_path: Path, text: str, reason: str | None) -> None:
    """Obstacles are found before a session opens: a captured graph would replay the shapes of another input."""
    path = tmp_path / "text.onnx"
    path.write_bytes(ir.to_proto(parse(text)).SerializeToString())
    found = capture_obstacle(path)
    assert found is None if reason is None else re.search(reason, found or "")


def test_a_graph_too_new_for_onnx_runtime(tmp_path: Path) -> None:
    """One message names both versions, as for a static decode graph (opset 24) on an older ONNX Runtime."""
    model = parse(DOUBLE)
    model.opset_imports[""] = 99
    path = tmp_path / "new.onnx"
    path.write_bytes(ir.to_proto(model).SerializeToString())
    with pytest.raises(AccelError, match=r"onnxruntime \d.* is too old for new.onnx: .* till opset \d+"):
        open_session(path, SessionSettings())


@pytest.mark.skipif(sys.platform != "linux", reason="other systems don't tell what memory is mapped from")
def test_a_tied_table_is_held_once(tmp_path: Path) -> None:
    """The product reads a packed copy, lookups the file: its pages, read for the copy, are returned."""
    rows, features = 20000, 512
    table = numbers(rows, features)
    model = parse(
        """g (float[n, 512] x, int64[n] ids) => (float[n, 20000] y, float[n, 512] e)
        { e = Gather(v, ids)
         t = Transpose <perm: ints = [1, 0]> (v)
         y = MatMul(x, t) }""",
        {"v": table},
    )
    format = BlockFormat(8, 64)
    QuantizeProducts({"v": format}, QuantizedWeights())(model)
    files.save(model, tmp_path / "decoder.onnx")
    del model
    small = ir.to_proto(parse(DOUBLE)).SerializeToString()
    open_session(small, SessionSettings()).run(None, {"x": np.ones(1, np.float32)})
    release()
    before = resident_data()
    opened = open_session(tmp_path / "decoder.onnx", SessionSettings(threads=1))
    release()
    size = format.size(features, rows)
    assert size < resident_data() - before < 1.4 * size
    ids = np.array([3, 19999, 0])
    looked_up = opened.run(["e"], {"x": np.ones((3, features), np.float32), "ids": ids})[0]
    np.testing.assert_allclose(looked_up, table[ids], atol=0.02 * np.abs(table).max())
