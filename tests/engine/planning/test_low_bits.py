"""Products with weights of few bits: what is fused with them, and what must not be."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from accel.engine.low_bits import LowBits
from accel.engine.operations.activations import Activation
from accel.engine.operations.product import Product
from tests.engine.one_node import normal
from tests.engine.planning.graphs import compared, operations, planned, specs

IN, OUT = 16, 24


def weight(outputs: int, inputs: int, block: int) -> tuple[Tensor, Tensor]:
    """Return integers and scales of a random weight of 8 bits."""
    blocks = -(-inputs // block)
    generator = torch.Generator().manual_seed(outputs * block)
    data = torch.randint(0, 256, (outputs, blocks, block), generator=generator, dtype=torch.uint8)
    return data, normal(outputs, blocks).abs() / 400


WEIGHTS = {"n16": normal(IN) + 1.5, "b24": normal(OUT), "half": torch.tensor(0.5)}
for name, outputs, inputs, block in (("w", OUT, IN, 16), ("u", OUT, IN, 32), ("v", OUT, IN, 16), ("back", IN, OUT, 32)):
    WEIGHTS[name], WEIGHTS[f"{name}_scales"] = weight(outputs, inputs, block)
WEIGHTS["plain"] = normal(IN, OUT, scale=0.25)


def nodes(*lines: str) -> str:
    """Return the text of a graph, where `product(x, w, ...)` is a product with a weight and what follows."""
    text = " ".join(lines)
    for name in ("w", "u", "v", "back"):
        outputs, (inputs, block) = (IN, (OUT, 32)) if name == "back" else (OUT, (IN, 32 if name == "u" else 16))
        call = f"com.microsoft.MatMulNBits<K = {inputs}, N = {outputs}, bits = 8, block_size = {block}>"
        for x in ("x", "norm", "both", "scaled", "h"):
            text = text.replace(f"product({x}, {name}", f"{call} ({x}, {name}, {name}_scales")
    assert "product(" not in text
    return f"agraph (float[B,1,{IN}] x) => (float[B,1,N] y) {{ {text} }}"


# nodes, number of parts of each fused product
FUSED = {
    "bias in the node": (["h = product(x, w, , , b24)", "y = product(h, back)"], [1, 1]),
    "what follows": (
        [
            "norm = SimplifiedLayerNormalization<epsilon = 0.1>(x, n16) h0 = product(norm, w) hb = Add(h0, b24)",
            "h = Gelu(hb) p = product(h, back) y = Add(x, p)",
        ],
        [1, 1],
    ),
    "a gate": (
        [
            "g = product(x, w) s = Sigmoid(g) silu = Mul(g, s) o = product(x, v) both = Mul(silu, o)",
            "y = product(both, back)",
        ],
        [1, 1],
    ),
    "a factor before": (["scaled = Mul(x, half)", "y = product(scaled, w)"], [1]),
    "together": (["a = product(x, w)", "b = product(x, v)", "y = Concat<axis = 2>(a, b)"], [2]),
    "other blocks": (["a = product(x, w)", "b = product(x, u)", "y = Concat<axis = 2>(a, b)"], [1, 1]),
    "other formats": (["a = product(x, w)", "b = MatMul(x, plain)", "y = Concat<axis = 2>(a, b)"], [1, 1]),
    "a gate of other blocks": (
        [
            "g = product(x, w) s = Sigmoid(g) silu = Mul(g, s) o = product(x, u) both = Mul(silu, o)",
            "y = product(both, back)",
        ],
        [1, 1, 1],
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused(name: str, tmp_path: Path) -> None:
    lines, parts = FUSED[name]
    plan = compared(nodes(*lines), WEIGHTS, tmp_path, rtol=1e-3)
    assert sorted(len(spec.parts) for spec in specs(plan) if isinstance(spec, Product)) == sorted(parts)
    assert plan.coverage()["fused_share"] == 1


def test_specification(tmp_path: Path) -> None:
    plan = planned(nodes(*FUSED["a gate"][0]), WEIGHTS, tmp_path)
    first = next(spec for spec in specs(plan) if isinstance(spec, Product))
    (part,) = first.parts
    assert part.low_bits == LowBits(8, 16, IN)
    assert (part.transposed, part.gated, part.activation) == (True, True, Activation("silu"))
    rows = [row.description for row in plan.table({"B": 1})]
    assert "silu(16 x 24 w in int8 block-16) * (16 x 24 v in int8 block-16)" in rows
    assert operations(plan) == ["product", "product"]


def test_blocks_of_scattered_features_are_left_to_torch(tmp_path: Path) -> None:
    body = nodes("y = product(x, w, , order)")
    plan = planned(body, WEIGHTS | {"order": torch.zeros(IN, dtype=torch.int32)}, tmp_path)
    assert operations(plan) == []
    assert any("consecutive features" in reason for reason in plan.misses.values())
