"""ONNX Runtime sessions: their settings, how they are opened, and which graphs can be captured as CUDA graphs."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from accel.errors import AccelError
from accel.runtime.device_memory import translate_out_of_memory
from accel.runtime.providers import CPU, CUDA, RUNTIME_ERRORS, missing_library, onnxruntime
from accel.runtime.streams import stream_options
from accel.system.host_memory import drop_file_pages
from accel.system.process_state import environment

# Operators whose output shapes depend on the values of their inputs. https://onnx.ai/onnx/operators/
DATA_DEPENDENT = ("NonZero", "Compress", "Unique", "NonMaxSuppression", "Loop", "Scan", "If")
OPSET_TOO_NEW = "Current official support for domain"  # how the last part of ONNX Runtime's message begins
NoKernel = onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented
InvalidProtobuf = onnxruntime.capi.onnxruntime_pybind11_state.InvalidProtobuf

logger = logging.getLogger(__name__)


class RuntimeSettings(Protocol):
    """Fields of a runtime's config that concern its sessions: see `accel.config.schema.RuntimeConfig`."""

    provider: str
    provider_options: dict[str, Any]
    session: dict[str, str]
    environment: dict[str, str]
    threads: int


@dataclass(frozen=True)
class SessionSettings:
    """Settings that a session is opened with.

    Attributes:
        provider: ONNX Runtime's execution provider.
        provider_options: Its options, by ONNX Runtime's names.
        session: ONNX Runtime's session configuration entries.
        environment: Environment variables that ONNX Runtime reads while a session opens.
        threads: Threads of the session; 0 for ONNX Runtime's default.
        arena: Keep freed memory for the next run, and plan which values share memory. Without it a run is slower, the
            process takes less memory, and a graph of thousands of nodes opens in one second instead of twenty, because
            planning is quadratic in the number of nodes.
        fuse: Let ONNX Runtime optimise the graph when it opens it, which copies the weights that it folds.
        profile: Path prefix of the file that ONNX Runtime's profiler writes; None to run without profiler.
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
    def of(cls, runtime: RuntimeSettings, **changes: Any) -> "SessionSettings":
        """Return the settings in a runtime's config, with `changes` in place of single fields."""
        settings = cls(
            runtime.provider, runtime.provider_options, runtime.session, runtime.environment, runtime.threads
        )
        return replace(settings, **changes)


class Session(onnxruntime.InferenceSession):
    """Session that waits for the device before it is destroyed, and keeps shared weights alive.

    At the end of a run ONNX Runtime queues a callback that frees host memory. If the session is destroyed before the
    callback runs, CUDA ends the process (error 800, not permitted in a callback).

    Args:
        graph: Path or serialised model.
        options: ONNX Runtime's session options.
        provider: Name of the provider and its options.
        weights: Initializer -> OrtValue that the session reads in place of the file's data.

    Attributes:
        on_cuda: True if the session runs on the CUDA provider.
        capturable: True if `open_capturable` opened it and its runs can be captured as a CUDA graph.
        warm: True after its first run by `FixedCall.warm_up`.
    """

    on_cuda = False
    capturable = False
    warm = False

    def __init__(
        self,
        graph: str | bytes,
        options: onnxruntime.SessionOptions,
        provider: tuple[str, Any],
        weights: Mapping[str, Any],
    ) -> None:
        self.weights = weights  # kept alive: the session reads their memory
        for name, value in weights.items():
            options.add_initializer(name, value)
        super().__init__(graph, options, providers=[provider])
        self.on_cuda = CUDA in self.get_providers()

    def __del__(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()


def open_session(graph: Path | bytes, settings: SessionSettings, weights: Mapping[str, Any] | None = None) -> Session:
    """Open a session, on CUDA on the stream shared with torch.

    Args:
        graph: Path or serialised model.
        settings: Settings of the session. Their provider must be usable: see `check_provider`.
        weights: Initializer -> OrtValue, for weights that are in memory already: see `SharedWeights`.

    Returns:
        The session.

    Raises:
        DeviceMemoryError: The weights don't fit into device memory.
        AccelError: The provider's libraries can't be loaded, it has no kernel for an operator in the graph's precision,
            ONNX Runtime is older than the graph's operators, or the file is damaged.
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
    provider_options = {**settings.provider_options, **stream_options(settings.provider)}
    source = graph if isinstance(graph, bytes) else str(graph)
    try:
        with translate_out_of_memory(), environment(settings.environment):
            session = Session(source, options, (settings.provider, provider_options), weights or {})
    except NoKernel as error:
        reason = str(error).split(" : ")[-1].splitlines()[0]
        raise AccelError(f"{settings.provider} can't run this graph: {reason}. Try another precision") from error
    except InvalidProtobuf as error:
        raise AccelError(
            f"{source if isinstance(source, str) else 'the graph'} is damaged: it is no ONNX file"
        ) from error
    except RUNTIME_ERRORS as error:
        if OPSET_TOO_NEW not in str(error):
            raise
        name = graph.name if isinstance(graph, Path) else "the graph"
        limit = str(error)[str(error).index(OPSET_TOO_NEW) :].splitlines()[0]
        raise AccelError(f"onnxruntime {onnxruntime.__version__} is too old for {name}: {limit}") from error
    if isinstance(graph, Path) and settings.provider == CPU:
        # The session read the weights in order to pack them into memory of its own. Only tables are read from the file
        # from then on, a row at a time.
        drop_file_pages({graph.parent.resolve(), graph.resolve().parent})
    if settings.provider not in session.get_providers():  # ONNX Runtime silently falls back to the CPU
        raise AccelError(missing_library())
    return session


def open_capturable(graph: Path, settings: SessionSettings, weights: Mapping[str, Any] | None = None) -> Session:
    """Open a session whose runs can be captured as a CUDA graph; an ordinary one, with a warning, if they can't.

    The option `enable_cuda_graph` keeps ONNX Runtime from queueing host callbacks, which can't be captured. The capture
    itself is torch's: see `CudaGraphCallable`.
    https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html (`enable_cuda_graph`)

    Args:
        graph: Path of the ONNX file.
        settings: Settings of the session. For other providers than CUDA this is `open_session`.
        weights: Initializer -> OrtValue, for weights that are in memory already.

    Returns:
        The session; its attribute `capturable` tells which kind it is.

    Raises:
        AccelError: As `open_session`.
    """
    if settings.provider != CUDA:
        return open_session(graph, settings, weights)
    reason = capture_obstacle(graph)
    if reason:
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


def capture_obstacle(graph: Path) -> str | None:
    """Find a node whose work depends on values, or on host memory, so that a replay could give wrong results.

    Args:
        graph: Path of the ONNX file.

    Returns:
        The first such node and the reason; None if the runs of the graph can be captured.
    """
    import onnx  # here, as only a model that is captured needs it

    proto = onnx.load(graph, load_external_data=False).graph
    int64_weights = {tensor.name: tensor for tensor in proto.initializer if tensor.data_type == onnx.TensorProto.INT64}
    for node in proto.node:
        if any(attribute.HasField("g") for attribute in node.attribute):
            return f"node {node.name} ({node.op_type}) selects a subgraph at run time"
        if node.op_type in DATA_DEPENDENT:
            return f"node {node.name} ({node.op_type}) has an output shape that depends on its input's values"
        if node.op_type == "Split" and len(node.input) > 1 and node.input[1] in int64_weights:
            sizes = onnx.numpy_helper.to_array(int64_weights[node.input[1]]).tolist()
            if len(set(sizes)) > 1:
                return f"node {node.name} (Split) reads the sizes of unequal parts from host memory"
    return None


class HostSession:
    """Session called with tensors in host memory, by name. Outputs are copies.

    For calibration and checks, where memory use matters more than speed.

    Args:
        graph: Path or serialised model.
        settings: Settings of the session.
    """

    def __init__(self, graph: Path | bytes, settings: SessionSettings) -> None:
        self._session = open_session(graph, settings)
        self.inputs = [spec.name for spec in self._session.get_inputs()]
        self.outputs = [spec.name for spec in self._session.get_outputs()]

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the session.

        Args:
            inputs: Input -> tensor of the graph's dtype. Names that the graph doesn't take are ignored.

        Returns:
            Every output, on the CPU.

        Raises:
            KeyError: An input is missing.
        """
        arrays = {name: inputs[name].cpu().numpy() for name in self.inputs}
        values = self._session.run(None, arrays)
        return {name: torch.from_numpy(value) for name, value in zip(self.outputs, values, strict=True)}
