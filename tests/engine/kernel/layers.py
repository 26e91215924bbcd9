"""A small plan with all fused operations, as it is without a checkpoint or an export."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from accel.engine.low_bits import LowBits, middle
from accel.engine.nodes import Graph, Node, classify
from accel.engine.operations.activations import Activation
from accel.engine.operations.attention import Attention, Bias, Heads
from accel.engine.operations.normalize import Norm, Normalize
from accel.engine.operations.product import Part, Product
from accel.engine.planning.plan import DOMAIN, Plan
from accel.engine.planning.planner import OPERATIONS
from accel.engine.planning.trace import Trace

FP16 = torch.float16
NORM = Norm("rms", 1e-6)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the decoder.

    Attributes:
        layers: Layers of self-attention, cross-attention and a gated product.
        width: Features of a row.
        inner: Features of the gated product.
        heads: Heads of queries; those of the caches are half as many.
        size: Features of a head.
        length: Tokens in a cache of self-attention.
        source: Tokens in a cache of cross-attention.
        vocabulary: Features of the output.
    """

    layers: int = 2
    width: int = 256
    inner: int = 512
    heads: int = 4
    size: int = 64
    length: int = 48
    source: int = 24
    vocabulary: int = 500

    @property
    def kv_heads(self) -> int:
        """Heads of the caches."""
        return self.heads // 2


def _attention(sizes: Sizes, fixed: bool) -> Attention:
    """Return attention over a cache that is written, or a fixed one."""
    size, count = sizes.size, sizes.kv_heads
    query = Heads(0, 1, sizes.heads, sizes.heads * size, size, size)
    new = None if fixed else Heads(0, 1, count, count * size, size, size)
    biases = () if fixed else (Bias(True, False),)
    return Attention(query, new, new, count, None, size**-0.5, 0.0, biases, FP16)


def quantized(weight: Tensor, low: LowBits) -> list[Tensor]:
    """Return the tensors of a weight [N, K] in few bits, each block with another zero point where these are stored.

    Returns:
        Integers uint8 [N, blocks, bytes of a block], scales [N, blocks] in FP16, and zero points [N, bytes] or none.
        The padding behind a row has all bits set: nothing may read it.
    """
    n, k = weight.shape
    blocks = functional.pad(weight.float(), (0, -k % low.block)).reshape(n, -1, low.block)
    zeros = torch.full((n, blocks.shape[1]), middle(low.bits))
    if low.zero_points:
        zeros += (torch.arange(zeros.numel()).reshape(zeros.shape) * 7 + 3) % 5 - 2
    most, positive = (1 << low.bits) - 1, blocks.amax(-1) / ((1 << low.bits) - 1 - zeros)
    scales = torch.maximum(positive, -blocks.amin(-1) / zeros).clamp_min(1e-6).half()
    data = (blocks / scales[..., None].float()).round().add(zeros[..., None]).clamp(0, most).to(torch.uint8)
    data.view(n, -1)[:, k:] = most
    packed = [packed_integers(data, low.bits), scales]
    return [*packed, packed_integers(zeros.to(torch.uint8), low.bits)] if low.zero_points else packed


def packed_integers(data: Tensor, bits: int) -> Tensor:
    """Return bytes that `accel.engine.low_bits.integers` unpacks along the last axis; an odd last one is padded."""
    if bits == 8:
        return data
    data = functional.pad(data, (0, data.shape[-1] % 2))
    return data[..., ::2] | data[..., 1::2] << 4


def layered(sizes: Sizes, seed: int = 0, low: LowBits | None = None, mixed: bool = False) -> Plan:
    """Return the plan of a decoder with random weights in FP16, or in few bits: those of K features in `low`.

    Args:
        sizes: Its sizes.
        seed: Of the weights.
        low: How weights are stored; its number of features is replaced by that of each weight.
        mixed: Products behind attention, and those of its heads, stay in FP16.
    """
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    nodes: list[Node] = []
    queries, new = sizes.heads * sizes.size, sizes.kv_heads * sizes.size

    def weight(name: str, n: int, k: int) -> list[str]:
        matrix = torch.randn(n, k, generator=generator) / k**0.5
        if low is None or in_fp16(name):
            weights[name] = matrix.half()
            return [name]
        tensors = dict(zip((f"{name}.data", f"{name}.scales", f"{name}.zeros"), quantized(matrix, low), strict=False))
        weights.update(tensors)
        return list(tensors)

    def in_fp16(name: str) -> bool:
        return mixed and name.endswith((".o.w", ".q.w", ".k.w", ".v.w"))

    def part_of(name: str, k: int, **options: Any) -> Part:
        few = None if low is None or in_fp16(name) else replace(low, features=k)
        return Part(transposed=True, low_bits=few, **options)

    def scale(name: str) -> str:
        weights[name] = (1 + torch.randn(sizes.width, generator=generator) / 8).half()
        return name

    def add(kind: str, spec: object, inputs: list[str], outputs: list[str]) -> str:
        node = Node(outputs[0], (DOMAIN, kind), OPERATIONS[kind], {"spec": spec}, tuple(inputs), tuple(outputs))
        nodes.append(node)
        return outputs[0]

    def product(name: str, inputs: list[str], part: Part, norm: bool, residuals: int = 0) -> str:
        spec = Product(NORM if norm else None, norm, False, (part,), residuals, FP16)
        return add("product", spec, inputs, [name])

    row = "x"
    for i in range(sizes.layers):
        shapes = {f"{i}.q": queries, f"{i}.k": new, f"{i}.v": new}
        rows = list(shapes)
        products = Product(NORM, True, False, tuple(part_of(f"{name}.w", sizes.width) for name in rows), 0, FP16)
        inputs = [row, scale(f"{i}.norm")]
        inputs += [each for name, n in shapes.items() for each in weight(f"{name}.w", n, sizes.width)]
        add("product", products, inputs, rows)
        caches = [f"{i}.keys", f"{i}.values"]
        outputs = [f"{i}.heads", *(f"{name}.new" for name in caches)]
        heads = add("attention", _attention(sizes, False), [*rows, "position", *caches, "mask"], outputs)
        part = part_of(f"{i}.o.w", queries)
        row = product(f"{i}.o", [heads, *weight(f"{i}.o.w", sizes.width, queries), row], part, False, 1)
        inputs = [row, scale(f"{i}.cross.norm"), *weight(f"{i}.cross.q.w", queries, sizes.width)]
        inputs = [
            product(f"{i}.cross.q", inputs, part_of(f"{i}.cross.q.w", sizes.width), True),
            f"{i}.cross.keys",
            f"{i}.cross.values",
        ]
        heads = add("cross attention", _attention(sizes, True), inputs, [f"{i}.cross"])
        row = product(f"{i}.cross.o", [heads, *weight(f"{i}.cross.o.w", sizes.width, queries), row], part, False, 1)
        gated = part_of(f"{i}.up.w", sizes.width, activation=Activation("silu"), gated=True)
        gates = [each for name in ("up", "gate") for each in weight(f"{i}.{name}.w", sizes.inner, sizes.width)]
        inner = product(f"{i}.up", [row, scale(f"{i}.up.norm"), *gates], gated, True)
        inputs = [inner, *weight(f"{i}.down.w", sizes.width, sizes.inner), row]
        row = product(f"{i}.down", inputs, part_of(f"{i}.down.w", sizes.inner), False, 1)
    row = add("normalize", Normalize(NORM, True, False, FP16), [row, scale("norm")], ["normed"])
    product("logits", [row, *weight("head", sizes.vocabulary, sizes.width)], part_of("head", sizes.width), False)
    names = [name for i in range(sizes.layers) for name in (f"{i}.keys", f"{i}.values")]
    fixed = [name.replace(".", ".cross.") for name in names]
    dtypes = dict.fromkeys(["x", "mask", *names, *fixed], FP16) | {"position": torch.int64}
    graph = classify(Graph(nodes, dtypes, ["logits", *(f"{name}.new" for name in names)], weights))
    batch, kv, size = "batch_size", sizes.kv_heads, sizes.size
    shapes_of = {"x": (batch, 1, sizes.width), "mask": (batch, 1, 1, "bucket"), "position": (batch,)}
    shapes_of |= dict.fromkeys(names, (batch, kv, "bucket", size)) | dict.fromkeys(fixed, (batch, kv, "source", size))
    values = {name: torch.empty(1, 1, sizes.width, dtype=FP16) for node in nodes for name in node.outputs}
    trace = SimpleNamespace(shapes=shapes_of, values=values)  # dtypes, and the width of what is normed
    return Plan(graph, cast("Trace", trace), {})


def tensors_of(plan: Plan, sizes: Sizes, rows: int, device: torch.device, filled: bool = False) -> dict[str, Tensor]:
    """Return inputs and outputs of the plan at step 0.

    Row i has 2 i random tokens in its caches, then NaN; with `filled` random tokens everywhere.
    """
    generator = torch.Generator().manual_seed(1)
    lengths = {"batch_size": rows, "bucket": sizes.length, "source": sizes.source}
    tensors: dict[str, Tensor] = {}
    for name, shape in plan.trace.shapes.items():
        axes = [axis if isinstance(axis, int) else lengths[str(axis)] for axis in shape]
        tensors[name] = torch.randn(axes, generator=generator).to(plan.graph.inputs[name]).to(device)
        if name.endswith((".keys", ".values")) and ".cross." not in name:
            for row in range(0 if filled else rows):
                tensors[name][row, :, 2 * row :] = torch.nan
            tensors[f"{name}.new"] = tensors[name]  # updated in place
    tensors["logits"] = torch.empty(rows, 1, sizes.vocabulary, dtype=FP16, device=device)
    begin_step(tensors, 0)
    return tensors


def begin_step(tensors: dict[str, Tensor], step: int) -> None:
    """Write the inputs of a step: x by its number, positions, and a mask that hides what is behind them."""
    generator = torch.Generator().manual_seed(step)
    x, mask, positions = tensors["x"], tensors["mask"], step + 2 * torch.arange(len(tensors["x"]))
    x.copy_(torch.randn(x.shape, generator=generator))
    tensors["position"].copy_(positions)
    hidden = torch.arange(mask.shape[-1]) > positions[:, None]
    mask.copy_(torch.where(hidden, -1e4, torch.randn(hidden.shape, generator=generator))[:, None, None])
    tensors["logits"].fill_(torch.nan)
