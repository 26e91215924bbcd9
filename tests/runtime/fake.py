"""Test runtime on PyTorch: caches written in place, beams kept as a table of source rows.

Shows that generation needs nothing of a runtime but `accel/runtime/protocol.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from accel.adapters.types import Architecture, Component

CAPACITY = 64  # decoder tokens


class TableState:
    """Caches at constant addresses. Token t of sequence b is in row `origin[b, t]`, at position t."""

    def __init__(self, constants: dict[str, Tensor], batch: int) -> None:
        self.constants = constants
        self.buffers: dict[str, Tensor] = {}  # cache input -> [rows, heads, CAPACITY, head_size]
        self.origin = torch.arange(batch)[:, None].repeat(1, CAPACITY)  # [batch, CAPACITY]
        self.length = 0

    @property
    def batch(self) -> int:
        return self.origin.shape[0]

    def write(self, new: Mapping[str, Tensor]) -> None:
        """Append each [batch, heads, new, head_size] to the tokens so far, in every sequence's own row."""
        count = next(iter(new.values())).shape[2]
        where = slice(self.length, self.length + count)
        if where.stop > CAPACITY:
            raise ValueError(f"{where.stop} tokens exceed the capacity of {CAPACITY}")
        for name, tensor in new.items():
            batch, heads, _, size = tensor.shape
            buffer = self.buffers.get(name)
            if buffer is None or buffer.shape[0] < batch:  # more sequences than rows: copy the old rows
                larger = torch.full((batch, heads, CAPACITY, size), torch.nan, dtype=tensor.dtype)
                if buffer is not None:
                    larger[: buffer.shape[0]] = buffer
                self.buffers[name] = buffer = larger
            buffer[:batch, :, where] = tensor
        self.origin[:, where] = torch.arange(self.batch)[:, None]
        self.length = where.stop

    def reorder(self, index: Tensor) -> None:
        self.origin = self.origin[index]  # caches are not copied

    def crop(self, length: int) -> None:
        self.length = length

    def reserve(self, tokens: int) -> None:
        pass

    def expand(self, times: int) -> None:
        self.select(torch.arange(self.batch).repeat_interleave(times))

    def select(self, index: Tensor) -> None:
        self.reorder(index)
        self.constants = {name: tensor[index] for name, tensor in self.constants.items()}

    def views(self) -> Mapping[str, Tensor]:
        rows, positions = self.origin[:, : self.length], torch.arange(self.length)
        self_caches = {name: buffer[rows, :, positions].transpose(1, 2) for name, buffer in self.buffers.items()}
        return self_caches | {
            name: tensor for name, tensor in self.constants.items() if name.startswith("past_key_values.")
        }


class FakeRuntime:
    """Runtime that runs an architecture's wrappers in PyTorch over a `TableState`."""

    def __init__(self, architecture: Architecture, model: PreTrainedModel) -> None:
        self.device, self.dtype, self.engine = torch.device("cpu"), torch.float32, "torch"
        self.exclusive = self.positions_from_mask = False
        self.signatures = {
            component: architecture.signature(model.config, component) for component in architecture.components()
        }
        self.wrappers = {component: architecture.wrap(model, component) for component in architecture.components()}
        self.cache = self.signatures[Component.DECODE].cache

    @torch.no_grad()
    def _run(self, component: Component, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        signature = self.signatures[component]
        outputs = self.wrappers[component](*(inputs[spec.name] for spec in signature.inputs))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return dict(zip((spec.name for spec in signature.outputs), outputs, strict=True))

    def encode(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self._run(Component.ENCODER, inputs)

    def prefill(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, TableState]:
        outputs = self._run(Component.PREFILL, inputs)
        return outputs["logits"], self._state({name: outputs[source] for name, source in self.cache.items()}, inputs)

    def resume(self, caches: Sequence[Tensor], inputs: Mapping[str, Tensor]) -> TableState:
        names = sorted(self.cache, key=lambda name: not self._is_self_cache(name))
        return self._state(dict(zip(names, caches, strict=True)), inputs)

    def _is_self_cache(self, name: str) -> bool:
        return self.cache[name] in {spec.name for spec in self.signatures[Component.DECODE].outputs}

    def _state(self, caches: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> TableState:
        specs = {spec.name: spec for spec in self.signatures[Component.DECODE].inputs}
        constants = {name: value for name, value in inputs.items() if name in specs and specs[name].source}
        constants |= {name: tensor for name, tensor in caches.items() if not self._is_self_cache(name)}
        state = TableState(constants, inputs["input_ids"].shape[0])
        state.write({name: tensor for name, tensor in caches.items() if self._is_self_cache(name)})
        return state

    def decode(self, inputs: Mapping[str, Tensor], state: TableState) -> Tensor:
        outputs = self._run(Component.DECODE, {**inputs, **state.constants, **state.views()})
        present = {name: outputs[source] for name, source in self.cache.items() if source in outputs}
        state.write({name: tensor[:, :, -inputs["input_ids"].shape[1] :] for name, tensor in present.items()})
        return outputs["logits"]

    def decode_and_select(self, inputs: Any, state: TableState, selection: Any) -> None:
        """Do nothing, as a runtime may."""

    def close(self) -> None:
        self.wrappers = {}
