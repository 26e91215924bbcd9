"""Error and time of a matrix product in each candidate format of its weight."""

from collections.abc import Mapping
from time import perf_counter

import numpy as np
import onnx_ir as ir

from accel.graph import files
from accel.graph.quantization.formats import WeightFormat
from accel.graph.quantization.quantize_products import QuantizedWeights, QuantizeProducts
from accel.runtime.session import Session, SessionSettings, open_session

COLUMNS = 512  # output features, evenly spread, that errors are computed on
TIMED_COLUMNS = 8192  # output features of a product that is timed, at most
TIMED_ROWS = (1, 4)
REPEATS = 9  # of which the fastest counts
FULL = "float32"


def relative_errors(
    weight: np.ndarray, rows: np.ndarray, candidates: Mapping[str, WeightFormat], round_rows: bool = True
) -> dict[str, float]:
    """Return the error of the product in each format, relative to its norm.

    Args:
        weight: The weight, [in, out].
        rows: Activations, [rows, in].
        candidates: Formats by name.
        round_rows: Round activations as the format's operator does on a CPU.
    """
    columns = np.linspace(0, weight.shape[1] - 1, min(COLUMNS, weight.shape[1])).astype(int)
    sample = np.ascontiguousarray(weight[:, columns], np.float32)
    expected = rows @ sample
    norm = float(np.linalg.norm(expected)) or 1.0
    errors = {}
    for name, format in candidates.items():
        restored = format.dequantize(format.quantize(sample), len(sample))  # type: ignore[arg-type]
        rounded = format.round_activations(rows) if round_rows else rows
        errors[name] = float(np.linalg.norm(rounded @ restored - expected)) / norm
    return errors


def times(
    inputs: int, outputs: int, candidates: Mapping[str, WeightFormat], settings: SessionSettings
) -> dict[str, float]:
    """Return the microseconds of a product of 1 row plus one of 4 rows, in FP32 and in each format.

    The formats take turns, so that a slow moment of the machine affects all of them, and the fastest run of each
    counts.

    Args:
        inputs: Input features.
        outputs: Output features; beyond `TIMED_COLUMNS` the time is taken to be proportional to them.
        candidates: Formats by name.
        settings: Settings of the sessions.
    """
    columns = min(outputs, TIMED_COLUMNS)
    weight = np.random.default_rng(0).standard_normal((inputs, columns)).astype(np.float32)
    sessions: dict[str, Session] = {FULL: open_session(files.dump(_product(weight)), settings)}
    for name, format in candidates.items():
        model = _product(weight)
        QuantizeProducts({"weight": format}, QuantizedWeights())(model)
        sessions[name] = open_session(files.dump(model), settings)
    total = dict.fromkeys(sessions, 0.0)
    for count in TIMED_ROWS:
        rows = np.random.default_rng(count).standard_normal((count, inputs)).astype(np.float32)
        best = dict.fromkeys(sessions, np.inf)
        for _ in range(REPEATS):
            for name, session in sessions.items():
                begin = perf_counter()
                session.run(None, {"rows": rows})
                best[name] = min(best[name], perf_counter() - begin)
        for name, seconds in best.items():
            total[name] += 1e6 * float(seconds) * outputs / columns
    return total


def _product(weight: np.ndarray) -> ir.Model:
    """Return a graph that multiplies its input `rows` with a weight."""
    rows = ir.val("rows", ir.DataType.FLOAT, ["n", weight.shape[0]])
    value = ir.val("weight", const_value=ir.tensor(weight, name="weight"))
    node = ir.node("MatMul", [rows, value])
    node.outputs[0].name = "product"
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["n", weight.shape[1]])
    graph = ir.Graph([rows], node.outputs, nodes=[node], initializers=[value], opset_imports={"": 20}, name="product")
    return ir.Model(graph, ir_version=10)
