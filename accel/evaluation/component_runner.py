"""Runs the roles of an architecture one after the other, each fed by the outputs of those before it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from accel.adapters.types import Architecture, Role, Signature
from accel.errors import AccelError
from accel.runtime.feeds import decoder_feeds

Run = Callable[[Role, Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Runs one role: named inputs -> named outputs. PyTorch's and ONNX Runtime's are interchangeable."""


class Chain:
    """Holds every value seen so far by name, so that caches come from running prefill and are never invented."""

    def __init__(self, signatures: Mapping[Role, Signature], run: Run) -> None:
        self.signatures = signatures
        self.run = run
        self.pool: dict[str, Tensor] = {}

    def inputs(self, role: Role, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All inputs of `role`: those in `given`, the rest from the values seen so far.

        Raises `AccelError` on an input that neither holds.
        """
        found = {}
        for port in self.signatures[role].inputs:
            values, name = (self.pool, port.source) if port.source else (given, port.name)
            if name not in values:
                raise AccelError(
                    f"{role}: input {port.name} takes {name!r}, which is not there. "
                    + ("Made so far: " if port.source else "A caller may give: ")
                    + ", ".join(sorted(values))
                )
            found[port.name] = values[name]
        return found

    def __call__(self, role: Role, given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Run `role`; its inputs and outputs become available to the next one."""
        inputs = self.inputs(role, given)
        outputs = self.run(role, inputs)
        self.pool |= {name: given[name] for name in inputs if name in given}
        self.pool |= outputs
        return outputs

    def forget_past(self) -> None:
        """Crop the decoder's own caches to length 0; those of the encoder stay."""
        for port in self.signatures[Role.STEP].inputs:
            for axis, name in port.axes.items():
                if name == "past" and port.source:
                    self.pool[port.source] = self.pool[port.source].narrow(axis, 0, 0)


def signatures(architecture: Architecture, config: PretrainedConfig) -> dict[Role, Signature]:
    """The signature of every role of `architecture`."""
    return {role: architecture.signature(config, role) for role in architecture.roles()}


def torch_run(architecture: Architecture, model: PreTrainedModel) -> Run:
    """Runs roles in PyTorch, through the very wrappers that are exported.

    Raises `AccelError` where a wrapper's outputs are not those that the signature names.
    """
    wrappers: dict[Role, nn.Module] = {role: architecture.wrap(model, role) for role in architecture.roles()}

    @torch.no_grad()
    def run(role: Role, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        made = wrappers[role](*inputs.values())
        outputs = made if isinstance(made, tuple) else (made,)
        names = [port.name for port in architecture.signature(model.config, role).outputs]
        if len(names) != len(outputs):
            raise AccelError(
                f"{role}: the architecture names {len(names)} outputs ({', '.join(names[:6])}, …), its wrapper "
                f"{type(wrappers[role]).__name__} gave {len(outputs)}"
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


def script(
    architecture: Architecture, config: PretrainedConfig, shape: Shape, generator: torch.Generator
) -> dict[Role, Mapping[str, Tensor]]:
    """What the caller gives each role: the encoder its inputs, prefill `past` ids (at least 1), step `new` more.

    Where `past` is 0, the mask of step covers the new ids alone.
    """
    roles = architecture.roles()
    first = max(shape.past, 1)
    prompt = shape.source if Role.ENCODER in roles else first
    given = dict(architecture.feeds(config, shape.batch, prompt, generator))
    vocabulary = config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(vocabulary, (shape.batch, first + shape.new), generator=generator)
    mask = torch.ones(shape.batch, first, dtype=torch.int64)
    made: dict[Role, Mapping[str, Tensor]] = {}
    if Role.ENCODER in roles:
        made[Role.ENCODER] = given
    else:
        ids[:, :first], mask = given["input_ids"], given["attention_mask"]
    made[Role.PREFILL] = decoder_feeds(ids[:, :first], mask)
    seen = torch.cat([mask[:, first - shape.past :], torch.ones(shape.batch, shape.new, dtype=torch.int64)], dim=1)
    made[Role.STEP] = decoder_feeds(ids[:, first:], seen)
    return made
