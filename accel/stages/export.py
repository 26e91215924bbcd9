"""Export each component of the PyTorch model to ONNX, and compare the graphs with PyTorch at other shapes.

Reads:
    The checkpoint: config and weights.

Writes:
    `<component>.onnx` for each component, in FP32, and `<component>.onnx_data` where the weights are large. Prefill is
    derived from the trace of decode, not traced, and refers to the weights of decode: see
    `accel.stages.prefill_derivation`. Where layers differ in nothing but weights, only the first are traced: see
    `accel.stages.layer_tracing`.
"""

import inspect
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from accel import progress
from accel.adapters.types import Architecture, Component, Signature
from accel.config.schema import Config
from accel.errors import AccelError
from accel.evaluation.component_runner import (
    ComponentRunner,
    Shape,
    component_inputs,
    max_positions,
    signatures,
    torch_run,
)
from accel.evaluation.graph_comparison import SHAPES, TorchCall, compare, run_torch
from accel.evaluation.io_check import WRAPPER_ERRORS, check_specs
from accel.graph import files
from accel.graph.cleanup.widen_bfloat16 import WidenBfloat16
from accel.graph.decode.cross_caches import Shapes, with_cross_inputs, with_cross_outputs
from accel.graph.decode.without_past import without_past
from accel.graph.passes import NoMatchError
from accel.graph.repeat_layers import Stack
from accel.models.checkpoints import load_model
from accel.pipeline.stage import Stage, takes
from accel.pipeline.store import Artifact
from accel.runtime.decoder_inputs import positions
from accel.stages.layer_tracing import caches_by_layer, complete, find_stack, first_layers, without_layers
from accel.stages.prefill_derivation import PAST, cross_caches, prefill_follows, without_cross_caches
from accel.system.host_memory import release

logger = logging.getLogger(__name__)

# Every dimension of the example is at least 2, because the exporter freezes an axis of length 1, and no two are equal.
# The source is longer than two blocks of 16 tokens, into which some encoders cut it.
EXAMPLE = Shape(batch=2, source=37, past=7, new=3)


def example(
    runner: ComponentRunner, component: Component, caller_inputs: Mapping[Component, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the inputs of `component` for tracing, after running the components before it.

    Args:
        runner: Runs the components in PyTorch.
        component: The component to trace.
        caller_inputs: The inputs of each component that come from the caller, not from other components.

    Raises:
        AccelError: The architecture has no such component.
    """
    for earlier in runner.signatures:
        if earlier is component:
            return runner.inputs(component, caller_inputs[component])
        runner(earlier, caller_inputs[earlier])
    raise AccelError(f"unknown component: {component}. The architecture has: {', '.join(runner.signatures)}")


def export_component(wrapper: nn.Module, signature: Signature, inputs: Mapping[str, Tensor], opset: int) -> ir.Model:
    """Trace one component to an unoptimised ONNX graph.

    Args:
        wrapper: The component as a module: flat tensors in, flat tensors out.
        signature: Tensor specs, whose names the graph's inputs and outputs get.
        inputs: Example inputs, in the signature's order.
        opset: Version of the ONNX operator set.

    Raises:
        AccelError: The exporter returned no program.
    """
    axes: tuple[Any, ...] = tuple(dict(spec.axes) for spec in signature.inputs)
    parameters = inspect.signature(wrapper.forward).parameters.values()
    positional = sum(parameter.kind is not inspect.Parameter.VAR_POSITIONAL for parameter in parameters)
    if len(axes) > positional:  # the exporter describes the tensors that go into *past by a nested tuple
        axes = (*axes[:positional], axes[positional:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            wrapper,
            tuple(inputs.values()),
            opset_version=opset,
            dynamo=True,
            optimize=False,
            dynamic_shapes=axes,
            verbose=False,
        )
    if program is None:
        raise AccelError(f"torch.onnx.export returned no program for {type(wrapper).__name__}")
    model: ir.Model = program.model
    for value, spec in zip(model.graph.inputs, signature.inputs, strict=True):
        value.name = spec.name
    for value, spec in zip(model.graph.outputs, signature.outputs, strict=True):
        value.name = spec.name
    WidenBfloat16()(model)
    return model


def name_weights(graph: ir.Model, wrapper: nn.Module, model: PreTrainedModel) -> None:
    """Rename the initializers of `graph` to PyTorch's parameter names, also where modules share a parameter."""
    model_names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    wrapper_tensors: dict[str, Tensor] = dict(wrapper.named_parameters(remove_duplicate=False))
    wrapper_tensors.update(wrapper.named_buffers(remove_duplicate=False))
    for value in list(graph.graph.initializers.values()):
        tensor = wrapper_tensors.get(value.name or "")
        if tensor is not None and id(tensor) in model_names:
            value.name = model_names[id(tensor)]


def counts_positions_from_mask(model: PreTrainedModel) -> bool:
    """Return whether a decoder-only model, called without positions, counts only the tokens that the mask shows.

    Most models count every token; OPT, for one, skips padding. Found out by calling the model on a padded row.
    """
    if model.config.is_encoder_decoder:
        return False
    ids = torch.tensor([[5, 3, 7, 4, 6]], device=model.device)
    mask = torch.tensor([[0, 0, 1, 1, 1]], device=model.device)
    with torch.inference_mode():

        def last_logits(**options: Tensor) -> Tensor:
            logits: Tensor = model(input_ids=ids, attention_mask=mask, **options).logits[:, -1]
            return logits

        try:
            by_mask = last_logits(position_ids=positions(mask))
            by_place = last_logits(position_ids=torch.arange(5, device=model.device)[None])
        except TypeError:  # the model takes no positions
            return False
        default = last_logits()
    return bool((default - by_mask).abs().max() < (default - by_place).abs().max())


def _describe_cause(error: BaseException) -> str:
    """Return the type and first lines of the innermost cause, and the document that helps."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {' '.join(lines[:3])[:300]}"
    return f"{reason}\ndocs/when-yaml-is-not-enough.md shows how a wrapper avoids code that can't be traced"


@dataclass(frozen=True)
class Shortcuts:
    """Ways to trace less of a model.

    Attributes:
        shortens: Trace only the first layers where the others are like them; see `accel.stages.layer_tracing`.
        derives: Derive prefill from the trace of decode where one module computes both.
    """

    shortens: bool = True
    derives: bool = True


class Tracer:
    """Export of single components of a model into one folder.

    Attributes:
        nodes: Component -> number of nodes of the graphs written so far.
        derived: Whether prefill was derived.
        shortened: Components of which not all layers were traced, and their layers.
    """

    def __init__(
        self, config: Config, architecture: Architecture, model: PreTrainedModel, out: Path, shortcuts: Shortcuts
    ) -> None:
        self.config, self.architecture, self.model, self.out = config, architecture, model, out
        self.shortcuts = shortcuts
        self.nodes: dict[str, int] = {}
        self.derived = False
        self.shortened: dict[Component, Stack] = {}
        self._specs = signatures(architecture, model.config)
        self._cross = cross_caches(self._specs)
        generator = torch.Generator().manual_seed(config.export.seed)
        shape = EXAMPLE.within(max_positions(model.config))
        self._caller_inputs = component_inputs(architecture, model.config, shape, generator)
        self._runner = ComponentRunner(self._specs, torch_run(architecture, model))

    def trace_all(self) -> None:
        """Write the graph of every component."""
        derive = self.shortcuts.derives and prefill_follows(self.architecture, self.model)
        traced = [part for part in self.architecture.components() if part is not Component.PREFILL or not derive]
        for component in progress.track(traced, "tracing"):
            if derive and component is Component.DECODE:
                self.derived = self._trace_decoder()
            else:
                self.trace(component)

    def _trace_decoder(self) -> bool:
        """Write prefill and decode. Return whether one trace was enough for both."""
        if self._cross and self._trace_joint():
            return True
        self.trace(Component.DECODE)
        if not self._cross and self.derive_prefill({}):
            return True
        self.trace(Component.PREFILL)
        return False

    def _trace_joint(self) -> bool:
        """Trace decode so that it computes the cross-attention caches; write prefill and decode, derived from that.

        Both refer to the weights in the file of decode. Returns False if that isn't possible.
        """
        path, decode = self.out / f"{Component.DECODE}.onnx", self._specs[Component.DECODE]
        example_inputs = self._example(Component.DECODE)
        shapes: Shapes = {
            spec.name: [spec.axes.get(axis, length) for axis, length in enumerate(example_inputs[spec.name].shape)]
            for spec in decode.inputs
            if spec.name in self._cross
        }
        try:
            signature, inputs = without_cross_caches(decode, example_inputs, self._cross)
            files.save(self._graph(Component.DECODE, signature, inputs), path)
            graph = with_cross_inputs(files.load(path), shapes) if self.derive_prefill(shapes) else None
        except (NoMatchError, AccelError, *WRAPPER_ERRORS) as reason:
            logger.info(f"prefill is traced: decode doesn't compute the cross-attention caches: {reason}")
            graph = None
        if graph is None:
            self.shortened.pop(Component.DECODE, None)
            return False
        self._write(Component.DECODE, graph)
        return True

    def trace(self, component: Component) -> None:
        """Trace a component in PyTorch and write its graph."""
        graph = self._graph(component, self._specs[component], self._example(component))
        files.save(graph, self.out / f"{component}.onnx")
        self.nodes[str(component)] = files.node_count(graph)

    def _graph(self, component: Component, signature: Signature, inputs: Mapping[str, Tensor]) -> ir.Model:
        """Return the graph of a component, traced in PyTorch."""
        wrapper = self.architecture.wrap(self.model, component)
        graph = self._trace_first_layers(component, signature, wrapper, inputs) if self.shortcuts.shortens else None
        try:
            if graph is None:
                graph = export_component(wrapper, signature, inputs, self.config.export.opset)
        except torch.onnx.OnnxExporterError as error:
            model_class = type(self.model).__name__
            raise AccelError(
                f"export of {component}: torch can't trace {model_class}: {_describe_cause(error)}"
            ) from error
        name_weights(graph, wrapper, self.model)
        return graph

    def _trace_first_layers(
        self, component: Component, signature: Signature, wrapper: nn.Module, inputs: Mapping[str, Tensor]
    ) -> ir.Model | None:
        """Return the graph of a component of which only the first layers are traced; None where that isn't possible."""
        stack = find_stack(wrapper, self.model.config, inputs)
        if stack is None:
            return None
        outputs = {} if component is Component.ENCODER else self._specs[Component.DECODE].cache
        try:
            caches = caches_by_layer(signature, outputs, stack.total)
            shorter = without_layers(signature, caches[stack.traced :])
            example_inputs = {spec.name: inputs[spec.name] for spec in shorter.inputs}
            with first_layers(wrapper, stack):
                graph = export_component(wrapper, shorter, example_inputs, self.config.export.opset)
            complete(graph, wrapper, stack, caches)
        except (NoMatchError, ValueError, torch.onnx.OnnxExporterError) as reason:
            logger.info(f"all layers of {component} are traced: {reason}")
            return None
        self.shortened[component] = stack
        return graph

    def derive_prefill(self, shapes: Shapes) -> bool:
        """Write prefill's graph, over the weights of the decode graph's file; return False if it can't be derived.

        Args:
            shapes: Shapes of the cross-attention caches, which the decode graph computes; none without an encoder.
        """
        caches = [name for name in self._specs[Component.DECODE].cache if name not in self._cross]
        decode = files.load(self.out / f"{Component.DECODE}.onnx")
        try:
            graph = without_past(with_cross_outputs(decode, self._cross, shapes), caches, PAST)
        except NoMatchError as reason:
            logger.info(f"prefill is traced: it can't be derived from decode: {reason}")
            return False
        outputs = [spec.name for spec in self._specs[Component.PREFILL].outputs]
        ordered = sorted(graph.graph.outputs, key=lambda value: outputs.index(str(value.name)))
        graph.graph.outputs.clear()
        graph.graph.outputs.extend(ordered)
        self._write(Component.PREFILL, graph)
        return True

    def _write(self, component: Component, graph: ir.Model) -> None:
        """Write a derived graph, which refers to the weights of another graph's file."""
        files.save_graph(graph, self.out / f"{component}.onnx")
        self.nodes[str(component)] = files.node_count(graph)

    def _example(self, component: Component) -> dict[str, Tensor]:
        """Return the inputs to trace a component with."""
        return example(self._runner, component, self._caller_inputs)


@dataclass(frozen=True)
class Exported:
    """What is left of a model after its export, without the model itself.

    Attributes:
        shortcuts: Shortcuts that were allowed.
        nodes: Component -> number of nodes.
        shortened: Components of which not all layers were traced, and their layers.
        derived: Whether prefill was derived.
        calls: Component -> calls of it in PyTorch, to compare the graphs with.
        positions_from_mask: See `counts_positions_from_mask`.
    """

    shortcuts: Shortcuts
    nodes: Mapping[str, int]
    shortened: Mapping[Component, Stack]
    derived: bool
    calls: Mapping[Component, Sequence[TorchCall]]
    positions_from_mask: bool

    def fewer_shortcuts(self, reason: object) -> Shortcuts | None:
        """Return the shortcuts to try next, as the graphs differ from PyTorch for `reason`; None if none was taken."""
        if self.shortened:
            logger.info(f"all layers are traced: with the first ones alone, {reason}")
            return replace(self.shortcuts, shortens=False)
        if self.derived:
            logger.info(f"prefill is traced: derived from decode, {reason}")
            return replace(self.shortcuts, derives=False)
        return None


def export(config: Config, architecture: Architecture, checkpoint: Path, out: Path, shortcuts: Shortcuts) -> Exported:
    """Write the graph of every component of the model in the folder `checkpoint`, and run them in PyTorch."""
    model = load_model(checkpoint)
    limit = max_positions(model.config)
    check_specs(architecture, model, (EXAMPLE.within(limit), SHAPES[2].within(limit)), config.export.seed)
    tracer = Tracer(config, architecture, model, out, shortcuts)
    tracer.trace_all()
    return Exported(
        shortcuts,
        tracer.nodes,
        tracer.shortened,
        tracer.derived,
        run_torch(architecture, model, config.export.seed),
        counts_positions_from_mask(model),
    )


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Write the graph of every component. Return node counts and the largest differences from PyTorch."""
    checkpoint = inputs["checkpoint"].folder
    shortcuts, worst = Shortcuts(), None
    while worst is None:
        exported = export(config, architecture, checkpoint, out, shortcuts)
        release()  # PyTorch's model, before ONNX Runtime's are opened
        try:
            worst = compare(architecture, exported.calls, out, config.export.tolerance, partial(load_model, checkpoint))
        except AccelError as error:
            fewer = exported.fewer_shortcuts(error)
            if fewer is None:
                raise
            shortcuts = fewer
    return {
        "nodes": {str(component): exported.nodes[component] for component in architecture.components()},
        "worst_relative_difference": worst,
        "layers_traced": {str(part): f"{stack.traced} of {stack.total}" for part, stack in exported.shortened.items()},
        "positions_from_mask": exported.positions_from_mask,
    }


STAGE = Stage(
    name="export",
    run=run,
    inputs=takes("checkpoint"),
    sections=("export",),
    packages=("torch", "transformers", "onnx", "onnx-ir", "onnxscript"),
)
