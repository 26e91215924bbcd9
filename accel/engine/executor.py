"""Executor of a static decode graph in torch.

What a graph computes from constants runs once, when it is opened, and what it computes from the shapes of its inputs
once for these shapes. So a step launches only what depends on data, and reads nothing back from the device.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from accel.engine.nodes import SHAPE, Graph, Node
from accel.errors import AccelError

Values = dict[str, Tensor]
Call = Callable[..., Any]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Step:
    """A node that runs at every call.

    Attributes:
        call: Function of its inputs.
        inputs: Each a tensor that stays the same, the name of a value, or None if it is left out.
        outputs: Names of its outputs; empty for one that nothing reads.
        dead: Names of values that no later step reads.
    """

    call: Call
    inputs: tuple[Tensor | str | None, ...]
    outputs: tuple[str, ...]
    dead: tuple[str, ...]

    def run(self, values: Values) -> None:
        """Run the node, and drop the values that aren't read any more."""
        self.compute(values)
        self.drop(values)

    def compute(self, values: Values) -> None:
        """Run the node: take its inputs from `values`, and put its outputs there."""
        results = self.call(*[values[value] if isinstance(value, str) else value for value in self.inputs])
        for name, result in zip(self.outputs, results if isinstance(results, tuple) else (results,), strict=False):
            if name:
                values[name] = result

    def drop(self, values: Values) -> None:
        """Drop the values that no later step reads."""
        for name in self.dead:
            del values[name]


@dataclass(frozen=True)
class Program:
    """The steps of a graph for inputs of certain shapes.

    Attributes:
        steps: The steps in order.
        fixed: Outputs of the graph that don't depend on data.
    """

    steps: list[Step]
    fixed: Values


class Executor:
    """Executor of one graph. Threads may share it.

    Args:
        graph: The graph.
        device: Device to run on, which the weights among its constants are on.
        max_programs: Number of shapes that stay prepared, the latest ones; None for all, as captured runs need.

    Attributes:
        inputs: Input -> dtype.
        outputs: Names of the outputs.
        obstacle: Reason why runs can't be captured as a CUDA graph; None if they can, after a first run that is not
            captured, of inputs of the same shapes.

    Raises:
        AccelError: The engine doesn't support an operator, an attribute or an element type, or a weight is missing.
    """

    def __init__(self, graph: Graph, device: torch.device, max_programs: int | None = None) -> None:
        self._graph = graph
        self.device = device
        self.inputs, self.outputs, self.obstacle = self._graph.inputs, self._graph.outputs, self._graph.obstacle
        self._programs: dict[Any, Program] = {}
        self._max_programs = max_programs
        self._placed: Values = {}  # constants on the device
        self._caches = _caches(self._graph)
        self._nodes, self._constants = self._fold()
        self._dead = _dead(self._nodes, self._graph)

    def _fold(self) -> tuple[list[Node], Values]:
        """Run the nodes that have only constant inputs. Return the others, and the constants that they may read."""
        constants = dict(self._graph.constants)
        rest = []
        for node in self._graph.nodes:
            if all(name in constants for name in node.inputs if name) and node.inputs:
                constants.update(self._evaluate(node, constants))
            else:
                rest.append(node)
        needed = {name for node in rest for name in node.inputs} | set(self.outputs)
        return rest, {name: tensor for name, tensor in constants.items() if name in needed}

    @torch.no_grad()
    def run(self, feeds: Mapping[str, Tensor], outputs: Mapping[str, Tensor] | None = None) -> Values:
        """Run the graph.

        The first run with inputs of new shapes prepares the graph for them, which can't be captured.

        Args:
            feeds: Input -> tensor of its dtype, on the device.
            outputs: Output -> tensor to write it to. If it shares the memory of the cache input that the graph updates
                to this output, it is updated in place. Outputs that aren't named get memory of their own.

        Returns:
            Every output. The tensors of `outputs` are among them.

        Raises:
            AccelError: An input is missing or has another dtype, a node can't run on inputs of these shapes, or one of
                `outputs` has another name or shape.
        """
        targets = outputs or {}
        values = self._checked(feeds)
        in_place = frozenset(
            name for name, cache in self._caches.items() if name in targets and _same(values[cache], targets[name])
        )
        key = (tuple(tensor.shape for tensor in values.values()), in_place)
        program = self._programs.get(key)
        if program is None:
            program = self._programs[key] = self._prepare(values, in_place)
            if self._max_programs is not None and len(self._programs) > self._max_programs:
                self._programs.pop(next(iter(self._programs)), None)  # another thread may be as far
        else:
            for step in program.steps:
                step.run(values)
        results = {name: values[name] if name in values else program.fixed[name] for name in self.outputs}
        for name, target in targets.items():
            if name not in in_place:
                _copy_output(name, target, results)
            results[name] = target
        return results

    def _checked(self, feeds: Mapping[str, Tensor]) -> Values:
        """Return the inputs of the graph among `feeds`.

        Raises:
            AccelError: One is missing, or has another dtype or device.
        """
        values = {}
        for name, dtype in self.inputs.items():
            if name not in feeds:
                raise AccelError(f"the input {name!r} is missing. Inputs: {', '.join(self.inputs)}")
            tensor = feeds[name]
            if tensor.dtype is not dtype or tensor.device.type != self.device.type:
                raise AccelError(
                    f"the input {name!r} is of {tensor.dtype} on {tensor.device}, not of {dtype} on {self.device}"
                )
            values[name] = tensor
        return values

    def _prepare(self, values: Values, in_place: Collection[str]) -> Program:
        """Run the graph for the first time, and return the steps to repeat.

        Args:
            values: The inputs. At the end, the outputs are there.
            in_place: Outputs that share the memory of a cache input.
        """
        fixed = dict(self._constants)  # and what follows from the shapes
        placed: Values = {}
        runtime = self._graph.runtime
        steps = []
        dead: list[str] = []  # values that the nodes since the last step were the last to read
        for index, node in enumerate(self._nodes):
            dead += self._dead[index]
            if any(name in runtime for name in node.outputs):
                call = _call(node, in_place)
                inputs = tuple(self._argument(node, position, fixed, placed) for position in range(len(node.inputs)))
                step = Step(call, inputs, node.outputs, tuple(dead))
                dead.clear()
                _guarded(node, partial(step.compute, values))
                _check_outputs(node, values)
                step.drop(values)
                steps.append(step)
            else:
                fixed.update(self._evaluate(node, values if node.inputs[0] in runtime else fixed))
        return Program(steps, {name: self._place(name, fixed, placed) for name in self.outputs if name in fixed})

    def _argument(self, node: Node, position: int, fixed: Values, placed: Values) -> Tensor | str | None:
        """Return an input of a step: what is fixed is on the device, or on the CPU if it decides a shape."""
        name = node.inputs[position]
        if not name:
            return None
        if name in self._graph.runtime:
            return name
        return fixed[name].cpu() if position in node.operator.host else self._place(name, fixed, placed)

    def _place(self, name: str, fixed: Values, placed: Values) -> Tensor:
        """Return a fixed value on the device: a constant once for all shapes, others once for each."""
        store = self._placed if name in self._constants else placed
        if name not in store:
            store[name] = fixed[name].to(self.device)
        return store[name]

    def _evaluate(self, node: Node, values: Mapping[str, Tensor]) -> Values:
        """Run a node whose result doesn't depend on data: on the device if it reads a weight there, else on the CPU."""
        tensors = [values[name] if name else None for name in node.inputs]
        if node.kind == SHAPE:
            arguments: list[Tensor | None] = [torch.empty(()).expand(x.shape) for x in tensors if x is not None]
        else:
            host = node.operator.host
            devices = [x.device for index, x in enumerate(tensors) if x is not None and index not in host]
            device = next((device for device in devices if device != CPU), CPU)
            arguments = [
                None if x is None else x.to(CPU if index in host else device) for index, x in enumerate(tensors)
            ]
        results = _guarded(node, partial(_call(node, ()), *arguments))
        outputs = zip(node.outputs, results if isinstance(results, tuple) else (results,), strict=False)
        made = {name: result for name, result in outputs if name}
        _check_outputs(node, made)
        return made


def _call(node: Node, in_place: Collection[str]) -> Call:
    """Return a function of a node's inputs, which writes into copies except where an output is in `in_place`."""
    call: Call = partial(node.operator.function, **node.attributes)
    copied = {index for index, output in node.operator.writes.items() if node.outputs[output] not in in_place}
    return partial(_on_copies, call, copied) if copied else call


def _on_copies(call: Call, copied: Collection[int], *inputs: Tensor | None) -> Any:
    """Call a function on copies of the inputs at the indices `copied`."""
    return call(
        *(
            each.clone(memory_format=torch.contiguous_format) if index in copied and each is not None else each
            for index, each in enumerate(inputs)
        )
    )


def _same(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors are the same memory in the same layout."""
    return first.data_ptr() == second.data_ptr() and first.shape == second.shape and first.stride() == second.stride()


def _copy_output(name: str, target: Tensor, results: Values) -> None:
    """Copy an output to the tensor that was given for it."""
    if name not in results:
        raise AccelError(f"there is no output {name!r}. Outputs: {', '.join(results)}")
    if target.shape != results[name].shape:
        raise AccelError(f"the output {name!r} has the shape {list(results[name].shape)}, not {list(target.shape)}")
    target.copy_(results[name])


def _guarded(node: Node, run: Callable[[], Any]) -> Any:
    """Run a node, and name it in the error if torch refuses its inputs."""
    try:
        return run()
    except torch.cuda.OutOfMemoryError:
        raise
    except AccelError as error:
        raise AccelError(f"node {node.name}: {error}") from error
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise AccelError(f"node {node.name} can't run: {str(error).splitlines()[0]}") from error


def _check_outputs(node: Node, values: Mapping[str, Tensor | None]) -> None:
    """Raise `AccelError` if an operator's function doesn't make an output that the graph reads."""
    for index, name in enumerate(node.outputs):
        if name and values.get(name) is None:
            raise AccelError(f"node {node.name}: output {index} ({name}) is not supported")


def _caches(graph: Graph) -> dict[str, str]:
    """Return the outputs that a node writes into an input of the graph, which no other node reads: output -> input."""
    readers = Counter(name for node in graph.nodes if node.kind != SHAPE for name in node.inputs)
    return {
        node.outputs[output]: node.inputs[index]
        for node in graph.nodes
        for index, output in node.operator.writes.items()
        if node.outputs[output] in graph.outputs
        and node.inputs[index] in graph.inputs
        and node.inputs[index] not in graph.outputs
        and readers[node.inputs[index]] == 1
    }


def _dead(nodes: list[Node], graph: Graph) -> list[list[str]]:
    """Return, for each node, the values computed at run time that no later node reads and the graph doesn't return."""
    last: dict[str, int] = {}
    for index, node in enumerate(nodes):
        for name in (*node.inputs, *node.outputs):
            if name in graph.runtime:
                last[name] = index
    dead: list[list[str]] = [[] for _ in nodes]
    for name, index in last.items():
        if name not in graph.outputs:
            dead[index].append(name)
    return dead
