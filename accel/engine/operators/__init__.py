"""The operators, one function each, in files by kind. Importing the package registers all of them.

A function follows ONNX's definition, https://onnx.ai/onnx/operators/, in opset 18 or later, or that of ONNX Runtime's
own operators, https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md. None of them reads a value
back from the device, except where an output's shape depends on it.
"""

from accel.engine.operators import (
    arithmetic,
    attention,
    indexing,
    logic,
    low_bits,
    normalization,
    products,
    reductions,
    shapes,
)
from accel.engine.registry import OPERATORS, Operator
from accel.errors import AccelError

KINDS = (arithmetic, attention, indexing, logic, low_bits, normalization, products, reductions, shapes)


def find_operator(domain: str, name: str, node: str) -> Operator:
    """Return the operator of a node.

    Args:
        domain: Its domain; empty for ONNX's own.
        name: Its name.
        node: Name of the node, for the message.

    Raises:
        AccelError: The engine doesn't have it. The message lists those that it has.
    """
    found = OPERATORS.get((domain, name))
    if found is None:
        supported = ", ".join(sorted(f"{domain}.{name}" if domain else name for domain, name in OPERATORS))
        domain = domain or "ai.onnx"
        raise AccelError(
            f"node {node}: the engine has no operator {name!r} of domain {domain!r}. Supported: {supported}"
        )
    return found
