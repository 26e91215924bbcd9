"""What computes decode steps over static caches: a session of ONNX Runtime, or the engine of fused operations."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from accel import progress
from accel.config.engines import AUTO, FUSED, ONNXRUNTIME
from accel.errors import AccelError, DeviceMemoryError
from accel.runtime.device_memory import translate_out_of_memory
from accel.runtime.dynamic_cache import PromptEngine
from accel.runtime.engine_choice import choose_engine
from accel.runtime.io_binding import BoundSession, FixedCall
from accel.runtime.layout import KEPT, DeployableFiles
from accel.runtime.streams import on_shared_stream
from accel.runtime.weights import SharedWeights

logger = logging.getLogger(__name__)

NOTABLE_S = 0.5  # seconds of a graph's first run from which on a message says so

Axes = tuple[int | str, ...]
"""Length of each axis, or its name where the length isn't fixed."""


class DecodeStep(Protocol):
    """A graph without subgraphs, ready to be bound to tensors.

    Attributes:
        engine: What computes it: `onnxruntime` or `fused`.
        device: Device of its tensors.
        inputs: Input -> its axes.
        outputs: Output -> its axes.
        capturable: Bound calls may be captured as a CUDA graph, after a first one that isn't.
    """

    engine: str
    device: torch.device
    inputs: Mapping[str, Axes]
    outputs: Mapping[str, Axes]
    capturable: bool

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of an input or output."""
        ...

    def bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Callable[[], None]:
        """Return a call that reads and writes these tensors, on the stream shared with ONNX Runtime's sessions.

        Args:
            inputs: Every input -> contiguous tensor of its dtype. Others are ignored.
            outputs: Every output -> contiguous tensor of its dtype. It may share the memory of an input, for a graph
                that updates it in place.

        Raises:
            DeviceMemoryError: The device is out of memory, here or in a call.
        """
        ...

    def reads_prefix(self, batch: int) -> bool:
        """Return whether a step of `batch` sequences reads only the cache entries that are written.

        Such a step takes no longer with longer caches. Others read all entries, and mask those that aren't written.
        """
        ...

    def bind_by_ancestry(
        self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], ancestry: Tensor
    ) -> Callable[[], None] | None:
        """Return a call as of `bind` that reads every cache entry from the row that computed it; None if it can't.

        Args:
            inputs: See `bind`.
            outputs: See `bind`.
            ancestry: That row, int32 [batch, bucket]: see `BeamAncestry`.
        """
        ...

    def prompt_engine(self, least_tokens: int) -> PromptEngine | None:
        """Return what computes whole prompts over the same weights; None if that is left to another session.

        Args:
            least_tokens: Number of tokens of all prompts from which on it does.
        """
        ...

    def check(self) -> None:
        """Raise `AccelError` if an earlier call is known to have failed on the device. Doesn't synchronise."""
        ...


class SessionStep:
    """Decode step, or another graph over the same tensors, by a session of ONNX Runtime. Implements `DecodeStep`.

    Args:
        session: The session.
    """

    engine = ONNXRUNTIME

    def __init__(self, session: BoundSession) -> None:
        self.session, self.device = session, session.device
        self.inputs: Mapping[str, Axes] = {name: tuple(spec.shape) for name, spec in session.inputs.items()}
        self.outputs: Mapping[str, Axes] = {name: tuple(spec.shape) for name, spec in session.outputs.items()}
        self.capturable = session.session.capturable

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of an input or output."""
        return self.session.dtype(name)

    def bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Callable[[], None]:
        """Return a call over these tensors: see `DecodeStep.bind`."""
        call = FixedCall(self.session, inputs, outputs)
        if self.capturable:
            start = time.perf_counter()
            call.warm_up()
            if (seconds := time.perf_counter() - start) > NOTABLE_S:
                progress.note(f"ONNX Runtime chose its kernels for a graph to be captured in {seconds:.1f} s")
        return call

    def reads_prefix(self, batch: int) -> bool:
        """Return False: attention in ONNX Runtime reads whole caches."""
        return False

    def bind_by_ancestry(
        self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], ancestry: Tensor
    ) -> Callable[[], None] | None:
        """Return None: a graph's attention reads each row's own caches."""
        return None

    def prompt_engine(self, least_tokens: int) -> PromptEngine | None:
        """Return None: a graph of one token has no prompts."""
        return None

    def check(self) -> None:
        """Do nothing: ONNX Runtime's calls raise their errors."""


class FusedStep:
    """Decode step by the fused engine, without a session of ONNX Runtime. Implements `DecodeStep`.

    Args:
        graph: Path of the static decode graph.
        weights: Its weights, shared with the sessions of the other graphs.
        capture: Calls are to be captured as CUDA graphs. If they can't be, a warning names the reason.
        open_bound: Opens a session of ONNX Runtime, for what the kernel can't run, such as more sequences.
        tune: Measure settings of the kernel: see `PlannedStep`.

    Raises:
        AccelError: The engine can't run the graph.
    """

    def __init__(
        self,
        graph: Path,
        weights: SharedWeights,
        capture: bool,
        open_bound: Callable[[Path], BoundSession],
        tune: bool = False,
    ) -> None:
        from accel.engine.step import PlannedStep  # here, as it brings onnx_ir and the planner along

        self.device = weights.device
        self._graph, self._open_bound = graph, open_bound
        self._session: SessionStep | None = None
        self.planned = PlannedStep(graph, self.device, weights.tensors(graph), {KEPT: torch.tensor([0])}, tune)
        on_cuda = self.device.type == "cuda"
        self.engine = ONNXRUNTIME if on_cuda and not self.planned.in_kernel(1) else FUSED  # of one sequence's steps
        specs = self.planned.inputs | self.planned.outputs
        self._dtypes = {name: spec.dtype for name, spec in specs.items()}
        axes = {name: tuple(axis for axis in spec.axes if axis is not None) for name, spec in specs.items()}
        self.inputs: Mapping[str, Axes] = {name: axes[name] for name in self.planned.inputs}
        self.outputs: Mapping[str, Axes] = {name: axes[name] for name in self.planned.outputs}
        obstacle = self.planned.obstacle
        self.capturable = capture and on_cuda and obstacle is None
        if capture and on_cuda and obstacle is not None:
            logger.warning(f"{graph.name} is not captured: {obstacle}")

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of an input or output."""
        return self._dtypes[name]

    def bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Callable[[], None]:
        """Return a call over these tensors: see `DecodeStep.bind`."""
        with self._on_stream():
            call = self.planned.bind(inputs, outputs)
        return self._bind_session(inputs, outputs) if call is None else self._on_shared_stream(call)

    def bind_by_ancestry(
        self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], ancestry: Tensor
    ) -> Callable[[], None] | None:
        """Return a call that reads entries from other rows, or None: see `DecodeStep.bind_by_ancestry`."""
        with self._on_stream():
            call = self.planned.bind_by_ancestry(inputs, outputs, ancestry)
        return None if call is None else self._on_shared_stream(call)

    def _on_shared_stream(self, call: Callable[[], object]) -> Callable[[], None]:
        """Return a call that runs `call` on the shared stream."""

        def run() -> None:
            with self._on_stream():
                call()

        return run

    def _bind_session(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Callable[[], None]:
        """Return a call over these tensors by a session of ONNX Runtime, opened when it is first needed."""
        if self._session is None:
            self._session = SessionStep(self._open_bound(self._graph))
        only_token = torch.zeros(1, dtype=torch.int64, device=self.device)
        return self._session.bind({KEPT: only_token, **inputs}, outputs)

    def reads_prefix(self, batch: int) -> bool:
        """Return whether the kernel computes such a step, not torch or a session of ONNX Runtime."""
        return self.planned.in_kernel(batch)

    def prompt_engine(self, least_tokens: int) -> PromptEngine | None:
        """Return what computes prompts by the plan; None on the CPU, and where the plan has what prompts haven't."""
        if self.device.type != "cuda":
            return None
        from accel.engine.planning.trace import NoMatchError
        from accel.engine.prefill.planned_prefill import PlannedPrefill

        try:
            planned = PlannedPrefill(self.planned.plan, self.device, least_tokens)
        except (NoMatchError, AccelError) as reason:
            logger.debug(f"prompts run on ONNX Runtime: {reason}")
            return None

        def run(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Mapping[str, Tensor]] | None:
            with self._on_stream():
                return planned(inputs)

        return run

    def check(self) -> None:
        """Raise `AccelError` if the kernel gave up: see `DecodeStep.check`."""
        self.planned.check()

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        """Work on the shared stream, with one error for all that say that memory ran out."""
        with on_shared_stream(self.device), translate_out_of_memory():
            yield


def open_decode_step(
    files: DeployableFiles,
    engine: str,
    weights: SharedWeights,
    capture: bool,
    open_bound: Callable[[Path], BoundSession],
    tune: bool = False,
) -> DecodeStep:
    """Open a static decode graph for an engine.

    Args:
        files: Files of the bundle or deployable, with the static decode graph.
        engine: One of `accel.config.engines.ENGINES`; `auto` is resolved by `engine_choice.choose_engine`. If it stands
            for `fused`, and that can't run the graph, a warning says why, and ONNX Runtime takes its place.
        weights: Its weights, shared with the sessions of the other graphs.
        capture: Steps are to be captured as CUDA graphs.
        open_bound: Opens a session of ONNX Runtime.
        tune: Let the fused engine measure settings of its kernel.

    Raises:
        AccelError: `engine=fused` can't run the graph, or not on this device.
        DeviceMemoryError: The device is out of memory.
    """
    graph = files.static_decode
    if choose_engine(engine, files, weights.device) == ONNXRUNTIME:
        return SessionStep(open_bound(graph))
    try:
        return FusedStep(graph, weights, capture, open_bound, tune)
    except DeviceMemoryError:
        raise
    except AccelError as error:
        if engine != AUTO:
            raise AccelError(f"runtime.engine={engine} can't run {graph.name}: {error}") from error
        logger.warning(
            f"runtime.engine={engine}: {FUSED} can't run {graph.name}, {ONNXRUNTIME} takes its place: {error}"
        )
        return SessionStep(open_bound(graph))
