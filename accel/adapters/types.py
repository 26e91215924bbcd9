"""What the generic stages must know about a model family, and cannot discover by themselves."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel


class Component(StrEnum):
    """Which graph: the encoder, the decoder without past (`prefill`), or the decoder with past (`step`).

    `static_decode` is made of `step`, and exported by no architecture: its caches have a fixed length.
    """

    ENCODER = "encoder"
    PREFILL = "prefill"
    DECODE = "decode"
    STATIC_DECODE = "static_decode"


@dataclass(frozen=True)
class TensorSpec:
    """One graph input or output.

    `axes` maps a dimension's index to its name; a dimension that is not listed is fixed by the model.
    `source` names the value that fills an input: an output or input of an earlier role, or, where the input is
    `cached`, an output of the previous prefill or step. Without it, the caller gives the value.
    """

    name: str
    axes: Mapping[int, str] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    source: str | None = None
    cached: bool = False


@dataclass(frozen=True)
class Signature:
    """A role's ports, in the order in which the wrapper takes and returns them."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def cache(self) -> dict[str, str]:
        """Cache input name -> name of the output that becomes it at the next step."""
        return {spec.name: spec.source for spec in self.inputs if spec.cached and spec.source}


@runtime_checkable
class Architecture(Protocol):
    """An adapter. Built from `conf/architecture/*.yaml` by `accel.registry`."""

    model_types: tuple[str, ...]
    """`config.model_type` values it serves."""

    def components(self) -> tuple[Component, ...]:
        """The graphs to export, in the order in which a generation runs them."""
        ...

    def wrap(self, model: PreTrainedModel, component: Component) -> nn.Module:
        """A module that takes and returns flat tensors, ordered as in `signature`. Shares the model's parameters."""
        ...

    def signature(self, config: PretrainedConfig, component: Component) -> Signature:
        """The role's ports."""
        ...

    def sample_inputs(
        self, config: PretrainedConfig, batch: int, length: int, generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """Random inputs of the first role: ids or features [batch, length, ...] and their mask, some padded."""
        ...
