"""A decode step of every family: the executor's logits and written caches against ONNX Runtime's."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from filelock import FileLock
from torch import Tensor

from accel import testing
from accel.engine.dtypes import DTYPES
from accel.engine.executor import Executor
from accel.engine.nodes import read_graph
from accel.graph import files
from accel.graph.precision.emulate import emulate_half
from accel.graph.precision.formats import FORMATS
from accel.runtime.cuda_graph import CudaGraphCallable
from accel.runtime.io_binding import BoundSession
from accel.runtime.layout import BUCKET, POSITION, WINDOW, DeployableFiles, first_variant
from accel.runtime.session import SessionSettings, open_session
from accel.runtime.streams import on_shared_stream
from accel.runtime.weights import SharedWeights
from tests.conftest import Build
from tests.families import FAMILIES

CPU, META = torch.device("cpu"), torch.device("meta")
LENGTHS = {"batch_size": 3, BUCKET: 24, f"{WINDOW}8": 10, "source": 7, "new": 1, "kept": 1}
POSITIONS = (5, 6, 7, 13)  # of the new tokens; exports are traced at others; the last ones are behind a window's cache
STATIC = (  # as `accel.testing` makes it
    "convert.static_decode=true",
    "convert.fuse_transposed_matmul=true",
    "convert.fuse_attention=[static_decode]",
)
FP16 = ("precision=fp16", "merge.strategy=three_branch", "convert.transpose_weights=true")  # as for a GPU
FAST = {"gpt2", "whisper"}  # exported in the fast tier anyway

Make = Callable[..., DeployableFiles]


@pytest.fixture
def make(request: pytest.FixtureRequest, shared: Path, build: Build) -> Make:
    """Function that builds the merged decoder of a family, given more overrides."""
    name = request.param
    checkpoint = shared / "families" / name / "checkpoint"

    def run(*overrides: str) -> DeployableFiles:
        with FileLock(shared / f"{name}.lock"):
            if not (checkpoint / "config.json").is_file():
                testing.random_model(FAMILIES[name]).save_pretrained(checkpoint)
            artifacts = build(checkpoint, "merge", (f"model.name={name}", *STATIC, *overrides))[1]
        return first_variant(artifacts["merge"].folder)

    return run


def families(*names: str) -> Any:
    """Parametrize by families: each in one worker, and only those of `FAST` in the fast tier."""
    parameters = []
    for name in names:
        marks = [pytest.mark.xdist_group(name)]
        parameters.append(pytest.param(name, marks=marks if name in FAST else [*marks, pytest.mark.slow]))
    return pytest.mark.parametrize("make", parameters, indirect=True)


class Steps:
    """Inputs of decode steps of a padded batch, as a runtime would write them.

    Args:
        path: The static decode graph.
    """

    def __init__(self, path: Path) -> None:
        graph = ir.load(path).graph
        self.generator = torch.Generator().manual_seed(7)
        self.vocabulary = int(graph.outputs[0].shape[-1])
        self.inputs = {value.name: self.random(value) for value in graph.inputs if not value.is_initializer()}
        outputs = [value.name for value in graph.outputs]
        self.cache = {}  # cache input -> output
        for name in self.inputs:
            output = name.replace("past_key_values", "present")
            if output != name and output in outputs:
                self.cache[name] = output
        for name, mask in self.inputs.items():
            if name == "encoder_attention_mask":
                mask.fill_(1)
                mask[1, -3:] = 0  # padded on the right

    def random(self, value: ir.Value) -> Tensor:
        """Return random numbers for an input; zeros if it holds integers."""
        shape = [dim if isinstance(dim, int) else LENGTHS[dim.value] for dim in value.shape]
        dtype = DTYPES[int(value.dtype)]
        if not dtype.is_floating_point:
            return torch.zeros(shape, dtype=dtype)
        return torch.randn(shape, generator=self.generator).to(dtype)

    def advance(self, position: int) -> None:
        """Write the inputs for one token after `position` others, the second row of which begins with two pads."""
        ids = self.inputs["input_ids"]
        ids.copy_(torch.randint(3, self.vocabulary, ids.shape, generator=self.generator))
        self.inputs[POSITION].fill_(position)
        if self.inputs[POSITION].ndim:  # one position a row
            self.inputs[POSITION][-1] -= 1
        if "attention_mask" in self.inputs:
            mask = self.inputs["attention_mask"].zero_()
            mask[:, : position + 1] = 1
            mask[1, :2] = 0
        if "position_ids" in self.inputs:
            self.inputs["position_ids"].fill_(position)
            self.inputs["position_ids"][1] -= 2


def differences(path: Path, reference: Path, dtype: torch.dtype) -> dict[str, float]:
    """Run several steps by the executor, with caches written in place, and by ONNX Runtime.

    Args:
        path: The static decode graph.
        reference: Graph for ONNX Runtime that computes the same.
        dtype: Dtype to hand ONNX Runtime's outputs back in.

    Returns:
        Output -> largest difference in all steps, divided by the largest magnitude.
    """
    session = BoundSession(open_session(reference, SessionSettings()), CPU)
    executor = Executor(read_graph(path, SharedWeights(CPU).tensors(path)), CPU)
    ours, theirs = Steps(path), Steps(path)
    bound = {output: ours.inputs[name] for name, output in ours.cache.items()}
    assert len(bound) == 4, "two layers have four caches that a step writes"
    largest: dict[str, float] = {}
    for position in POSITIONS:
        ours.advance(position)
        theirs.advance(position)
        found = executor.run(ours.inputs, bound)
        expected = dict(zip(session.outputs, session(theirs.inputs, list(session.outputs)), strict=True))
        assert set(found) == set(expected)
        for name, value in expected.items():
            difference = (found[name].float() - value.float()).abs().max() / value.float().abs().max()
            largest[name] = max(largest.get(name, 0.0), float(difference))
        for name, output in theirs.cache.items():
            assert found[output] is ours.inputs[name]
            theirs.inputs[name] = expected[output].to(dtype)
    return largest


@families(*FAMILIES)
def test_fp32(make: Make) -> None:
    """The same up to rounding in FP32."""
    path = make("precision=fp32").static_decode
    assert max(differences(path, path, torch.float32).values()) < 1e-5


@families(*FAMILIES)
def test_fp16(make: Make, tmp_path: Path) -> None:
    """The same up to rounding in FP16 as the emulation that `verify` runs where ONNX Runtime would compute in FP32."""
    path = make(*FP16).static_decode
    model = files.load(path)
    emulate_half(model)
    files.save(model, tmp_path / path.name)
    assert max(differences(path, tmp_path / path.name, torch.float16).values()) < 1e-2


@families(*(name for name in FAMILIES if name != "mixtral"))
def test_a_step_waits_for_no_data(make: Make) -> None:
    """A step runs on tensors without data, so it reads nothing back, and on a device it works on that device alone."""
    path = make("precision=fp32").static_decode
    weights = {name: weight.to(META) for name, weight in SharedWeights(CPU).tensors(path).items()}
    executor, steps = Executor(read_graph(path, weights), META), Steps(path)
    assert executor.obstacle is None
    inputs = {name: value.to(META) for name, value in steps.inputs.items()}
    for _ in range(2):
        found = executor.run(inputs, {output: inputs[name] for name, output in steps.cache.items()})
        assert found["logits"].shape == (LENGTHS["batch_size"], 1, steps.vocabulary)
        assert all(value.device == META for value in found.values())


@families("mixtral")
def test_a_mixture_of_experts_is_not_captured(make: Make) -> None:
    path = make("precision=fp32").static_decode
    obstacle = Executor(read_graph(path, SharedWeights(CPU).tensors(path)), CPU).obstacle
    assert obstacle is not None
    assert "(NonZero) has an output shape that depends on its input's values" in obstacle


@families("t5", "llama")
def test_bf16(make: Make, tmp_path: Path) -> None:
    """The same up to rounding in BF16 as its emulation: ONNX Runtime has no CPU kernels for it."""
    path = make("precision=bf16", "merge.strategy=three_branch").static_decode
    model = files.load(path)
    emulate_half(model, FORMATS["bfloat16"])
    files.save(model, tmp_path / path.name)
    assert max(differences(path, tmp_path / path.name, torch.bfloat16).values()) < 5e-2


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@families("t5", "gpt2", "gemma2", "whisper")
def test_captured_on_cuda(make: Make, precision: str) -> None:
    """Replays of a captured step compute what steps on the CPU do, and no step waits for the device."""
    path, cuda = make(f"precision={precision}").static_decode, torch.device("cuda", 0)
    on_cpu, steps = Executor(read_graph(path, SharedWeights(CPU).tensors(path)), CPU), Steps(path)
    executor = Executor(read_graph(path, SharedWeights(cuda).tensors(path)), cuda)
    inputs = {name: value.to(cuda) for name, value in steps.inputs.items()}
    outputs = {output: inputs[name] for name, output in steps.cache.items()}
    steps.advance(POSITIONS[0])
    outputs["logits"] = torch.empty_like(on_cpu.run(steps.inputs)["logits"], device=cuda)
    replay = CudaGraphCallable(partial(executor.run, inputs, outputs), cuda, "a step")
    for run, position in enumerate(range(5, 10)):
        steps.advance(position)
        for name, value in steps.inputs.items():
            if name not in steps.cache:
                inputs[name].copy_(value)
        if run == 1:  # the first run prepares the graph, and the third one captures it
            torch.cuda.set_sync_debug_mode("error")
            executor.run(inputs, outputs)
            torch.cuda.set_sync_debug_mode("default")
        else:
            with on_shared_stream(cuda):  # torch captures on no default stream
                replay()
        assert replay.captured is (run > 1)
        expected = on_cpu.run(steps.inputs, {output: steps.inputs[name] for name, output in steps.cache.items()})
        for name, value in expected.items():
            difference = (outputs[name].cpu().float() - value.float()).abs().max() / value.float().abs().max()
            assert difference < (1e-4 if precision == "fp32" else 1e-2), name
