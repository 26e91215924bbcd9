"""A decode step as the engine runs it: the plan of a static decode graph, bound to tensors at constant addresses."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from accel.engine.executor import Executor
from accel.engine.nodes import read_graph, value_specs
from accel.engine.planning.planner import plan

BATCH = "batch_size"  # axis of all inputs and outputs


class PlannedStep:
    """A decode step by the plan of its graph.

    Args:
        path: The static decode graph. Weights in its external data file are not read, but taken from `weights`.
        device: Device to run on.
        weights: Initializer -> tensor on that device, for all weights in external data files. None is copied.
        fixed: Inputs that have the same value at every step, and that value.

    Attributes:
        inputs: Input that isn't fixed -> what the graph says of it.
        outputs: The same for the outputs.
        plan: The plan.
        obstacle: Reason why steps can't be captured as a CUDA graph; None if they can.

    Raises:
        AccelError: The engine doesn't support an operator, an attribute or an element type, or a weight is missing.
    """

    def __init__(
        self, path: Path, device: torch.device, weights: Mapping[str, Tensor], fixed: Mapping[str, Tensor]
    ) -> None:
        inputs, self.outputs = value_specs(path)
        taken = {name: value for name, value in fixed.items() if name in inputs}
        axes = {name: spec.axes for name, spec in inputs.items()}
        self.plan = plan(read_graph(path, weights), axes, BATCH, taken)
        self.inputs = {name: spec for name, spec in inputs.items() if name not in taken}
        self._executor = Executor(self.plan.graph, device)
        self.obstacle = self._executor.obstacle

    def bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Callable[[], None]:
        """Return a call that computes a step over these tensors, by whatever runs the plan fastest.

        The first call with tensors of new shapes can't be captured, all others can where there is no `obstacle`.

        Args:
            inputs: Every input -> contiguous tensor of its dtype. Others are ignored.
            outputs: Every output -> contiguous tensor of its dtype. One that shares the memory of the cache input that
                the graph updates to it is updated in place.
        """
        return partial(self._run, dict(inputs), dict(outputs))

    def _run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Compute a step in torch, which runs any plan."""
        self._executor.run(inputs, outputs)
