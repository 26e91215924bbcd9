"""A deployable for CUDA stores weights as the kernel reads them: it keeps a second copy of none."""

from pathlib import Path

from torch import Tensor

from tests.engine.kernel.test_compiles import builder_of
from tests.engine.planning.test_families import EXPERTS
from tests.engine.test_families import FP16, Make, families, make
from tests.families import FAMILIES

__all__ = ["make"]  # the fixture


def matrix_bytes(path: Path) -> tuple[int, int]:
    """Return the bytes of matrices that the kernel reads for a static decode graph, and how many of them are copies."""
    weights: dict[str, Tensor] = {}
    plan, _ = builder_of(path, 1, weights)
    stored = {tensor.data_ptr() for tensor in plan.graph.constants.values()}
    matrices = [tensor for tensor in weights.values() if tensor.ndim == 2]
    return sum(tensor.nbytes for tensor in matrices), sum(
        tensor.nbytes for tensor in matrices if tensor.data_ptr() not in stored
    )


@families(*(name for name in FAMILIES if name != EXPERTS))
def test_no_weight_is_copied(make: Make) -> None:
    read, copied = matrix_bytes(make(*FP16).static_decode)
    assert read > 100_000
    assert copied == 0


@families("gpt2")
def test_weights_of_a_deployable_for_the_cpu_are_copied(make: Make) -> None:
    """All but the tied embedding."""
    read, copied = matrix_bytes(make(*FP16, "convert.transpose_weights=false").static_decode)
    assert copied == read - 120 * 64 * 2
