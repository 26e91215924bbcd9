"""Samples of the activations that products multiply with their weights, from runs of the FP32 graphs."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from accel.evaluation.sensitivity import RecordedCall
from accel.graph import files
from accel.graph.passes import remove_unused
from accel.graph.quantization.products import find_weights
from accel.runtime.session import HostSession, SessionSettings

ROWS = 128  # activations kept for each weight
ROWS_PER_CALL = 8  # at most, of one call of one component


class ProductInputs:
    """Inputs of all products, in recorded calls.

    Attributes:
        rows: Weight -> activations that some product multiplies with it, [at most `ROWS`, in].
    """

    def __init__(self) -> None:
        self.rows: dict[str, np.ndarray] = {}
        self._random = np.random.default_rng(0)

    def add(self, graph: Path, calls: Iterable[RecordedCall], settings: SessionSettings) -> None:
        """Run a component's FP32 graph on the inputs of its recorded calls, and keep some activations of each."""
        model = files.load(graph)
        readers: dict[str, list[ir.Value]] = {}  # weight -> values that are multiplied with it
        for name, weight in find_weights(model).items():
            readers[name] = [value for each in weight.products if (value := each.node.inputs[0]) is not None]
        values = {value.name: value for operands in readers.values() for value in operands}
        model.graph.outputs.clear()
        model.graph.outputs.extend(value for value in values.values() if not value.is_graph_input())
        remove_unused(model)  # the output layer and what follows the last products
        session = HostSession(files.dump(model), settings)
        for call in calls:
            inputs = call.inputs()
            outputs = session(inputs)
            for weight_name, operands in readers.items():
                for value in operands:
                    name = value.name or ""
                    tensor = outputs[name] if name in outputs else inputs[name]
                    self._keep(weight_name, tensor.numpy().reshape(-1, tensor.shape[-1]))

    def _keep(self, weight: str, rows: np.ndarray) -> None:
        """Keep some of `rows` [n, in]; once there are enough, in place of earlier ones."""
        chosen = rows[self._random.permutation(len(rows))[:ROWS_PER_CALL]]
        kept = np.concatenate([self.rows.get(weight, chosen[:0]), chosen])
        if len(kept) > ROWS:
            kept = kept[np.sort(self._random.permutation(len(kept))[:ROWS])]
        self.rows[weight] = kept
