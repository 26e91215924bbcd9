"""ONNX Runtime sessions."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import onnx
import torch
from torch import Tensor

from accel.errors import AccelError
from accel.runtime.device_memory import translate_out_of_memory
from accel.runtime.providers import CUDA, RUNTIME_ERRORS, missing_library, onnxruntime
from accel.runtime.streams import stream_options
from accel.system.process_state import environment

# Operators whose outputs' shapes depend on their inputs' values. https://onnx.ai/onnx/operators/
VALUES_DECIDE = ("NonZero", "Compress", "Unique", "NonMaxSuppression", "Loop", "Scan", "If")
TOO_NEW = "Current official support for domain"  # how ONNX Runtime's message on a newer opset ends
NoKernel = onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented

logger = logging.getLogger(__name__)


class Described(Protocol):
    """What a runtime's YAML says about its sessions."""

    provider: str
    provider_options: dict[str, Any]
    session: dict[str, str]
    environment: dict[str, str]
    threads: int


@dataclass(frozen=True)
class SessionSettings:
    """How a session is opened. `session`: ONNX Runtime's configuration keys; `environment`: variables that it reads
    when a session opens; `threads`: 0 for its default.

    `arena`: keep freed memory for the next run, and plan which values share it; without it, a run is slower, the
    process smaller, and a graph of thousands of nodes opens in a second instead of twenty: the plan is quadratic.
    `fuse`: let ONNX Runtime rewrite the graph first, which copies what it folds.
    """

    provider: str = "CPUExecutionProvider"
    provider_options: Mapping[str, Any] = field(default_factory=dict)
    session: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    threads: int = 0
    arena: bool = True
    fuse: bool = True
    profile: str | None = None

    @classmethod
    def of(cls, runtime: Described, **changes: Any) -> "SessionSettings":
        """As a runtime's YAML says, but for `changes`."""
        settings = cls(
            runtime.provider, runtime.provider_options, runtime.session, runtime.environment, runtime.threads
        )
        return replace(settings, **changes)


class Session(onnxruntime.InferenceSession):
    """A session that goes when the device has nothing left to do for it.

    At the end of a run ONNX Runtime queues giving host memory back. If that finds its session gone, the process ends
    (CUDA error 800, not permitted in a callback).
    """

    on_cuda = False
    capturable = False  # opened by `open_recordable`, and nothing was against it
    warm = False  # `FixedCall.warm_up` has run it

    def __init__(
        self,
        graph: str | bytes,
        options: onnxruntime.SessionOptions,
        provider: tuple[str, Any],
        weights: Mapping[str, Any],
    ) -> None:
        self.weights = weights  # they hold the memory that the session reads
        for name, value in weights.items():
            options.add_initializer(name, value)
        super().__init__(graph, options, providers=[provider])
        self.on_cuda = CUDA in self.get_providers()

    def __del__(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()


def open_session(graph: Path | bytes, settings: SessionSettings, weights: Mapping[str, Any] | None = None) -> Session:
    """A session over the graph at a path or in memory, on the stream it shares with torch if it is on CUDA.

    `weights`: initializers that it takes as they lie in memory, by name: see `runtime.weights`.

    The provider must be there: see `check_provider`. Raises `OutOfMemory` if the weights don't fit, `AccelError` if
    the provider's libraries can't be loaded, it has no kernel for an operator in the graph's precision, or ONNX Runtime
    is older than the graph's operators.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = settings.threads
    if not settings.fuse:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = options.enable_mem_pattern = options.enable_mem_reuse = settings.arena
    for key, value in settings.session.items():
        options.add_session_config_entry(key, value)
    if settings.profile:
        options.enable_profiling = True
        options.profile_file_prefix = settings.profile
    chosen = {**settings.provider_options, **stream_options(settings.provider)}
    source = graph if isinstance(graph, bytes) else str(graph)
    try:
        with translate_out_of_memory(), environment(settings.environment):
            session = Session(source, options, (settings.provider, chosen), weights or {})
    except NoKernel as error:
        reason = str(error).split(" : ")[-1].splitlines()[0]
        raise AccelError(f"{settings.provider} can't run this graph: {reason}. Another precision may do") from error
    except RUNTIME_ERRORS as error:
        if TOO_NEW not in str(error):
            raise
        name, limit = getattr(graph, "name", "this graph"), str(error)[str(error).index(TOO_NEW) :].splitlines()[0]
        raise AccelError(f"onnxruntime {onnxruntime.__version__} is too old for {name}: {limit}") from error
    if settings.provider not in session.get_providers():  # ONNX Runtime goes on without, on the CPU
        raise AccelError(missing_library())
    return session


def open_capturable(graph: Path, settings: SessionSettings, weights: Mapping[str, Any] | None = None) -> Session:
    """As `open_session`, for runs that are recorded as a CUDA graph: nothing that they queue calls the host back.

    Where the graph can't be recorded, a warning says why, and the session is an ordinary one.
    https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html (`enable_cuda_graph`)
    """
    if settings.provider != CUDA:
        return open_session(graph, settings, weights)
    if reason := obstacle(graph):
        logger.warning(f"{graph.name} is not captured: {reason}")
        return open_session(graph, settings, weights)
    options = {**settings.provider_options, "enable_cuda_graph": "1"}
    try:
        session = open_session(graph, replace(settings, provider_options=options), weights)
    except RUNTIME_ERRORS as error:
        if "graph capture" not in str(error):
            raise
        logger.warning(f"{graph.name} is not captured: {str(error).split(' : ')[-1].splitlines()[0]}")
        return open_session(graph, settings, weights)
    session.capturable = True
    return session


def obstacle(path: Path) -> str | None:
    """What keeps the runs of a graph from being recorded: the first node that looks at values or at host memory."""
    graph = onnx.load(path, load_external_data=False).graph
    lengths = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT64}
    for node in graph.node:
        if any(attribute.HasField("g") for attribute in node.attribute):
            return f"node {node.name} ({node.op_type}) chooses what to run"
        if node.op_type in VALUES_DECIDE:
            return f"node {node.name} ({node.op_type}) makes as much as its input's values say"
        sizes = lengths.get(node.input[1]) if node.op_type == "Split" and len(node.input) > 1 else None
        if sizes is not None and len(set(onnx.numpy_helper.to_array(sizes).tolist())) > 1:
            return f"node {node.name} (Split) reads the sizes of uneven parts from the host"
    return None


class HostSession:
    """A session called with tensors in host memory, by name. Outputs are copies.

    For checks and observation, where memory counts and speed doesn't. Inputs that the graph doesn't take are left out.
    """

    def __init__(self, graph: Path | bytes, settings: SessionSettings) -> None:
        self._session = open_session(graph, settings)
        self.inputs = [spec.name for spec in self._session.get_inputs()]
        self.outputs = [spec.name for spec in self._session.get_outputs()]

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run on `feeds` and return every output. Raises `KeyError` if an input is missing."""
        given = {name: inputs[name].cpu().numpy() for name in self.inputs}
        values = self._session.run(None, given)
        return {name: torch.from_numpy(value) for name, value in zip(self.outputs, values, strict=True)}
