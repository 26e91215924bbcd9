"""A decode step as the engine runs it: the plan of a static decode graph, bound to tensors at constant addresses."""

import logging
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from accel.engine.executor import Executor
from accel.engine.kernel import tuning
from accel.engine.kernel.launch import Kernel, settings_for, unsupported
from accel.engine.kernel.limits import check_rows, weights_dtype
from accel.engine.kernel.placement import NotRunnableError
from accel.engine.kernel.program import Builder, Program, split
from accel.engine.kernel.watchdog import Watchdog
from accel.engine.nodes import read_graph, value_specs
from accel.engine.planning.ancestry import ANCESTRY, by_ancestry
from accel.engine.planning.plan import DOMAIN, Plan
from accel.engine.planning.planner import plan
from accel.engine.planning.trace import NoMatchError
from accel.errors import AccelError

logger = logging.getLogger(__name__)

BATCH = "batch_size"  # axis of all inputs and outputs
BUCKET = "bucket"  # axis of caches and masks: the number of positions that a row may have


class PlannedStep:
    """A decode step by the plan of its graph.

    Args:
        path: The static decode graph. Weights in its external data file are not read, but taken from `weights`.
        device: Device to run on.
        weights: Initializer -> tensor on that device, for all weights in external data files. None is copied.
        fixed: Inputs that have the same value at every step, and that value.
        tune: On a GPU, measure settings of the kernel for each number of rows and length of caches that isn't known
            from earlier measurements, before its first step. It takes up to 30 s and overwrites the bound tensors.

    Attributes:
        inputs: Input that isn't fixed -> what the graph says of it.
        outputs: The same for the outputs.
        plan: The plan.
        obstacle: Reason why steps can't be captured as a CUDA graph; None if they can.

    Raises:
        AccelError: The device is a GPU that can't run the kernel, the engine doesn't support an operator, an attribute
            or an element type, or a weight is missing.
    """

    def __init__(
        self,
        path: Path,
        device: torch.device,
        weights: Mapping[str, Tensor],
        fixed: Mapping[str, Tensor],
        tune: bool = False,
    ) -> None:
        if device.type == "cuda" and (reason := unsupported(device)) is not None:
            raise AccelError(reason)
        inputs, self.outputs = value_specs(path)
        taken = {name: value for name, value in fixed.items() if name in inputs}
        axes = {name: spec.axes for name, spec in inputs.items()}
        self.plan = plan(read_graph(path, weights), axes, BATCH, taken)
        self.inputs = {name: spec for name, spec in inputs.items() if name not in taken}
        self._executor = Executor(self.plan.graph, device)
        self.obstacle = self._executor.obstacle
        self._device = device
        self._kernel_weights: dict[str, Tensor] = {}  # as the kernel reads them, for all sets of buffers
        self._watchdog: Watchdog | None = None  # of all sets of buffers
        self._warned, self._tune = False, tune
        self._obstacles: dict[int, str | None] = {}  # number of rows -> why the kernel can't run them

    def in_kernel(self, rows: int) -> bool:
        """Return whether the kernel computes steps of so many rows, as far as is known before tensors are bound.

        Only the kernel reads no more of a cache than is written: torch and ONNX Runtime read all of it at each step.
        """
        if rows not in self._obstacles:
            self._obstacles[rows] = self._kernel_obstacle(rows)
        return self._device.type == "cuda" and self._obstacles[rows] is None

    def _kernel_obstacle(self, rows: int) -> str | None:
        """Return the reason why the kernel can't run the plan over any tensors of so many rows; None without one."""
        try:
            check_rows(rows)
            weights_dtype(self.plan, split(self.plan)[1])
        except NotRunnableError as error:
            return str(error)
        return None

    def bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Callable[[], object] | None:
        """Return a call that computes a step over these tensors: by the kernel on a GPU, else by torch.

        None, and once a warning with the reason, if the kernel can't.

        The first call with tensors of new shapes can't be captured, all others can where there is no `obstacle`.

        Args:
            inputs: Every input -> contiguous tensor of its dtype. Others are ignored.
            outputs: Every output -> contiguous tensor of its dtype. One that shares the memory of the cache input that
                the graph updates to it is updated in place.
        """
        if self._device.type == "cuda":
            try:
                return self._by_kernel(self.plan, inputs, outputs)
            except NotRunnableError as reason:
                if not self._warned:
                    logger.warning(f"decode steps run on ONNX Runtime, slower than in the kernel: {reason}")
                self._warned = True
                self._obstacles[len(next(iter(inputs.values())))] = str(reason)
                return None
        return partial(self._executor.run, dict(inputs), dict(outputs))

    def bind_by_ancestry(
        self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], ancestry: Tensor
    ) -> Callable[[], object] | None:
        """Return a call as of `bind` that reads every cache entry from the row that computed it; None if it can't.

        Args:
            inputs: See `bind`.
            outputs: See `bind`.
            ancestry: That row, int32 [batch, bucket]: see `BeamAncestry`.
        """
        inputs = {**inputs, ANCESTRY: ancestry}
        try:
            if self._device.type == "cuda":
                return self._by_kernel(by_ancestry(self.plan), inputs, outputs)
            return partial(self._beam_executor.run, inputs, dict(outputs))
        except (NoMatchError, NotRunnableError) as reason:
            logger.debug(f"beams are reordered by copies: {reason}")
            return None

    @cached_property
    def _beam_executor(self) -> Executor:
        """Executor of the plan that reads entries by ancestry; raises `NoMatchError` if there is no such plan."""
        return Executor(by_ancestry(self.plan).graph, self._device)

    def _by_kernel(self, plan: Plan, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Callable[[], None]:
        """Return a call that computes a step by the kernel, and what the kernel doesn't compute in torch before it.

        Raises:
            NotRunnableError: The kernel can't run the plan.
        """
        self._watchdog = self._watchdog or Watchdog(self._device)
        blocks = torch.cuda.get_device_properties(self._device).multi_processor_count
        rows, positions = len(next(iter(inputs.values()))), self._positions(inputs)
        watchdog = self._watchdog

        def build(settings: tuning.Tuning) -> Builder:
            tensors = {**inputs, **outputs}
            return Builder(plan, tensors, rows, self._device, self._kernel_weights, blocks, settings, positions)

        def seconds(settings: tuning.Tuning) -> float:
            program = build(settings).program
            _fill_caches(program, inputs)
            return tuning.launch_seconds(Kernel(program, self._device, watchdog), self._device)

        builder = build(tuning.DEFAULT)
        tune = self._tune and plan is self.plan  # launches to time would write into the generation whose beams begin
        settings = settings_for(builder.program, self._device, seconds if tune else None)
        if settings != tuning.DEFAULT:
            builder = build(settings)
        kernel = Kernel(builder.program, self._device, watchdog)

        def call() -> None:
            builder.run_before()
            kernel()

        return call

    def _positions(self, inputs: Mapping[str, Tensor]) -> int:
        """Return the number of positions that a row of these inputs may have; 0 if no input says so."""
        sizes = [
            inputs[name].shape[axis]
            for name, spec in self.inputs.items()
            for axis, symbol in enumerate(spec.axes)
            if symbol == BUCKET
        ]
        return max(sizes, default=0)

    def check(self) -> None:
        """Raise `AccelError` if the kernel waited in vain for an input; else return without synchronisation."""
        index = None if self._watchdog is None else self._watchdog.gave_up()
        if index is None:
            return
        names = [node.name for node in self.plan.graph.nodes if node.kind[0] == DOMAIN]
        raise AccelError(f"the fused engine waited in vain for the input of {names[index]}: its results are wrong")


def _fill_caches(program: Program, inputs: Mapping[str, Tensor]) -> None:
    """Let the kernel's launches be at the last position of its caches, where attention reads all of them."""
    longest = max((operation.length for operation in program.operations), default=0)
    for tensor in inputs.values():
        if tensor.data_ptr() == program.position:
            tensor.fill_(longest - 1)
