"""SiLU becomes one node, with equal numbers."""

from collections import Counter

import numpy as np
import pytest

from accel.graph.fusion.fuse_silu import FuseSilu
from tests.graph.text import numbers, parse, run

HEADER = "g (float[n, 8] x) => (float[n, 8] y) "


def fused(text: str) -> Counter[str]:
    """Return the operators after the pass, whose numbers are checked against those before."""
    model = parse(text, {"w": numbers(8)})
    inputs = {"x": 8 * numbers(5, 8)}
    before = run(model, inputs)
    FuseSilu()(model)
    after = run(model, inputs)
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, rtol=1e-6, atol=1e-7, err_msg=name)
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("product", ["Mul(x, s)", "Mul(s, x)"])
def test_an_activation_becomes_one_node(product: str) -> None:
    assert fused(HEADER + f"{{ s = Sigmoid(x)\n y = {product} }}") == {"QuickGelu": 1}


OTHER = {
    "a sigmoid that another node reads": (
        "s = Sigmoid(x)\n p = Mul(x, s)\n y = Add(p, s)",
        "the sigmoid is read elsewhere",
    ),
    "a gate": ("h = Mul(x, w)\n s = Sigmoid(h)\n y = Mul(x, s)", ""),
    "FP64": (
        "d = Cast <to: int = 11> (x)\n s = Sigmoid(d)\n p = Mul(d, s)\n y = Cast <to: int = 1> (p)",
        "x is DOUBLE, for which there is no kernel",
    ),
}


@pytest.mark.parametrize("name", OTHER)
def test_others_stay(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "accel.graph.passes")
    text, reason = OTHER[name]
    found = fused(HEADER + f"{{ {text} }}")
    assert (found["Sigmoid"], found["QuickGelu"]) == (1, 0)
    assert reason in caplog.text
