"""Weights of 8 and 4 bits in the kernel: what it is given, that it compiles, and on a GPU what it computes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from accel.engine.kernel import records
from accel.engine.kernel.launch import Kernel, Target, source
from accel.engine.kernel.placement import NotRunnableError
from accel.engine.kernel.program import Builder, Program
from accel.engine.kernel.watchdog import Watchdog
from accel.engine.low_bits import LowBits
from accel.engine.nodes import Graph, Node, classify
from accel.engine.operations.activations import Activation
from accel.engine.operations.normalize import Norm
from accel.engine.operations.product import Part, Product, reference
from accel.engine.planning.plan import DOMAIN, Plan
from accel.engine.planning.planner import OPERATIONS
from accel.engine.planning.trace import Trace
from tests.engine.kernel.emulator import run
from tests.engine.kernel.layers import Sizes, layered, quantized, tensors_of
from tests.engine.kernel.nvrtc import compile_for
from tests.engine.kernel.test_compiles import BLOCKS, SM_90, TARGETS
from tests.engine.operations.numbers import arrays

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LOW = LowBits(8, 64, 0)
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of the largest magnitude; x is rounded behind its norm


def random_weight(n: int, k: int, low: LowBits | None, seed: int, dtype: torch.dtype) -> list[Tensor]:
    """Return the tensors of a weight [N, K]."""
    matrix = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) / k**0.5
    if low is None:
        return [matrix.to(dtype)]
    return [each.to(dtype) if each.is_floating_point() else each for each in quantized(matrix, low)]


def products(k: int, sizes: list[int], low: LowBits | None, dtype: torch.dtype, **options: object) -> Plan:
    """Return the plan of products of x [B, 1, k], the gated or the only one with bias and residual.

    Args:
        k: Features of x.
        sizes: Features of each product.
        low: How weights are stored; None: in `dtype`.
        dtype: Dtype of x.
        options: `norm`, `gated`, and `wide`: x is in FP32.
    """
    gated, norm = bool(options.get("gated")), options.get("norm")
    low = None if low is None else replace(low, features=k)
    alone = len(sizes) == 1
    act = Activation("gelu") if gated else Activation()
    part = Part(0.7, act, 1.5, transposed=True, has_bias=alone, gated=gated, gate_bias=gated, low_bits=low)
    constants: dict[str, Tensor] = {"scale": 1 + torch.randn(k, generator=torch.Generator().manual_seed(9)) / 8}
    inputs = ["x"] + ["scale"] * (norm is not None)
    for index, n in enumerate(sizes):
        for which in range(1 + gated):
            for place, tensor in enumerate(random_weight(n, k, low, 10 * index + which, dtype)):
                constants[f"{index}.{which}.{place}"] = tensor
                inputs.append(f"{index}.{which}.{place}")
            if alone:
                constants[f"b{which}"] = torch.randn(n, generator=torch.Generator().manual_seed(which + 3))
                inputs.append(f"b{which}")
    constants = {name: each.to(dtype) if each.dtype != torch.uint8 else each for name, each in constants.items()}
    spec = Product(norm, norm is not None, False, (part,) * len(sizes), int(alone), dtype)  # type: ignore[arg-type]
    outputs = [f"y{index}" for index in range(len(sizes))]
    node = Node("products", (DOMAIN, "product"), OPERATIONS["product"], {"spec": spec}, tuple(inputs), tuple(outputs))
    feeds, shapes = {"x": torch.float32 if options.get("wide") else dtype}, {"x": ("batch_size", 1, k)}
    if alone:
        node = replace(node, inputs=(*inputs, "r"))
        feeds["r"], shapes["r"] = dtype, ("batch_size", 1, sizes[0])
    graph = classify(Graph([node], feeds, outputs, constants))
    return Plan(graph, Trace(graph, shapes, "batch_size"), {})


def build(plan: Plan, rows: int, device: torch.device, blocks: int) -> tuple[Program, dict[str, Tensor]]:
    """Return the program of `products`, and its tensors: x with a row of large numbers, outputs of NaN."""
    generator, tensors = torch.Generator().manual_seed(rows), {}
    spec = plan.graph.nodes[0].attributes["spec"]
    for name, (_, *shape) in plan.trace.shapes.items():
        tensors[name] = torch.randn(rows, *map(int, shape), generator=generator).to(plan.graph.inputs[name])
        tensors[name][-1] *= 20
    for node in plan.graph.nodes:
        rest = list(node.inputs[1 + node.attributes["spec"].norm_weight :])
        for name, part in zip(node.outputs, node.attributes["spec"].parts, strict=True):
            weight, *_ = part.take(rest)
            features = len(plan.graph.constants[weight.matrix])
            tensors[name] = torch.full((rows, 1, features), torch.nan, dtype=spec.dtype)
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    weights: dict[str, Tensor] = {}
    program = Builder(plan, tensors, rows, device, weights, blocks).program
    program.keep += weights.values()
    return program, tensors


def scales_in_groups(plan: Plan, tensors: dict[str, Tensor]) -> tuple[Program, Tensor]:
    """Return the program of `products`, and the scales that it has in the kernel's order."""
    weights: dict[str, Tensor] = {}
    program = Builder(plan, tensors, 1, CPU, weights, 4).program
    (packed,) = (tensor for name, tensor in weights.items() if "groups" in name)
    pointers = program.operations[0].pointers
    assert pointers[records.FIRST_PART + records.PART.index("scales")] == packed.data_ptr()
    data = plan.graph.constants["0.0.0"]
    assert pointers[records.FIRST_PART] == data.data_ptr()  # the bytes of the file, without a copy
    return program, packed


def test_scales_lie_in_groups() -> None:
    """As the kernel multiplies rows: eight of a weight, or four with four of its gate, and none behind the last."""
    for gated, group in ((False, 8), (True, 4)):
        plan = products(200, [12], LOW, torch.float16, gated=gated)
        program, packed = scales_in_groups(plan, build(plan, 1, CPU, 4)[1])
        scales = [plan.graph.constants[f"0.{which}.1"] for which in range(1 + gated)]
        padded = [functional.pad(each, (0, 0, 0, -12 % group)) for each in scales]
        found = packed.view(torch.float16).squeeze(-1)
        assert found.shape == (-(-12 // group), 4, 8)
        for index, entry in enumerate(found):
            rows = torch.cat([each[index * group : (index + 1) * group] for each in padded])
            assert torch.equal(entry, rows.T)
        assert program.scale_bytes == 2048 // 64 * 8 * 2


def test_zero_points_lie_beside_scales() -> None:
    """Of 4 bits unpacked: [groups, blocks, 8 rows, scale and zero point]."""
    low = LowBits(4, 32, 0, True)
    plan = products(200, [12], low, torch.float16)
    program, packed = scales_in_groups(plan, build(plan, 1, CPU, 4)[1])
    assert packed.shape == (2, 7, 8, 2)
    zeros = plan.graph.constants["0.0.2"]
    for row in range(12):
        for block in range(7):
            byte = int(zeros.reshape(12, 4)[row, block // 2])
            assert int(packed[row // 8, block, row % 8, 1]) == byte >> block % 2 * 4 & 15
    assert len(packed[..., 1].unique()) > 3
    assert torch.equal(packed[0, :, 3, 0].view(torch.float16), plan.graph.constants["0.0.1"][3])
    assert program.scale_bytes == 4096 // 32 * 8 * 4


@pytest.mark.parametrize("low", [LowBits(4, 16, 0), LowBits(8, 16, 0), LowBits(8, 4096, 0)], ids=str)
def test_what_the_kernel_cannot_read(low: LowBits) -> None:
    plan = products(128, [8], LOW, torch.float16)
    node = plan.graph.nodes[0]
    spec = node.attributes["spec"]
    parts = tuple(replace(part, low_bits=replace(low, features=128)) for part in spec.parts)
    changed = Plan(
        replace(plan.graph, nodes=[replace(node, attributes={"spec": replace(spec, parts=parts)})]), plan.trace, {}
    )
    message = f"weights are of {low}, and the kernel reads int8 and int4 in blocks of 32, 64, 128"
    with pytest.raises(NotRunnableError, match=message):
        build(changed, 1, CPU, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "rows", "width", "low"),
    [
        ("sm_80", 8, 2048, LowBits(8, 128, 0)),
        ("sm_89", 1, 1024, LowBits(4, 32, 0, True)),
        ("sm_90", 8, 2048, LowBits(8, 128, 0)),
        ("sm_90", 8, 2048, LowBits(4, 32, 0, True)),
    ],
    ids=str,
)
def test_compiles(architecture: str, rows: int, width: int, low: LowBits) -> None:
    """Wide rows, for which threads hold the most: two segments and one, and x that is kept in registers or isn't."""
    sizes = Sizes(layers=1, width=width, inner=4096, heads=16)
    plan = layered(sizes, low=low)
    program = Builder(plan, tensors_of(plan, sizes, rows, CPU), rows, CPU, {}, BLOCKS).program
    found = compile_for(source(program, TARGETS[architecture]), architecture)
    print(f"{architecture}, {rows} rows of {low}: {found.registers} registers, {found.spilled} bytes spilled")
    assert found.spilled == 0, found.log


def test_compiles_for_bfloat16() -> None:
    for low in (LOW, LowBits(4, 32, 0)):
        program, _ = build(products(72, [12], low, torch.bfloat16, gated=True), 2, CPU, BLOCKS)
        assert compile_for(source(program, SM_90), "sm_90").spilled == 0


def test_weights_of_16_bits_alone_have_no_scales() -> None:
    sizes = Sizes()
    for low, size in ((None, 0), (LOW, 512), (LowBits(4, 128, 0), 512), (LowBits(4, 128, 0, True), 1024)):
        plan = layered(sizes, low=low)
        program = Builder(plan, tensors_of(plan, sizes, 1, CPU), 1, CPU, {}, BLOCKS).program
        assert f"#define SCALE_BYTES {size}\n" in source(program, SM_90)


def check(plan: Plan, tensors: dict[str, Tensor]) -> None:
    """Compare the outputs of products with the reference in FP64."""
    for node in plan.graph.nodes:
        given = [tensors.get(name, plan.graph.constants.get(name)) for name in node.inputs]
        x, *rest = arrays([each.cpu() for each in given if each is not None])
        rows, spec = len(x), node.attributes["spec"]
        if spec.residuals:
            rest[-1] = rest[-1].reshape(rows, -1)
        for name, expected in zip(node.outputs, reference(x.reshape(rows, -1), *rest, spec=spec), strict=True):
            found = tensors[name].double().cpu().numpy().reshape(expected.shape)
            for row in range(rows):
                difference = abs(found[row] - expected[row]).max() / abs(expected[row]).max()
                assert difference < TOLERANCE[spec.dtype], f"{name}, row {row}: {difference}"


EMULATED = {
    "parts": (products(200, [24, 8, 30], LOW, torch.float16), 3, SM_90),
    "segments, 8 rows": (products(2056, [36], LowBits(8, 256, 0), torch.float16), 8, SM_90),
    "blocks of 32, zero points": (products(200, [24, 8, 30], LowBits(8, 32, 0, True), torch.float16), 1, SM_90),
    "4 bits, parts": (products(200, [24, 8, 30], LowBits(4, 128, 0), torch.float16), 1, SM_90),
    "4 bits, blocks of 32, segments, 8 rows": (products(4104, [36], LowBits(4, 32, 0), torch.float16), 8, SM_90),
    "4 bits, blocks of 64, zero points, gate and norm of FP32": (
        products(224, [30], LowBits(4, 64, 0, True), torch.float16, gated=True, norm=Norm("rms", 1e-6), wide=True),
        3,
        SM_90,
    ),
    "4 bits, blocks of 32, zero points": (products(1104, [30], LowBits(4, 32, 0, True), torch.float16), 2, SM_90),
    "4 bits, bfloat16, no bulk copies": (
        products(200, [30], LowBits(4, 32, 0, True), torch.bfloat16, gated=True),
        2,
        TARGETS["sm_89"],
    ),
    "gate and norm": (products(200, [30], LOW, torch.float16, gated=True, norm=Norm("rms", 1e-6)), 3, SM_90),
    "bfloat16, no bulk copies": (products(200, [30], LOW, torch.bfloat16, gated=True), 2, TARGETS["sm_89"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", EMULATED)
def test_products_emulated(case: str, tmp_path: Path) -> None:
    plan, rows, target = EMULATED[case]
    program, tensors = build(plan, rows, CPU, 2)
    run(program, target, tmp_path)
    check(plan, tensors)


@pytest.mark.slow
def test_weights_of_16_bits_behind_those_of_8_emulated(tmp_path: Path) -> None:
    """A slot of the ring still holds bytes that are no numbers in 16 bits, where a row is shorter than a slot."""
    first, second = products(520, [500, 20], LOW, torch.float16), products(72, [20, 300], None, torch.float16)
    (node,) = second.graph.nodes
    names = {name: f"{name}'" for name in (*node.inputs, *node.outputs)}
    node = replace(node, inputs=tuple(map(names.get, node.inputs)), outputs=tuple(map(names.get, node.outputs)))
    constants = {names.get(name, name): each for name, each in second.graph.constants.items()}
    graph = classify(
        Graph(
            [*first.graph.nodes, node],
            {**first.graph.inputs, "x'": torch.float16},
            [*first.graph.outputs, *node.outputs],
            {**first.graph.constants, **constants},
        )
    )
    shapes = {**first.trace.shapes, "x'": ("batch_size", 1, 72)}
    plan = Plan(graph, Trace(graph, shapes, "batch_size"), {})
    program, tensors = build(plan, 2, CPU, 2)
    run(program, SM_90, tmp_path)
    check(plan, tensors)


def compare(plan: Plan, rows: int, target: Target | None = None) -> None:
    """Launch the kernel, and compare its outputs with the reference in FP64."""
    program, tensors = build(plan, rows, GPU, torch.cuda.get_device_properties(GPU).multi_processor_count)
    watchdog = Watchdog(GPU)
    kernel = Kernel(program, GPU, watchdog, {}, target)
    for _ in range(3):  # the ring goes round, and tags count on
        kernel()
    assert watchdog.gave_up() is None
    check(plan, tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize("k", [8, 72, 264, 512, 1032, 2048, 2056, 4104, 8192])
def test_products_on_a_gpu(k: int, rows: int) -> None:
    """Of features in part of a chunk, of a block and of a segment; and of more groups of rows than blocks."""
    for low in (LowBits(8, 64, 0), LowBits(8, 256, 0), LowBits(4, 128, 0), LowBits(4, 32, 0, True)):
        compare(products(k, [2500 if k < 600 else 37], low, torch.float16), rows)


@pytest.mark.gpu
@pytest.mark.parametrize("bulk", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gates_norms_and_parts_on_a_gpu(dtype: torch.dtype, rows: int, bulk: bool) -> None:
    target = replace(Target.of(GPU), bulk=bulk) if bulk else Target(99 * 1024, bulk=False)
    longest = 4104 if bulk else 2112 if rows < 8 else 1088  # more leave the rows too little of 99 KB
    formats = {
        LowBits(8, 64, 0): 200,
        LowBits(8, 128, 0): 1024,
        LowBits(8, 64, 0, True): longest,
        LowBits(4, 32, 0): 1032,
        LowBits(4, 64, 0, True): longest,
    }
    for low, k in formats.items():
        compare(products(k, [1100], low, dtype, gated=True, norm=Norm("rms", 1e-6)), rows, target)
        compare(products(k, [24, 8, 1100], low, dtype, norm=Norm("rms", 1e-6)), rows, target)
    compare(products(200, [24, 1100], None, dtype), rows, target)


@pytest.mark.gpu
@pytest.mark.parametrize("bulk", [True, False])
@pytest.mark.parametrize(
    "low", [LowBits(8, 64, 0), LowBits(8, 128, 0), LowBits(4, 128, 0), LowBits(4, 32, 0, True)], ids=str
)
def test_a_decoder_on_a_gpu(low: LowBits, bulk: bool) -> None:
    """All operations beside products of few bits give torch's numbers, and the same bits at each repeat."""
    from tests.engine.kernel.test_reliability import Decoder, assert_same_bits, difference

    target = None if bulk else Target(99 * 1024, bulk=False)
    for sizes in (Sizes(width=320, inner=1000), Sizes(layers=3, width=1024, inner=2504)):
        decoder = Decoder(sizes, low=low)
        kernel = decoder.kernel(target)
        found = decoder.steps(kernel)
        assert difference(found, decoder.in_torch()) < 3e-3
        assert_same_bits(decoder.steps(kernel), found)
        assert decoder.watchdog.gave_up() is None
        assert decoder.differing(kernel, 5, found[5], 200) == 0


@pytest.mark.gpu
def test_weights_of_16_bits_behind_those_of_8_on_a_gpu() -> None:
    """A slot of the ring still holds bytes that are no numbers in 16 bits, where a row is shorter than a slot."""
    from tests.engine.kernel.test_reliability import Decoder, difference

    decoder = Decoder(Sizes(layers=3, width=232, inner=200, vocabulary=20_000), low=LOW, mixed=True)
    found = decoder.steps(decoder.kernel())
    assert difference(found, decoder.in_torch()) < 3e-3
    assert decoder.watchdog.gave_up() is None
