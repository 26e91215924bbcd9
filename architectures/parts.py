"""What all adapters are made of: ports and what a YAML may say about them, random inputs, modules called flatly."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from accel.adapters.types import Component, TensorSpec
from accel.errors import AccelError

# Axes of a cache [batch, heads, length, head size]; of its length: `past` going in, `total` coming out.
BATCH, LENGTH = 0, 2


class TensorSpecs:
    """Builds ports under the names and axes that a YAML gives.

    `layers` names the config's attribute that counts the decoder's layers. `past` and `present` are the names of a
    cache going in and coming out, with `{layer}` and `{part}`. `axes` maps a port's name, or `past` or `present` as
    given here, to its dynamic axes, where they differ from what the shape of model has.
    """

    def __init__(
        self,
        layers: str = "num_hidden_layers",
        past: str = "past_key_values.{layer}.{part}",
        present: str = "present.{layer}.{part}",
        axes: Mapping[str, Mapping[int, str]] | None = None,
    ) -> None:
        for key, template in (("past", past), ("present", present)):
            try:
                template.format(layer=0, part="")
            except (KeyError, IndexError, ValueError) as error:
                raise AccelError(f"{key}={template!r}: braces may hold {{layer}} and {{part}}, nothing else") from error
        self.layers, self.past, self.present = layers, past, present
        self.axes = dict(axes or {})

    def of(
        self,
        name: str,
        axes: Mapping[int, str],
        dtype: torch.dtype = torch.int64,
        source: str | None = None,
        template: str | None = None,
    ) -> TensorSpec:
        """A port. `template`: the name of all caches of its kind, for one of them."""
        chosen = self.axes.get(name, self.axes.get(template or name, axes))
        return TensorSpec(name, chosen, dtype, source, cached=template == self.past)

    def caches(
        self, config: PretrainedConfig, component: Component, parts: Mapping[str, str | None]
    ) -> tuple[list[TensorSpec], list[TensorSpec]]:
        """(inputs, outputs) for the caches of every layer.

        `parts` maps the caches of a layer, in order, to the axis they lie along: `past` for those that grow with every
        token, another for those that prefill makes once, None where that has one length. Raises `AccelError` if the
        config counts no layers.
        """
        inputs, outputs = [], []
        for layer in range(self.count(config)):
            for part, along in parts.items():
                names = {"layer": layer, "part": part}
                past, present = self.past.format(**names), self.present.format(**names)
                given, made = (self._axes(name) for name in (along, "total" if along == "past" else along))
                if component is Component.DECODE:
                    inputs.append(self.of(past, given, torch.float32, present, self.past))
                if along == "past" or component is Component.PREFILL:
                    outputs.append(self.of(present, made, torch.float32, template=self.present))
        return inputs, outputs

    @staticmethod
    def _axes(along: str | None) -> dict[int, str]:
        return {BATCH: "batch"} | ({LENGTH: along} if along else {})

    def count(self, config: PretrainedConfig) -> int:
        """The decoder's layers."""
        text = config.get_text_config(decoder=True)
        found = getattr(text, self.layers, None)
        if not isinstance(found, int):
            like = [name for name in text.to_dict() if "layers" in name]
            raise AccelError(f"layers={self.layers}: the config of {config.model_type} has {', '.join(like) or 'none'}")
        return found


def cache_tensors(*layers: Any) -> list[Tensor]:
    """Keys and values of layers of transformers caches, in turn; of the kinds of layers, those that hold tensors."""
    return [tensor for layer in layers for tensor in (layer.keys, layer.values)]


def random_ids(config: PretrainedConfig, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """[batch, length] ids of any kind."""
    return torch.randint(config.get_text_config(decoder=True).vocab_size, (batch, length), generator=generator)


def random_lengths(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """[batch, 1] lengths from half of `length` on, the first of them `length` itself."""
    lengths = torch.randint(max(1, length // 2), length + 1, (batch, 1), generator=generator)
    lengths[0] = length
    return lengths


class Flat(nn.Module):
    """A module called with flat tensors: the inputs `names`, in that order, then the caches."""

    model: Any  # a module of transformers, whose own types are partial

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def split(self, tensors: Sequence[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The inputs by name, and the caches."""
        return dict(zip(self.names, tensors, strict=False)), list(tensors[len(self.names) :])
