"""Runs the roles of an architecture one after the other, each fed by the outputs of those before it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from accel.adapters.types import Architecture, Component, Signature
from accel.errors import AccelError
from accel.runtime.decoder_inputs import decoder_inputs

Run = Callable[[Component, Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Runs one role: named inputs -> named outputs. PyTorch's and ONNX Runtime's are interchangeable."""


class ComponentRunner:
    """Holds every value seen so far by name, so that caches come from running prefill and are never invented."""

    def __init__(self, signatures: Mapping[Component, Signature], run: Run) -> None:
        self.signatures = signatures
        self.run = run
        self.pool: dict[str, Tensor] = {}

    def inputs(self, component: Component, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All inputs of `role`: those in `given`, the rest from the values seen so far.

        Raises `AccelError` on an input that neither holds.
        """
        found = {}
        for spec in self.signatures[component].inputs:
            values, name = (self.pool, spec.source) if spec.source else (given, spec.name)
            if name not in values:
                raise AccelError(
                    f"{component}: input {spec.name} takes {name!r}, which is not there. "
                    + ("Made so far: " if spec.source else "A caller may give: ")
                    + ", ".join(sorted(values))
                )
            found[spec.name] = values[name]
        return found

    def __call__(self, component: Component, given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Run `role`; its inputs and outputs become available to the next one."""
        inputs = self.inputs(component, given)
        outputs = self.run(component, inputs)
        self.pool |= {name: given[name] for name in inputs if name in given}
        self.pool |= outputs
        return outputs

    def forget_past(self) -> None:
        """Crop the decoder's own caches to length 0; those of the encoder stay."""
        for spec in self.signatures[Component.DECODE].inputs:
            for axis, name in spec.axes.items():
                if name == "past" and spec.source:
                    self.pool[spec.source] = self.pool[spec.source].narrow(axis, 0, 0)


def signatures(architecture: Architecture, config: PretrainedConfig) -> dict[Component, Signature]:
    """The signature of every role of `architecture`."""
    return {component: architecture.signature(config, component) for component in architecture.components()}


def torch_run(architecture: Architecture, model: PreTrainedModel) -> Run:
    """Runs roles in PyTorch, through the very wrappers that are exported.

    Raises `AccelError` where a wrapper's outputs are not those that the signature names.
    """
    wrappers: dict[Component, nn.Module] = {
        component: architecture.wrap(model, component) for component in architecture.components()
    }

    @torch.no_grad()
    def run(component: Component, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        made = wrappers[component](*inputs.values())
        outputs = made if isinstance(made, tuple) else (made,)
        names = [spec.name for spec in architecture.signature(model.config, component).outputs]
        if len(names) != len(outputs):
            raise AccelError(
                f"{component}: the architecture names {len(names)} outputs ({', '.join(names[:6])}, …), its wrapper "
                f"{type(wrappers[component]).__name__} gave {len(outputs)}"
            )
        return dict(zip(names, outputs, strict=True))

    return run


@dataclass(frozen=True)
class Shape:
    """Lengths of one check: inputs at a time, length of the source (where there is an encoder), ids seen, new ids."""

    batch: int
    source: int
    past: int
    new: int

    def within(self, longest: int | None) -> "Shape":
        """The same, no length beyond `longest` positions."""
        if longest is None:
            return self
        new = min(self.new, longest - 1)
        return Shape(self.batch, min(self.source, longest), min(self.past, longest - new), new)

    def __str__(self) -> str:
        return f"batch {self.batch}, source {self.source}, past {self.past}, new {self.new}"


def longest(config: PretrainedConfig) -> int | None:
    """How many positions a model knows, if its config says so; relative ones have no end."""
    text = config.get_text_config(decoder=True)
    return getattr(text, "max_position_embeddings", None) or getattr(text, "max_target_positions", None)


def component_inputs(
    architecture: Architecture, config: PretrainedConfig, shape: Shape, generator: torch.Generator
) -> dict[Component, Mapping[str, Tensor]]:
    """What the caller gives each role: the encoder its inputs, prefill `past` ids (at least 1), step `new` more.

    Where `past` is 0, the mask of step covers the new ids alone.
    """
    components = architecture.components()
    first = max(shape.past, 1)
    prompt = shape.source if Component.ENCODER in components else first
    given = dict(architecture.sample_inputs(config, shape.batch, prompt, generator))
    vocabulary = config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(vocabulary, (shape.batch, first + shape.new), generator=generator)
    mask = torch.ones(shape.batch, first, dtype=torch.int64)
    made: dict[Component, Mapping[str, Tensor]] = {}
    if Component.ENCODER in components:
        made[Component.ENCODER] = given
    else:
        ids[:, :first], mask = given["input_ids"], given["attention_mask"]
    made[Component.PREFILL] = decoder_inputs(ids[:, :first], mask)
    seen = torch.cat([mask[:, first - shape.past :], torch.ones(shape.batch, shape.new, dtype=torch.int64)], dim=1)
    made[Component.DECODE] = decoder_inputs(ids[:, first:], seen)
    return made
