"""ONNX Runtime sessions."""

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accel.errors import AccelError, unknown

try:
    import onnxruntime
except ImportError as error:
    raise AccelError(
        "ONNX Runtime (onnxruntime) is not installed. "
        "pip install one extra: accel[cpu], accel[cuda13], accel[cuda12] or accel[cuda11]"
    ) from error


@dataclass(frozen=True)
class SessionSettings:
    """How a session is opened. `session`: ONNX Runtime's configuration keys; `threads`: 0 for its default.

    `arena`: keep freed memory for the next run; without it, a run is slower and the process smaller.
    `fuse`: let ONNX Runtime rewrite the graph first, which copies what it folds.
    """

    provider: str = "CPUExecutionProvider"
    provider_options: Mapping[str, Any] = field(default_factory=dict)
    session: Mapping[str, str] = field(default_factory=dict)
    threads: int = 0
    arena: bool = True
    fuse: bool = True
    profile: str | None = None


def open_session(path: Path, settings: SessionSettings) -> onnxruntime.InferenceSession:
    """A session over the graph at `path`. The provider must be there: see `check_provider`."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = settings.threads
    if not settings.fuse:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = options.enable_mem_pattern = settings.arena
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


def check_provider(provider: str) -> None:
    """Raises `AccelError` if the provider isn't there, or if both wheels are: they overwrite each other's files."""
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _installed(name)]
    if len(installed) > 1:
        raise AccelError(
            f"{' and '.join(installed)} are both installed and overwrite each other's files; "
            "pip uninstall both, then install one extra: accel[cpu], accel[cuda13], accel[cuda12] or accel[cuda11]"
        )
    if provider not in available_providers():
        raise unknown("execution provider", provider, available_providers())


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def available_providers() -> list[str]:
    """The execution providers of the installed ONNX Runtime, best first."""
    providers: list[str] = onnxruntime.get_available_providers()
    return providers
