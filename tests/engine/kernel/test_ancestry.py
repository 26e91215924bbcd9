"""The kernel on a GPU reads entries from the rows that computed them, as the operation in torch does."""

import pytest
import torch
from torch import Tensor

from accel.engine.executor import Executor
from accel.engine.kernel.launch import Kernel, Target
from accel.engine.kernel.program import Builder
from accel.engine.kernel.watchdog import Watchdog
from accel.engine.planning.ancestry import ANCESTRY, by_ancestry
from tests.engine.kernel.layers import Sizes, begin_step, layered, tensors_of

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
STEPS = {48: (1, 20, 30), 1100: (126, 129, 512, 1000)}  # length of the caches -> steps; a slot of the ring has 128 keys
TARGETS = {"all": None, "99 KB without bulk copies": Target(99 * 1024, False)}


def table(rows: int, tensors: dict[str, Tensor], length: int, generator: torch.Generator) -> Tensor:
    """Return a table of runs of random rows; what a step writes is of its own row, int32 [rows, length]."""
    drawn = torch.randint(0, rows, (rows, length), generator=generator)
    begins = torch.rand(rows, length, generator=generator) < 0.3
    begins[:, 0] = True
    found = drawn.gather(1, torch.where(begins, torch.arange(length), 0).cummax(1).values)
    own, positions = torch.arange(rows)[:, None], tensors["position"].cpu()
    found[:, positions] = own
    return torch.where(torch.arange(length) < positions[:, None], found, own).int().to(DEVICE)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("size", [16, 64, 80])
@pytest.mark.parametrize("rows", [2, 4, 8])
@pytest.mark.parametrize("length", STEPS)
def test_logits(length: int, rows: int, size: int, target: str) -> None:
    """Those of the operation in torch; of a table of own rows, to the bit those of the kernel without a table."""
    sizes = Sizes(layers=2, size=size, length=length)
    plain, blocks = layered(sizes), torch.cuda.get_device_properties(DEVICE).multi_processor_count
    found, watchdog = by_ancestry(plain), Watchdog(DEVICE)
    tensors = tensors_of(plain, sizes, rows, DEVICE, filled=True)
    own = torch.arange(rows, dtype=torch.int32, device=DEVICE)[:, None].repeat(1, length)
    tensors[ANCESTRY] = own.clone()
    programs = [Builder(plan, tensors, rows, DEVICE, {}, blocks).program for plan in (plain, found)]
    kernels = [Kernel(program, DEVICE, watchdog, target=TARGETS[target]) for program in programs]
    executor, generator = Executor(found.graph, DEVICE), torch.Generator().manual_seed(0)
    outputs = {name: tensors[name] for name in plain.graph.outputs}
    for step in STEPS[length]:
        begin_step(tensors, step)
        logits = []
        for kernel in kernels:  # both write the same entries
            tensors[ANCESTRY].copy_(own)
            kernel()
            logits.append(tensors["logits"].clone())
        assert torch.equal(logits[0].view(torch.int16), logits[1].view(torch.int16))
        tensors[ANCESTRY].copy_(table(rows, tensors, length, generator))
        kernels[1]()
        by_table = tensors["logits"].clone()
        executor.run({name: tensors[name] for name in found.graph.inputs}, outputs)
        error = (by_table.float() - tensors["logits"].float()).norm() / tensors["logits"].float().norm()
        assert error < 3e-3, step
        assert (by_table.float() - logits[0].float()).norm() / logits[0].float().norm() > 0.02, step
    assert watchdog.gave_up() is None
