"""The plan of a static decode graph, and how it is printed."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby

from accel.engine.nodes import Graph, Node
from accel.engine.operations.attention import Attention
from accel.engine.operations.normalize import Normalize
from accel.engine.operations.product import Part, Product, Weight
from accel.engine.planning.buffers import Workspace, place_values, steps
from accel.engine.planning.trace import BATCH, PRODUCTS, Lengths, Trace, evaluate_shapes

DOMAIN = "accel.engine"
SOFTMAXES = ("Softmax", "MultiHeadAttention")
KINDS = 6  # operators of torch nodes that a row names


@dataclass(frozen=True)
class Row:
    """A row of a plan's table.

    Attributes:
        operation: Its name; of consecutive nodes in torch how many they are.
        description: What is computed.
        shape: Shape of the first output; B is the batch, another letter a length that isn't fixed.
        weight_bytes: Bytes of the weights that it multiplies with.
        engine: `fused`, or `torch` for nodes that the executor runs, and for the choice of the next ids.
        offset: Offset of the first output in the workspace, in bytes; None where it has memory of its own.
    """

    operation: str
    description: str
    shape: str
    weight_bytes: int
    engine: str
    offset: int | None


CHOICE = Row("choice", "best id, or a draw of those that filters leave; rows that end", "B x 1", 0, "torch", None)
"""What follows the graph, whose logits it reads. Its filters are those of a generation."""


@dataclass(frozen=True)
class Plan:
    """A graph of fused operations and the nodes that none replaces.

    Attributes:
        graph: The graph, for the executor.
        trace: The shapes of its values, for an example.
        misses: Node that looked like the centre of an operation -> why it is none.
    """

    graph: Graph
    trace: Trace
    misses: Mapping[str, str]

    def workspace(self, lengths: Lengths) -> Workspace:
        """Return where the values between operations lie.

        Args:
            lengths: Length of every symbol in the shapes of the graph's inputs, that of the batch too.
        """
        values, _ = evaluate_shapes(self.trace.graph, self.trace.shapes, lengths)
        rows = {
            name: values[name.removesuffix(".rows")]
            for node in steps(self.graph)
            for name in node.outputs
            if name.endswith(".rows") and name not in values
        }
        return place_values(self.graph, values | rows)

    def weight_bytes(self, node: Node) -> int:
        """Return the bytes of the weights that a node multiplies with."""
        if node.kind not in PRODUCTS and node.kind != (DOMAIN, "product"):
            return 0
        values = [self.trace.values[name] for name in node.inputs if name and name not in self.graph.runtime]
        return sum(value.numel() * value.itemsize for value in values if value.ndim > 1)

    def coverage(self) -> dict[str, float]:
        """Return how much of a decode step fused operations compute.

        Returns:
            `product_bytes`: bytes of the weights of all products; `fused_share`: share of them in fused operations;
            `torch_nodes`: nodes that run in torch at every step; `torch_softmaxes`: attentions among them.
        """
        nodes = steps(self.graph)
        fused = sum(self.weight_bytes(node) for node in nodes if node.kind[0] == DOMAIN)
        total = sum(map(self.weight_bytes, nodes))
        return {
            "product_bytes": total,
            "fused_share": fused / total if total else 1.0,
            "torch_nodes": sum(node.kind[0] != DOMAIN for node in nodes),
            "torch_softmaxes": sum(node.kind[1] in SOFTMAXES for node in nodes),
        }

    def table(self, lengths: Lengths) -> list[Row]:
        """Return the operations in order; nodes that run in torch one after another are one row. The last is `CHOICE`.

        Args:
            lengths: See `workspace`.
        """
        workspace = self.workspace(lengths)
        rows = []
        for is_fused, nodes in groupby(steps(self.graph), lambda node: node.kind[0] == DOMAIN):
            for group in ([node] for node in nodes) if is_fused else [list(nodes)]:
                last = group[-1]
                output = next(name for name in last.outputs if name)
                buffer = workspace.buffers.get(output)
                rows.append(
                    Row(
                        last.kind[1] if is_fused else f"{len(group)} nodes" if len(group) > 1 else "1 node",
                        _describe(last, self.graph) if is_fused else _operators(group),
                        self._row(output) if is_fused else self._shape(output),
                        sum(map(self.weight_bytes, group)),
                        "fused" if is_fused else "torch",
                        buffer.offset if buffer else None,
                    )
                )
        return [*rows, CHOICE]

    def _row(self, name: str) -> str:
        """Return the shape of a fused operation's output as text."""
        return f"B x 1 x {self.trace.values[name.removesuffix('.rows')].numel() // BATCH}"

    def _shape(self, name: str) -> str:
        """Return a value's shape as text."""
        name = name.removesuffix(".rows")
        if name not in self.trace.values:
            return "depends on data"
        axes = []
        lengths = dict(zip(self.trace.lengths.values(), self.trace.lengths, strict=True))
        for here, there in zip(self.trace.values[name].shape, self.trace.others[name], strict=True):
            axes.append(str(here) if here == there else "B" if here == BATCH else str(lengths.get(here, "?")))
        return " x ".join(axes) or "1"


def _operators(nodes: Iterable[Node]) -> str:
    """Return the operators of nodes, the most frequent ones first."""
    counts = Counter(node.kind[1] for node in nodes).most_common()
    names = [name if count == 1 else f"{count} {name}" for name, count in counts[:KINDS]]
    return ", ".join(names) + (", …" if len(counts) > KINDS else "")


def _describe(node: Node, graph: Graph) -> str:
    """Return in words what a fused operation computes."""
    spec = node.attributes["spec"]
    if isinstance(spec, Product):
        return _product(spec, node, graph)
    if isinstance(spec, Attention):
        return _attention(spec)
    if isinstance(spec, Normalize):
        added = len(node.inputs) > 1 + spec.has_weight + spec.has_bias
        return f"{spec.norm}{' + residual' if added else ''}"
    return str(spec)


def _product(spec: Product, node: Node, graph: Graph) -> str:
    """Return a product in words: `rms norm -> 2048 x 3072 q_proj + bias`."""
    names = list(node.inputs[1 + spec.norm_weight + spec.norm_bias :])

    def describe(part: Part, weight: Weight[str]) -> str:
        """Return a weight's shape [K, N] and name, its format in few bits, and its bias."""
        low, shape = part.low_bits, graph.constants[weight.matrix].shape
        outputs, inputs = shape[:2] if part.transposed else shape[::-1]
        name, kind = _short(weight.matrix), ""
        if low is not None:
            inputs, kind = low.features, f" in {low}"
            name = _short(weight.matrix.removesuffix(f".int{low.bits}.data"))
        return f"{inputs} x {outputs} {name}{kind}" + ("" if weight.bias is None else f" + {_short(weight.bias)}")

    parts = []
    for part in spec.parts:
        weight, *gates = part.take(names)
        text = describe(part, weight)
        text = f"{part.alpha:.4g} * {text}" if part.alpha != 1 else text
        text = f"{part.activation}({text})" if part.activation.name != "none" else text
        text = "".join([text, *(f" * ({describe(part, gate)})" for gate in gates)])
        parts.append(f"({text}) * {part.beta:.4g}" if part.beta != 1 else text)
    before = f"{spec.norm} -> " if spec.norm else ""
    return before + ", ".join(parts) + " + residual" * spec.residuals


def _short(name: str) -> str:
    """Return what names a weight among others of its layer: `q_proj` of `model.layers.0.self_attn.q_proj.weight`."""
    parts = name.split(".")
    return ".".join(parts[-2:]).removesuffix(".weight") if len(parts) > 1 else name


def _attention(spec: Attention) -> str:
    """Return an attention in words: `8 heads of 64 over 2, interleaved rotary of 32, 2 biases, written`."""
    words = [f"{spec.query.count} heads of {spec.query.size} over {spec.kv_heads}"]
    if spec.query.norm is not None:
        words.append(f"{spec.query.norm} of queries{' and keys' if spec.key and spec.key.norm else ''}")
    if spec.rotary is not None:
        words.append(f"{'interleaved ' if spec.rotary.interleaved else ''}rotary of {spec.rotary.size}")
    if spec.softcap:
        words.append(f"soft cap {spec.softcap:g}")
    words.append(f"{len(spec.biases)} bias{'es' * (len(spec.biases) != 1)}")
    words.append("new key and value written" if spec.key else "fixed cache")
    if spec.ancestry:
        words.append("entries by beam ancestry")
    return ", ".join(words)
