"""ONNX Runtime sessions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor


@dataclass(frozen=True)
class SessionSettings:
    """How a session is opened. `session`: ONNX Runtime's configuration keys; `threads`: 0 for its default."""

    provider: str = "CPUExecutionProvider"
    provider_options: Mapping[str, Any] = field(default_factory=dict)
    session: Mapping[str, str] = field(default_factory=dict)
    threads: int = 0
    profile: str | None = None


def open_session(path: Path, settings: SessionSettings) -> onnxruntime.InferenceSession:
    """A session over the graph at `path`."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = settings.threads
    for key, value in settings.session.items():
        options.add_session_config_entry(key, value)
    if settings.profile:
        options.enable_profiling = True
        options.profile_file_prefix = settings.profile
    providers = [(settings.provider, dict(settings.provider_options))]
    return onnxruntime.InferenceSession(str(path), options, providers=providers)


def plain_run(
    paths: Mapping[Any, Path], settings: SessionSettings | None = None
) -> Callable[[Any, Mapping[str, Tensor]], dict[str, Tensor]]:
    """A function that runs the graph of a role on tensors in host memory, one session open at a time.

    For checks, where memory counts and speed doesn't: outputs are copies.
    """
    opened: dict[Any, onnxruntime.InferenceSession] = {}

    def run(role: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if role not in opened:
            opened.clear()
            opened[role] = open_session(paths[role], settings or SessionSettings())
        session = opened[role]
        wanted = {port.name for port in session.get_inputs()}
        values = session.run(None, {name: value.cpu().numpy() for name, value in inputs.items() if name in wanted})
        return {port.name: torch.from_numpy(value) for port, value in zip(session.get_outputs(), values, strict=True)}

    return run


def available_providers() -> list[str]:
    """The execution providers of the installed ONNX Runtime, best first."""
    providers: list[str] = onnxruntime.get_available_providers()
    return providers
