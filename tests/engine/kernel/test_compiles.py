"""The kernel compiles for the plans of whole families, without a GPU, and keeps all that threads hold in registers."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from accel.engine.kernel.launch import Target, source
from accel.engine.kernel.program import Builder
from accel.engine.nodes import value_specs
from accel.engine.planning.ancestry import ANCESTRY, by_ancestry
from accel.engine.planning.plan import Plan
from accel.runtime.layout import BUCKET
from tests.engine.kernel.nvrtc import compile_for
from tests.engine.planning.test_families import EXPERTS, plan_of
from tests.engine.test_families import CPU, FP16, LENGTHS, Make, Steps, families, make
from tests.families import FAMILIES

__all__ = ["make"]  # the fixture
KIB = 1024
TARGETS = {  # with the shared memory that a block may have: https://docs.nvidia.com/cuda/cuda-c-programming-guide
    "sm_80": Target(163 * KIB, bulk=False),
    "sm_89": Target(99 * KIB, bulk=False),
    "sm_90": Target(227 * KIB, bulk=True),
}
SM_90 = TARGETS["sm_90"]
BLOCKS = 132
KINDS = ("t5", "whisper", "gpt2", "llama", "gemma2", "bloom", "falcon-alibi", "gptj", "qwen3")  # one of each kind


def builder_of(path: Path, rows: int, weights: dict[str, Tensor], beams: bool = False) -> tuple[Plan, Builder]:
    """Return the plan of a static decode graph, and what builds the kernel's program of it.

    Args:
        path: The graph.
        rows: Rows of the batch.
        weights: Filled with the weights in the kernel's layout.
        beams: Entries are read from the rows that computed them.
    """
    lengths = {**LENGTHS, "batch_size": rows}
    steps = Steps(path)
    tensors = dict(steps.inputs)
    for specs in value_specs(path):
        for name, spec in specs.items():
            shape = [lengths[axis] if isinstance(axis, str) else axis for axis in spec.axes]
            tensors[name] = torch.zeros(shape, dtype=spec.dtype)
    tensors |= {output: tensors[name] for name, output in steps.cache.items()}  # updated in place
    plan = plan_of(path)
    if beams:
        plan, tensors[ANCESTRY] = by_ancestry(plan), torch.zeros(rows, lengths[BUCKET], dtype=torch.int32)
    return plan, Builder(plan, tensors, rows, CPU, weights, BLOCKS)


def source_of(make: Make, rows: int, target: Target = SM_90, beams: bool = False) -> str:
    """Return the kernel's source for a family's static decode graph in FP16."""
    return source(builder_of(make(*FP16).static_decode, rows, {}, beams)[1].program, target)


def check(make: Make, rows: int, architecture: str, beams: bool = False) -> None:
    """Compile a family's kernel, and print what it needs."""
    found = compile_for(source_of(make, rows, TARGETS[architecture], beams), architecture)
    print(f"{architecture}, {rows} rows: {found.registers} registers, {found.spilled} bytes spilled")
    assert found.spilled == 0, found.log


@families(*(name for name in FAMILIES if name != EXPERTS))
def test_compiles(make: Make) -> None:
    check(make, 1, "sm_90")


@pytest.mark.slow
@families(*(name for name in FAMILIES if name != EXPERTS))
@pytest.mark.parametrize("architecture", ["sm_80", "sm_89"])
def test_compiles_for_earlier_architectures(make: Make, architecture: str) -> None:
    check(make, 1, architecture)


@families(*KINDS)
def test_compiles_for_eight_rows(make: Make) -> None:
    check(make, 8, "sm_90")


@pytest.mark.slow
@families(*KINDS)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_89"])
def test_compiles_for_eight_rows_and_earlier_architectures(make: Make, architecture: str) -> None:
    check(make, 8, architecture)


@pytest.mark.slow
@families("gpt2", "gemma2")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_compiles_for_beams(make: Make, architecture: str) -> None:
    check(make, 4, architecture, beams=True)


@families("gpt2")
def test_compiles_for_bfloat16(make: Make) -> None:
    text = source_of(make, 2)
    assert "#define BF16 0\n" in text
    assert compile_for(text.replace("#define BF16 0\n", "#define BF16 1\n"), "sm_90").spilled == 0


@families("gpt2")
@pytest.mark.parametrize("size", [80, 96])
def test_head_sizes_that_do_not_divide_a_slot(make: Make, size: int) -> None:
    """Each warp takes an equal share of the keys in a slot of the ring, and none is left over."""
    text = source_of(make, 1)
    for old, new in (("enum { D = 16,", f"enum {{ D = {size},"), ("MAX_HEAD 16\n", f"MAX_HEAD {size}\n")):
        assert old in text
        text = text.replace(old, new)
    assert compile_for(text, "sm_90").spilled == 0


@families("gpt2")
def test_what_does_not_compile_is_refused(make: Make) -> None:
    """The test above can fail: by an error, and by too few registers."""
    text = source_of(make, 1)
    with pytest.raises(RuntimeError, match="error"):
        compile_for(text.replace("#define ROWS 1\n", "#define ROWS none\n"), "sm_90")
    few = text.replace("__launch_bounds__(THREADS + 32, 1)", "__launch_bounds__(THREADS + 32, 4)")
    assert few != text
    assert compile_for(few, "sm_90").spilled > 0
