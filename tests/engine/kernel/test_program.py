"""The list of operations that the kernel is given, on a CPU: nothing is compiled or launched here."""

import ctypes
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from accel.engine.kernel import records
from accel.engine.kernel.launch import Target, source, unsupported
from accel.engine.kernel.placement import NotRunnableError
from accel.engine.kernel.program import Builder, Program
from accel.engine.nodes import Graph, Node, classify
from accel.engine.operations.normalize import Norm
from accel.engine.operations.product import Part, Product
from accel.engine.planning.ancestry import ANCESTRY, by_ancestry
from accel.engine.planning.plan import DOMAIN, Plan
from accel.engine.planning.planner import OPERATIONS
from accel.engine.planning.trace import Trace
from accel.engine.registry import OPERATORS
from tests.engine.kernel.layers import Sizes, layered, tensors_of

CPU, ROWS, BLOCKS = torch.device("cpu"), 3, 4
WIDTH, INNER = 32, 24


def node(name: str, inputs: tuple[str, ...], output: str, parts: tuple[Part, ...], **options: Any) -> Node:
    """Return a product as a node of a plan."""
    spec = Product(
        options.get("norm"), options.get("norm") is not None, False, parts, options.get("residuals", 0), torch.float16
    )
    return Node(name, (DOMAIN, "product"), OPERATIONS["product"], {"spec": spec}, inputs, (output,))


def plan(weights: dict[str, Tensor], nodes: list[Node], output: str = "y") -> Plan:
    """Return a plan over the input `x` [B, 1, WIDTH]."""
    graph = classify(Graph(nodes, {"x": torch.float16}, [output], weights))
    return Plan(graph, Trace(graph, {"x": ("batch_size", 1, WIDTH)}, "batch_size"), {})


def two_products(**second: Any) -> tuple[Plan, dict[str, Tensor]]:
    """Return a gated product behind a norm, one with a residual behind it, and tensors of inputs and outputs."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        "scale": torch.rand(WIDTH, generator=generator).half(),
        "w": torch.randn(WIDTH, INNER, generator=generator).half(),
        "gate": torch.randn(WIDTH, INNER, generator=generator).half(),
        "w2": torch.randn(WIDTH, INNER, generator=generator).half(),
    }
    first = node("first", ("x", "scale", "w", "gate"), "h", (Part(gated=True),), norm=Norm("rms", 1e-6))
    last = node("last", ("h", "w2", "x"), "y", (Part(transposed=True),), residuals=1)
    tensors = {name: torch.zeros(ROWS, 1, WIDTH, dtype=torch.float16) for name in ("x", "y")}
    return plan(weights | second, [first, last]), tensors


def build(made: Plan, tensors: dict[str, Tensor], weights: dict[str, Tensor] | None = None) -> Program:
    return Builder(made, tensors, ROWS, CPU, {} if weights is None else weights, BLOCKS).program


def test_addresses_and_shapes() -> None:
    """Weights lie as [N, K], what operations exchange is in words, and what the caller reads in its own tensors."""
    made, tensors = two_products()
    weights: dict[str, Tensor] = {}
    program = build(made, tensors, weights)
    first, last = program.operations
    constants = made.graph.constants
    assert torch.equal(weights["w False"], constants["w"].T)
    assert weights["w2 True"].data_ptr() == constants["w2"].data_ptr()  # no copy of what lies so already
    begin = records.FIRST_PART
    assert first.pointers[0] == tensors["x"].data_ptr()
    assert first.pointers[begin : begin + 2] == [weights["w False"].data_ptr(), weights["gate False"].data_ptr()]
    words = first.pointers[begin + records.PART.index("out")]
    assert last.pointers[0] == words
    assert words not in (tensors["x"].data_ptr(), tensors["y"].data_ptr())
    assert last.pointers[begin + records.PART.index("out")] == tensors["y"].data_ptr()
    assert last.pointers[begin + len(records.PART)] == tensors["x"].data_ptr()  # the residual
    assert (first.shape, last.shape) == (0, 1)
    assert f"IN = {records.PLAIN}" in program.shapes[0].body
    assert f"IN = {records.WORDS}" in program.shapes[1].body


def test_equal_operations_share_their_code() -> None:
    """Of four products in a row, the two that read and write words differ in their addresses alone."""
    weights = {f"w{index}": torch.zeros(WIDTH, WIDTH, dtype=torch.float16) for index in range(4)}
    names = ["x", "a", "b", "c", "y"]
    nodes = [node(names[i + 1], (names[i], f"w{i}"), names[i + 1], (Part(),)) for i in range(4)]
    tensors = {name: torch.zeros(ROWS, 1, WIDTH, dtype=torch.float16) for name in ("x", "y")}
    program = build(plan(weights, nodes), tensors)
    assert [operation.shape for operation in program.operations] == [0, 1, 1, 2]
    assert program.operations[1].pointers[0] != program.operations[2].pointers[0]


def test_what_the_kernel_cannot_run() -> None:
    made, tensors = two_products()
    single = {name: weight.float() for name, weight in made.graph.constants.items()}
    with pytest.raises(NotRunnableError, match=r"weights are of torch\.float32, and the kernel needs one of 16 bits"):
        build(plan(single, made.graph.nodes), tensors)
    with pytest.raises(NotRunnableError, match=r"scale loses precision in torch\.float16"):
        build(two_products(scale=torch.full((WIDTH,), 1 + 2.0**-20))[0], tensors)
    late = Node("late", ("", "Relu"), OPERATORS["", "Relu"], {}, ("h",), ("r",))
    with pytest.raises(NotRunnableError, match="node late reads h, which the kernel computes"):
        build(plan(made.graph.constants, [made.graph.nodes[0], late], "r"), tensors)


def test_outputs_that_no_operation_computes() -> None:
    """They would be left as they are in the caller's memory."""
    made, tensors = two_products()
    early = Node("early", ("", "Relu"), OPERATORS["", "Relu"], {}, ("x",), ("r",))
    found = plan(made.graph.constants, [early, *made.graph.nodes])
    found = Plan(replace(found.graph, outputs=["y", "r"]), found.trace, {})
    with pytest.raises(NotRunnableError, match="the outputs r are not computed by fused operations"):
        build(found, tensors | {"r": tensors["y"]})


@pytest.mark.parametrize(
    ("keys", "values", "present", "message"),
    [
        ((3, 2, 5, 16), (3, 2, 5, 16), None, None),
        ((3, 2, 5, 12), (3, 2, 5, 12), None, "must agree, and divide by 8"),
        ((3, 2, 5, 16), (3, 2, 5, 8), None, "must agree, and divide by 8"),
        ((3, 2, 5, 16), (3, 2, 5, 16), "elsewhere", "k2 is not in the memory of the cache that it updates"),
    ],
)
def test_caches(keys: tuple[int, ...], values: tuple[int, ...], present: str | None, message: str | None) -> None:
    made, tensors = two_products()
    caches = {"k": torch.zeros(keys, dtype=torch.float16), "v": torch.zeros(values, dtype=torch.float16)}
    tensors |= caches | {"k2": caches["k"].clone() if present else caches["k"], "v2": caches["v"]}
    builder = Builder(made, tensors, ROWS, CPU, {}, BLOCKS)
    attention = Node("a", (DOMAIN, "attention"), OPERATIONS["attention"], {}, (), ("o", "k2", "v2"))
    if message is None:
        builder._check_caches(attention, caches["k"], caches["v"])
    else:
        with pytest.raises(NotRunnableError, match=message):
            builder._check_caches(attention, caches["k"], caches["v"])


@pytest.mark.parametrize(("rows", "blocks", "splits"), [(1, 132, 8), (8, 132, 8), (3, 24, 4), (3, 4, 1)])
def test_attention_over_several_blocks(rows: int, blocks: int, splits: int) -> None:
    """As many parts as there are blocks for; words for those that the cache is long enough for, but the first."""
    sizes = Sizes(layers=1, length=600, source=1500)  # 5 and 12 slots of 128 keys
    made = layered(sizes)
    program = Builder(made, tensors_of(made, sizes, rows, CPU), rows, CPU, {}, blocks).program
    assert sum(f"SPLITS = {splits} " in shape.body for shape in program.shapes) == 2
    counts = {each.data_ptr(): each.numel() for each in program.keep}
    records_of = [each for each in program.operations if program.shapes[each.shape].kind == "attention"]
    parts = [min(splits, most) for most in (2, 6)]
    assert [counts[each.pointers[10]] if count > 1 else 0 for each, count in zip(records_of, parts, strict=True)] == [
        (count - 1) * rows * sizes.heads * (sizes.size + 2) for count in parts
    ]


def test_more_rows_than_the_kernel_computes() -> None:
    made, tensors = two_products()
    with pytest.raises(NotRunnableError, match="9 sequences at once, beams counted: the kernel decodes up to 8"):
        Builder(made, tensors, 9, CPU, {}, BLOCKS)


def test_source() -> None:
    """The parts of the source are in order, with one case for each shape."""
    made, tensors = two_products()
    text = source(build(made, tensors), Target(200_000, bulk=True))
    assert text.startswith("#define ROWS 3\n#define BLOCKS 4\n")
    assert text.index("struct Shape1 {") < text.index("#define CONSUME case 0: product<Shape0>(")
    assert text.index("#define PRODUCE") < text.index('extern "C" __global__')
    assert ctypes.sizeof(records.Record) == 16 + 8 * records.MAX_POINTERS


def test_devices() -> None:
    assert unsupported(CPU) == "the kernel needs CUDA, not cpu"


def test_entries_by_ancestry() -> None:
    """Attention that writes its caches is given the table and the length of its rows, cross-attention isn't."""
    sizes = Sizes(layers=1)
    made = layered(sizes)
    tensors = tensors_of(made, sizes, ROWS, CPU)
    plain = Builder(made, tensors, ROWS, CPU, {}, BLOCKS).program
    tensors[ANCESTRY] = torch.zeros(ROWS, sizes.length + 5, dtype=torch.int32)
    program = Builder(by_ancestry(made), tensors, ROWS, CPU, {}, BLOCKS).program
    found = [each for each in program.operations if program.shapes[each.shape].kind == "attention"]
    assert [each.positions for each in found] == [sizes.length + 5, 0]
    assert [each.pointers[11] for each in found] == [tensors[ANCESTRY].data_ptr(), 0]
    assert [each.pointers[12] for each in found] == [tensors["mask"].data_ptr(), 0]
    bodies = [program.shapes[each.shape].body for each in found]
    assert ["BY_ANCESTRY = 1" in body for body in bodies] == [True, False]
    assert [one.body for one in plain.shapes] == [
        other.body.replace("BY_ANCESTRY = 1", "BY_ANCESTRY = 0") for other in program.shapes
    ]
