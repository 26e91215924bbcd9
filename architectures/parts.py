"""Parts that adapters share: tensor specs and their YAML options, random inputs, and modules with flat inputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from accel.adapters.types import Component, TensorSpec
from accel.errors import AccelError

# Axes of a cache, [batch, heads, length, head_size]. The length is named `past` in inputs and `total` in outputs.
BATCH, LENGTH = 0, 2


class TensorSpecs:
    """Factory of tensor specs, with the names and axes that an architecture's YAML sets.

    Args:
        layers: Attribute of the Hugging Face config that counts the decoder's layers.
        past: Name of a cache input, with `{layer}` and `{part}`.
        present: Name of a cache output, with `{layer}` and `{part}`.
        axes: Dynamic axes that differ from the adapter's own, by the name of a tensor, or by `past` or `present` as
            given here for all caches.

    Raises:
        AccelError: If `past` or `present` has other fields in braces.
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
                raise AccelError(
                    f"{key}={template!r}: the only fields allowed in braces are {{layer}} and {{part}}"
                ) from error
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
        """Return the spec of one tensor, with the dynamic axes `axes` unless the YAML sets others.

        `template`: for a cache, the value of `past` or `present` that `name` was made from.
        """
        yaml_axes = self.axes.get(name, self.axes.get(template or name))
        return TensorSpec(name, axes if yaml_axes is None else yaml_axes, dtype, source, cached=template == self.past)

    def caches(
        self, config: PretrainedConfig, component: Component, parts: Mapping[str, str | None]
    ) -> tuple[list[TensorSpec], list[TensorSpec]]:
        """Return the cache inputs and the cache outputs of all layers.

        Args:
            config: The model's Hugging Face config.
            component: Prefill, which has cache outputs only, or decode.
            parts: Caches of a layer, in order -> name of their length axis: `past` for self-attention caches, another
                for cross-attention caches, which prefill makes once, and None where their length is constant.

        Raises:
            AccelError: If the config doesn't have the attribute `layers`.
        """
        inputs, outputs = [], []
        for layer in range(self.count(config)):
            for part, length in parts.items():
                past = self.past.format(layer=layer, part=part)
                present = self.present.format(layer=layer, part=part)
                if component is Component.DECODE:
                    axes = self._cache_axes(length)
                    inputs.append(self.of(past, axes, torch.float32, present, self.past))
                if length == "past" or component is Component.PREFILL:
                    axes = self._cache_axes("total" if length == "past" else length)
                    outputs.append(self.of(present, axes, torch.float32, template=self.present))
        return inputs, outputs

    @staticmethod
    def _cache_axes(length: str | None) -> dict[int, str]:
        """Return the dynamic axes of a cache whose length axis is named `length`; None if its length is constant."""
        axes = {BATCH: "batch_size"}
        if length is not None:
            axes[LENGTH] = length
        return axes

    def count(self, config: PretrainedConfig) -> int:
        """Return the number of the decoder's layers.

        Raises:
            AccelError: If the config doesn't have the attribute `layers`. Lists the attributes with a similar name.
        """
        text = config.get_text_config(decoder=True)
        count = getattr(text, self.layers, None)
        if not isinstance(count, int):
            similar = [name for name in text.to_dict() if "layers" in name]
            raise AccelError(
                f"layers={self.layers}: the config of {config.model_type} has no such attribute; those with 'layers' "
                f"in their name are: {', '.join(similar) or 'none'}"
            )
        return count


def cache_tensors(*layers: Any) -> list[Tensor]:
    """Return key and value of each of the given layers of a transformers cache, in turn."""
    tensors = []
    for layer in layers:
        tensors += [layer.keys, layer.values]
    return tensors


def random_ids(config: PretrainedConfig, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Return random ids from the whole vocabulary, [batch, length]."""
    return torch.randint(config.get_text_config(decoder=True).vocab_size, (batch, length), generator=generator)


def random_lengths(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Return random lengths from half of `length` to `length` tokens, [batch, 1]; the first is `length`."""
    lengths = torch.randint(max(1, length // 2), length + 1, (batch, 1), generator=generator)
    lengths[0] = length
    return lengths


class Flat(nn.Module):
    """Base of wrappers whose `forward` takes flat tensors: the inputs `names`, in that order, then the caches."""

    model: Any  # a module of transformers, whose own types are partial

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def split(self, tensors: Sequence[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Split the arguments of `forward` into the inputs by name and the list of caches."""
        count = len(self.names)
        inputs = dict(zip(self.names, tensors[:count], strict=False))
        return inputs, list(tensors[count:])
