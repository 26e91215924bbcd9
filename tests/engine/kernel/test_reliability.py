"""The kernel on a GPU gives the same numbers whatever happens around it, and a defect ends with an error."""

from collections.abc import Iterable
from functools import cache

import pytest
import torch
from torch import Tensor

from accel.engine.executor import Executor
from accel.engine.kernel.launch import Kernel, Target
from accel.engine.kernel.program import Builder
from accel.engine.kernel.records import FIRST_PART, PART
from accel.engine.kernel.watchdog import Watchdog
from accel.engine.low_bits import LowBits
from tests.engine.kernel.layers import Sizes, begin_step, layered, tensors_of

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
SIZES, ROWS, STEPS = Sizes(), 2, 8
LONG = Sizes(layers=1, length=1100, source=1500)
LONG_STEPS = (0, 126, 127, 128, 254, 255, 256, 509, 511, 513, 767, 1000, 1096)  # a slot of the ring has 128 keys
HEADS_OUT = 3  # pointer of an attention's output in its record
NAN_WITHOUT_TAG = 0x7E007E00  # two halves


def block_count() -> int:
    return torch.cuda.get_device_properties(DEVICE).multi_processor_count


class Decoder:
    """A plan with random weights, bound to tensors on the GPU."""

    def __init__(
        self,
        sizes: Sizes = SIZES,
        seed: int = 0,
        filled: bool = False,
        low: LowBits | None = None,
        mixed: bool = False,
    ) -> None:
        self.plan = layered(sizes, seed, low, mixed)
        self.arguments = (self.plan, sizes, ROWS, DEVICE, filled)
        self.tensors = tensors_of(*self.arguments)
        self.weights: dict[str, Tensor] = {}
        self.program = Builder(self.plan, self.tensors, ROWS, DEVICE, self.weights, block_count()).program
        self.watchdog = Watchdog(DEVICE)
        self.names = [node.name for node in self.plan.graph.nodes]

    def kernel(self, target: Target | None = None, **switches: int) -> Kernel:
        return Kernel(self.program, DEVICE, self.watchdog, switches, target)

    def words(self) -> list[Tensor]:
        """Return the tensors of words that blocks exchange."""
        position = self.tensors["position"].data_ptr()
        kept = {each.data_ptr(): each for each in self.program.keep if each.dtype == torch.int64}
        return [each for address, each in kept.items() if address != position]

    def poison(self) -> None:
        """Write NaN wherever blocks exchange numbers."""
        for words in self.words():
            words.fill_(NAN_WITHOUT_TAG)

    def step(self, kernel: Kernel, step: int) -> Tensor:
        """Return the logits of a step."""
        begin_step(self.tensors, step)
        kernel()
        return self.tensors["logits"].clone()

    def steps(self, kernel: Kernel, steps: Iterable[int] = range(STEPS)) -> Tensor:
        """Return the logits of some steps."""
        return torch.stack([self.step(kernel, step) for step in steps])

    def in_torch(self, steps: Iterable[int] = range(STEPS)) -> Tensor:
        """Return the logits of some steps by the operations in torch."""
        tensors, found = tensors_of(*self.arguments), []
        for name in self.plan.graph.inputs:
            tensors[name].nan_to_num_()  # torch reads the whole caches
        executor = Executor(self.plan.graph, DEVICE)
        for step in steps:
            begin_step(tensors, step)
            feeds = {name: tensors[name] for name in self.plan.graph.inputs}
            executor.run(feeds, {name: tensors[name] for name in self.plan.graph.outputs})
            found.append(tensors["logits"].clone())
        return torch.stack(found)

    def differing(self, kernel: Kernel, step: int, wanted: Tensor, repeats: int) -> int:
        """Return how many repeats of a step give other bits, with every exchanged number poisoned before."""
        count = torch.zeros((), dtype=torch.int64, device=DEVICE)
        for _ in range(repeats):
            self.poison()
            count += (self.step(kernel, step).view(torch.int16) != wanted.view(torch.int16)).any()
        assert self.watchdog.gave_up() is None
        return int(count)


@cache
def expected(seed: int = 0) -> Tensor:
    """Return the logits of the first steps of a decoder that runs alone."""
    decoder = Decoder(seed=seed)
    found = decoder.steps(decoder.kernel())
    assert decoder.watchdog.gave_up() is None
    return found


def assert_same_bits(found: Tensor, wanted: Tensor) -> None:
    assert torch.equal(found.view(torch.int16), wanted.view(torch.int16))


def difference(found: Tensor, wanted: Tensor) -> float:
    """Return the norm of the difference relative to that of what is wanted."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def test_logits() -> None:
    """All operations give torch's numbers, rounded to FP16 between them, and weights of another seed give others."""
    assert difference(expected(), Decoder().in_torch()) < 3e-3
    assert difference(expected(1), expected()) > 0.1


def test_earlier_architectures() -> None:
    """What they copy by, and how little shared memory they may have, changes no bit."""
    decoder = Decoder()
    assert_same_bits(decoder.steps(decoder.kernel(Target(99 * 1024, bulk=False))), expected())


@pytest.mark.parametrize("name", ["0.heads", "1.cross.o"])
def test_a_missing_store(name: str) -> None:
    """A wait for a word that never comes ends. The first operation that waited is named, and later launches work."""
    decoder = Decoder()
    index = decoder.names.index(name)
    operations = decoder.program.operations
    is_product = decoder.program.shapes[operations[index].shape].kind == "product"
    words = operations[index].pointers[FIRST_PART + PART.index("out") if is_product else HEADS_OUT]
    reader = min(i for i, each in enumerate(operations) if i > index and words in list(each.pointers))
    kernel = decoder.kernel(MISSING_STORE=words + 8)
    decoder.step(kernel, 0)
    skipped = decoder.step(kernel, 0)  # behind a launch that gave up
    torch.cuda.synchronize()
    assert decoder.watchdog.gave_up() == reader
    assert decoder.watchdog.gave_up() is None
    assert skipped.isnan().all()
    intact = decoder.kernel()
    intact.state.copy_(kernel.state)  # tags go on, as they would in one kernel
    assert_same_bits(decoder.steps(intact), expected())
    assert decoder.watchdog.gave_up() is None


def test_delays_between_blocks() -> None:
    """1,000 repeats give the same bits, with warps delayed at random."""
    decoder = Decoder()
    slow = decoder.kernel(DELAYS=3000)
    decoder.steps(slow, range(STEPS - 1))
    assert decoder.differing(slow, STEPS - 1, expected()[-1], 1000) == 0


def test_long_caches() -> None:
    """Several blocks share the keys of one head and row, from as many on as are worth it."""
    decoder = Decoder(LONG, filled=True)
    shapes = [shape.body for shape in decoder.program.shapes if shape.kind == "attention"]
    assert all("SPLITS = 8 " in body for body in shapes)
    found = decoder.steps(decoder.kernel(), LONG_STEPS)
    assert difference(found, decoder.in_torch(LONG_STEPS)) < 3e-3
    slow = decoder.kernel(DELAYS=3000)
    assert decoder.differing(slow, LONG_STEPS[-1], found[-1], 200) == 0


def test_tags_that_wrap_around() -> None:
    decoder = Decoder()
    kernel = decoder.kernel()
    decoder.steps(kernel)
    kernel.state[0] = -3  # 2**32 - 3 launches
    assert_same_bits(decoder.steps(kernel), expected())
    assert int(kernel.state[0]) == STEPS - 3


def test_a_restarted_generation() -> None:
    """Tokens of an earlier generation behind the position are not read."""
    decoder = Decoder()
    kernel = decoder.kernel()
    for _ in range(2):
        assert_same_bits(decoder.steps(kernel), expected())


def test_two_models() -> None:
    decoders = [Decoder(seed=0), Decoder(seed=1)]
    kernels = [decoder.kernel() for decoder in decoders]
    for i in range(STEPS):
        for seed, (decoder, kernel) in enumerate(zip(decoders, kernels, strict=True)):
            assert_same_bits(decoder.step(kernel, i), expected(seed)[i])


def test_two_streams() -> None:
    """Launches of two models that wait for nothing but the device don't stop each other."""
    decoders = [Decoder(seed=0), Decoder(seed=1)]
    streams = [torch.cuda.Stream(DEVICE) for _ in decoders]
    kernels = [decoder.kernel() for decoder in decoders]
    for i in range(STEPS):
        for decoder in decoders:
            begin_step(decoder.tensors, i)
        torch.cuda.synchronize()
        for _ in range(50):
            for stream, kernel in zip(streams, kernels, strict=True):
                with torch.cuda.stream(stream):
                    kernel()
        torch.cuda.synchronize()
        for seed, decoder in enumerate(decoders):
            assert_same_bits(decoder.tensors["logits"], expected(seed)[i])
    assert [decoder.watchdog.gave_up() for decoder in decoders] == [None, None]
