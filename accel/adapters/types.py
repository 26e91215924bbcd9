"""Types of an adapter: the facts about a model family that stages need and can't discover themselves."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel


class Component(StrEnum):
    """Part of a model that becomes a graph of its own.

    Attributes:
        ENCODER: Encoder.
        PREFILL: Decoder without past: takes the first ids and makes the caches.
        DECODE: Decoder with past: takes further ids and the caches.
        STATIC_DECODE: Decoder over static caches. Derived from the graph of `DECODE`; no architecture exports it.
    """

    ENCODER = "encoder"
    PREFILL = "prefill"
    DECODE = "decode"
    STATIC_DECODE = "static_decode"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph.

    Attributes:
        name: Name in the graph.
        axes: Index of a dimension -> its name. A dimension that is not listed has the same size in every call.
        dtype: Type of the elements.
        source: Of an input: the value that it takes, an output or input of an earlier component or, if `cached`, an
            output of the previous prefill or decode step. None if the caller provides it.
        cached: It is an input that holds a key or value cache.
    """

    name: str
    axes: Mapping[int, str] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    source: str | None = None
    cached: bool = False


@dataclass(frozen=True)
class Signature:
    """Tensor specs of a component, in the order in which its wrapper takes and returns the tensors."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def cache(self) -> dict[str, str]:
        """Return the name of every cache input, with the name of the output that it takes at the next decode step."""
        return {spec.name: spec.source for spec in self.inputs if spec.cached and spec.source}


@runtime_checkable
class Architecture(Protocol):
    """Adapter of a model family, made from `conf/architecture/*.yaml` by `accel.adapters.registry`."""

    model_types: tuple[str, ...]
    """Values of the Hugging Face config's `model_type` that the adapter handles."""

    def components(self) -> tuple[Component, ...]:
        """Return the components to export, in the order in which a generation runs them."""
        ...

    def wrap(self, model: PreTrainedModel, component: Component) -> nn.Module:
        """Return a module that computes `component` with the parameters of `model`.

        Its `forward` takes and returns flat tensors, in the order of `signature`.
        """
        ...

    def signature(self, config: PretrainedConfig, component: Component) -> Signature:
        """Return the tensor specs of `component` for a model with this Hugging Face config."""
        ...

    def sample_inputs(
        self, config: PretrainedConfig, batch: int, length: int, generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """Return random inputs of the first component.

        Args:
            config: The model's Hugging Face config.
            batch: Batch size.
            length: Length in tokens; an adapter may ignore it where the model takes one length only.
            generator: Source of random numbers.

        Returns:
            Ids or features, [batch, length, ...], and, if the model takes one, their mask, with some rows padded.
        """
        ...
