"""Samples of the activations that products multiply with their weights, from runs of the FP32 graphs."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from torch import Tensor

from accel.adapters.types import Component
from accel.evaluation.calibration_data import Call
from accel.graph import files
from accel.graph.quantization.products import find_weights
from accel.runtime.session import HostSession, SessionSettings

ROWS = 128  # activations kept for each weight
ROWS_PER_CALL = 8  # at most, of one call of one component


class ProductInputs:
    """Recorder of the inputs of all products.

    Attributes:
        rows: Weight -> activations that some product multiplies with it, [at most `ROWS`, in].
    """

    def __init__(self) -> None:
        self.rows: dict[str, np.ndarray] = {}
        self._random = np.random.default_rng(0)

    def open(self, component: Component, path: Path, settings: SessionSettings) -> Call:
        """Open a component's graph and return a function that runs it and keeps some activations of every call."""
        model = files.load(path)
        readers = {}  # weight -> names of the values that are multiplied with it
        for name, weight in find_weights(model).items():
            readers[name] = [product.node.inputs[0] for product in weight.products]
        known = {output.name for output in model.graph.outputs}
        added: dict[str, ir.Value] = {}
        for values in readers.values():
            for value in values:
                if value is not None and value.name and value.name not in known:
                    added[value.name] = value
        model.graph.outputs.extend(value for value in added.values() if not value.is_graph_input())
        names = {
            weight: [value.name or "" for value in values if value is not None] for weight, values in readers.items()
        }
        session = HostSession(files.dump(model), settings)

        def call(index: int, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            outputs = session(inputs)
            for weight, values in names.items():
                for value in values:
                    tensor = outputs[value] if value in outputs else inputs[value]
                    self._keep(weight, tensor.numpy().reshape(-1, tensor.shape[-1]))
            return {name: tensor for name, tensor in outputs.items() if name in known}

        return call

    def _keep(self, weight: str, rows: np.ndarray) -> None:
        """Keep some of `rows` [n, in]; once there are enough, in place of earlier ones."""
        chosen = rows[self._random.permutation(len(rows))[:ROWS_PER_CALL]]
        kept = np.concatenate([self.rows.get(weight, chosen[:0]), chosen])
        if len(kept) > ROWS:
            kept = kept[np.sort(self._random.permutation(len(kept))[:ROWS])]
        self.rows[weight] = kept
