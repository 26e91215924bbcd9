"""How sessions are opened."""

import os
from typing import Any

import onnx_ir as ir
import pytest

from accel.application import runtime_named
from accel.runtime import session
from accel.runtime.session import SessionSettings, open_session
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
    assert SessionSettings.of(runtime_named("cuda")).environment == {"ORT_ENABLE_CUDNN_FLASH_ATTENTION": "0"}
