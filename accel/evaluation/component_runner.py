"""Runner of an architecture's components in sequence, each taking the outputs of those before it as inputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from accel.adapters.types import Architecture, Component, Signature
from accel.errors import AccelError
from accel.runtime.decoder_inputs import decoder_inputs

Run = Callable[[Component, Mapping[str, Tensor]], Mapping[str, Tensor]]
"""(component, named inputs) -> named outputs. PyTorch's and ONNX Runtime's are interchangeable."""


class ComponentRunner:
    """Components run in sequence. Keeps every value by name, so that caches always come from a run of prefill.

    Attributes:
        signatures: Signature of each component.
        run: Function that runs one component.
        values: Inputs and outputs of the calls so far, by name.
    """

    def __init__(self, signatures: Mapping[Component, Signature], run: Run) -> None:
        self.signatures = signatures
        self.run = run
        self.values: dict[str, Tensor] = {}

    def inputs(self, component: Component, caller_inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return all inputs of `component`: inputs with a `source` from earlier calls, the others from the caller.

        Raises:
            AccelError: If an input is missing.
        """
        inputs = {}
        for spec in self.signatures[component].inputs:
            name = spec.source or spec.name
            available = self.values if spec.source else caller_inputs
            if name not in available:
                origin = "values of earlier calls" if spec.source else "inputs from the caller"
                raise AccelError(
                    f"{component}: input {spec.name} needs {name!r}, which is missing from the {origin}: "
                    + ", ".join(sorted(available))
                )
            inputs[spec.name] = available[name]
        return inputs

    def __call__(self, component: Component, caller_inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Run `component` and keep its inputs and outputs for the calls that follow.

        Returns:
            The component's outputs by name.

        Raises:
            AccelError: If an input is missing.
        """
        inputs = self.inputs(component, caller_inputs)
        outputs = self.run(component, inputs)
        for name in inputs:
            if name in caller_inputs:
                self.values[name] = caller_inputs[name]
        self.values |= outputs
        return outputs

    def forget_past(self) -> None:
        """Crop the decoder's self-attention caches to length 0; keep the cross-attention caches."""
        for spec in self.signatures[Component.DECODE].inputs:
            for axis, name in spec.axes.items():
                if name == "past" and spec.source:
                    self.values[spec.source] = self.values[spec.source].narrow(axis, 0, 0)


def signatures(architecture: Architecture, config: PretrainedConfig) -> dict[Component, Signature]:
    """Return the signature of every component of `architecture`."""
    return {component: architecture.signature(config, component) for component in architecture.components()}


def torch_run(architecture: Architecture, model: PreTrainedModel) -> Run:
    """Return a function that runs components in PyTorch, through the wrappers that `export` traces.

    Returns:
        A function that raises `AccelError` if a wrapper returns another number of outputs than the signature lists.
    """
    wrappers: dict[Component, nn.Module] = {
        component: architecture.wrap(model, component) for component in architecture.components()
    }

    @torch.no_grad()
    def run(component: Component, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        result = wrappers[component](*inputs.values())
        outputs = result if isinstance(result, tuple) else (result,)
        names = [spec.name for spec in architecture.signature(model.config, component).outputs]
        if len(names) != len(outputs):
            raise AccelError(
                f"{component}: the architecture's signature lists {len(names)} outputs ({', '.join(names[:6])}, …), "
                f"but its wrapper {type(wrappers[component]).__name__} returned {len(outputs)}"
            )
        return dict(zip(names, outputs, strict=True))

    return run


@dataclass(frozen=True)
class Shape:
    """Sizes of the inputs of one run.

    Attributes:
        batch: Batch size.
        source: Tokens of the encoder's input, if there is an encoder.
        past: Tokens in the caches that decode starts from.
        new: Tokens that decode adds.
    """

    batch: int
    source: int
    past: int
    new: int

    def within(self, limit: int | None) -> "Shape":
        """Return this shape with lengths cut to `limit` positions; unchanged for None."""
        if limit is None:
            return self
        new = min(self.new, limit - 1)
        return Shape(self.batch, min(self.source, limit), min(self.past, limit - new), new)

    def __str__(self) -> str:
        return f"batch {self.batch}, source {self.source}, past {self.past}, new {self.new}"


def max_positions(config: PretrainedConfig) -> int | None:
    """Return the number of positions that a model supports, in tokens; None if its config sets no limit."""
    text = config.get_text_config(decoder=True)
    return getattr(text, "max_position_embeddings", None) or getattr(text, "max_target_positions", None)


def component_inputs(
    architecture: Architecture, config: PretrainedConfig, shape: Shape, generator: torch.Generator
) -> dict[Component, Mapping[str, Tensor]]:
    """Return random inputs that a caller gives each component.

    Prefill takes `shape.past` ids, at least one, and decode `shape.new` more. If `shape.past` is 0, the attention mask
    of decode covers the new ids alone.

    Args:
        architecture: Adapter of the model.
        config: The model's Hugging Face config.
        shape: Sizes of the inputs.
        generator: Source of random numbers.

    Returns:
        Component -> its named inputs, without those that earlier components make.
    """
    has_encoder = Component.ENCODER in architecture.components()
    prefix = max(shape.past, 1)
    sample_length = shape.source if has_encoder else prefix
    sample = dict(architecture.sample_inputs(config, shape.batch, sample_length, generator))
    vocabulary = config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(vocabulary, (shape.batch, prefix + shape.new), generator=generator)  # [B, prefix + new]
    mask = torch.ones(shape.batch, prefix, dtype=torch.int64)
    inputs: dict[Component, Mapping[str, Tensor]] = {}
    if has_encoder:
        inputs[Component.ENCODER] = sample
    else:
        ids[:, :prefix], mask = sample["input_ids"], sample["attention_mask"]
    inputs[Component.PREFILL] = decoder_inputs(ids[:, :prefix], mask)
    new_mask = torch.ones(shape.batch, shape.new, dtype=torch.int64)
    decode_mask = torch.cat([mask[:, prefix - shape.past :], new_mask], dim=1)  # [B, past + new]
    inputs[Component.DECODE] = decoder_inputs(ids[:, prefix:], decode_mask)
    return inputs
