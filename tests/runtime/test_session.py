"""How sessions are opened."""

import os
import re
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from accel.config.presets import runtime_preset
from accel.errors import AccelError
from accel.runtime import session
from accel.runtime.session import SessionSettings, obstacle, open_session
from tests.graph.text import parse

DOUBLE = "g (float[n] x) => (float[n] y) { y = Add(x, x) }"


def test_environment_stands_before_a_session_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime reads its variables while it makes the session: later is too late."""
    name = "ACCEL_TEST_OF_A_SESSION"
    monkeypatch.setenv(name, "before")
    seen: list[str] = []
    opened = session.Session

    def noted(*given: Any) -> Any:
        seen.append(os.environ[name])
        return opened(*given)

    monkeypatch.setattr(session, "Session", noted)
    open_session(ir.to_proto(parse(DOUBLE)).SerializeToString(), SessionSettings(environment={name: "set"}))
    assert seen == ["set"]


def test_no_plan_for_every_length_on_cuda() -> None:
    """The runtime's YAML switches off the attention that makes one."""
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
        (IF, r"node .*\(If\) chooses what to run"),
        (ROUTED, r"node .*\(NonZero\) makes as much as"),
        (CUT.replace("SIZES", "{4, 4}"), None),
        (CUT.replace("SIZES", "{6, 2}"), r"node .*\(Split\) reads the sizes of uneven parts from the host"),
    ],
    ids=["plain", "branches", "values", "even", "uneven"],
)
def test_what_keeps_a_graph_from_being_recorded(tmp_path: Path, text: str, reason: str | None) -> None:
    """Named before a session opens: recorded all the same, it would replay the shapes of another input."""
    path = tmp_path / "text.onnx"
    path.write_bytes(ir.to_proto(parse(text)).SerializeToString())
    found = obstacle(path)
    assert found is None if reason is None else re.search(reason, found or "")


def test_a_graph_too_new_for_onnx_runtime(tmp_path: Path) -> None:
    """As a static step is for one that knows no opset 24: one message with both versions."""
    model = parse(DOUBLE)
    model.opset_imports[""] = 99
    path = tmp_path / "new.onnx"
    path.write_bytes(ir.to_proto(model).SerializeToString())
    with pytest.raises(AccelError, match=r"onnxruntime \d.* is too old for new.onnx: .* till opset \d+"):
        open_session(path, SessionSettings())
