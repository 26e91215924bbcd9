"""Which engine computes decode steps: what it opens and keeps in memory, what is refused, and what it falls back to."""

import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import onnx
import pytest
import torch

import accel
from accel.config.presets import runtime_preset
from accel.config.schema import Config
from accel.engine.kernel import launch
from accel.engine.planning.plan import DOMAIN
from accel.engine.step import PlannedStep
from accel.errors import AccelError, DeviceMemoryError
from accel.evaluation.verification_result import VerificationResult
from accel.models.loading import open_model, verification_of
from accel.runtime import decode_step, dynamic_cache, engine_choice, static_cache
from accel.runtime.cuda_graph import CudaGraphCallable
from accel.runtime.decode_step import FusedStep
from accel.runtime.layout import DeployableFiles, first_variant
from accel.runtime.session import open_session
from accel.runtime.weights import SharedWeights
from accel.stages import verify
from tests.conftest import Build

STATIC = runtime_preset("cpu", static=True, buckets=[8, 32])
FUSED = replace(STATIC, engine="fused")
IDS = torch.tensor([[5, 6, 7]])
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(build: Build) -> Path:
    """Unverified bundle of the trained T5, whose weights are in an external data file."""
    return build("accel://t5-g2p", "merge", ("runtime.static=true",))[1]["merge"].folder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the graphs that sessions of ONNX Runtime are opened for."""
    names: list[str] = []

    def record(path: Path, *arguments: Any) -> Any:
        names.append(path.name)
        return open_session(path, *arguments)

    for module in (dynamic_cache, static_cache):
        monkeypatch.setattr(module, "open_session", record)
    return names


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> DeployableFiles:
    """Copy of the bundle that may be changed."""
    shutil.copytree(folder, tmp_path / "copy")
    return first_variant(tmp_path / "copy")


@pytest.fixture
def verified_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `auto` stand for `fused`, as on a GPU that can run the kernel, for a deployable verified with it."""
    monkeypatch.setattr(engine_choice, "verified_engine", lambda files: "fused")
    monkeypatch.setattr(launch, "unsupported", lambda device: None)


def rename_operator(files: DeployableFiles) -> None:
    """Let the static decode graph have an operator that the engine doesn't have."""
    model = onnx.load(files.static_decode, load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "Relu")
    node.op_type, node.name = "Softplus", "odd"
    files.static_decode.write_bytes(model.SerializeToString())


def test_no_session_for_the_static_decode_graph(folder: Path, opened: list[str]) -> None:
    """The fused engine needs none, and gives the tokens of the session."""
    static_decode = first_variant(folder).static_decode.name
    with open_model(folder, STATIC) as model:
        expected = model.generate(IDS, max_new_tokens=20, num_beams=2)
    assert static_decode in opened
    opened.clear()
    with open_model(folder, FUSED) as model:
        assert torch.equal(model.generate(IDS, max_new_tokens=20, num_beams=2), expected)
        assert model.runtime.spare_buffers, "no static caches were used"
    assert sorted(opened) == ["decoder_cross_cache.onnx", "decoder_model_merged.onnx", "encoder_model.onnx"]


def test_weights_are_in_memory_once(folder: Path) -> None:
    """What the plan's executor holds are views of what ONNX Runtime's sessions read, but for small constants."""
    path, weights = first_variant(folder).static_decode, SharedWeights(CPU)
    shared = {value.data_ptr() for value in weights.initializers(first_variant(folder).decoder).values()}
    step = FusedStep(path, weights, False, no_session)
    lengths = {"batch_size": 2, "bucket": 8, "source": 16}
    inputs = {name: zeros(step, name, axes, lengths) for name, axes in step.inputs.items()}
    outputs = {name: zeros(step, name, axes, {**lengths, "new": 1, "kept": 1}) for name, axes in step.outputs.items()}
    step.bind(inputs, outputs)()
    executor = step.planned._executor
    (program,) = executor._programs.values()
    read = {id(each): each for node in program.steps for each in node.inputs if isinstance(each, torch.Tensor)}
    held = [*read.values(), *executor._constants.values(), *executor._placed.values()]
    large = [tensor for tensor in held if tensor.untyped_storage().nbytes() > 4096]
    assert sum(tensor.numel() for tensor in {tensor.data_ptr(): tensor for tensor in large}.values()) > 100_000
    assert {tensor.untyped_storage().data_ptr() for tensor in large} <= shared


def no_session(path: Path) -> NoReturn:
    raise AssertionError(f"a session is opened for {path.name}")


def test_what_the_kernel_cannot_run(folder: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A session of ONNX Runtime takes these steps, opened once, when the first of them comes."""
    static_decode, bound = first_variant(folder).static_decode.name, []

    def bind(step: PlannedStep, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> Any:
        rows = len(inputs["input_ids"])
        bound.append(rows)
        return None if rows > 1 else by_plan(step, inputs, outputs)

    by_plan = PlannedStep.bind
    monkeypatch.setattr(PlannedStep, "bind", bind)
    with open_model(folder, STATIC) as model:
        expected = model.generate(IDS, max_new_tokens=20, num_beams=2), model.generate(IDS, max_new_tokens=20)
    opened.clear()
    with open_model(folder, FUSED) as model:
        assert torch.equal(model.generate(IDS, max_new_tokens=20), expected[1])
        assert static_decode not in opened
        assert torch.equal(model.generate(IDS, max_new_tokens=20, num_beams=2), expected[0])
        assert set(bound) == {1, 2}
        assert opened.count(static_decode) == 1


def zeros(step: FusedStep, name: str, axes: tuple[int | str, ...], lengths: Mapping[str, int]) -> torch.Tensor:
    """Return zeros for an input or output."""
    shape = [axis if isinstance(axis, int) else lengths[axis] for axis in axes]
    return torch.zeros(shape, dtype=step.dtype(name))


@pytest.mark.parametrize("engine", ["fussed", "", "FUSED", 3])
def test_unknown_engines(engine: str | int, folder: Path) -> None:
    with pytest.raises(AccelError) as error:
        accel.load(folder, "cpu", engine=engine)
    message = str(error.value)
    assert message.startswith(f"unknown runtime.engine: {str(engine)!r}")
    assert message.endswith("Choices: auto, fused, onnxruntime")


def test_without_static_caches(folder: Path) -> None:
    """The engine asked for by name is refused; `auto` takes the other one."""
    with pytest.raises(AccelError, match=r"engine=fused needs static caches: runtime\.static=false\. Take static=true"):
        accel.load(folder, "cpu", engine="fused")
    with accel.load(folder, "cpu", engine="auto", check=False) as model:
        assert model.runtime.engine == "onnxruntime"


def test_without_a_static_decode_graph(
    copied: DeployableFiles, verified_fused: None, caplog: pytest.LogCaptureFixture
) -> None:
    copied.static_decode.unlink()
    with pytest.raises(
        AccelError, match=r"needs static caches: .*no decoder_static_decode\.onnx\. Build it again with"
    ):
        open_model(copied.folder, FUSED)
    with open_model(copied.folder, replace(FUSED, engine="auto")) as model:
        assert model.runtime.engine == "onnxruntime"
    assert (
        "the folder holds no decoder_static_decode.onnx. Build it again with convert.static_decode=true" in caplog.text
    )


def test_a_graph_that_it_cannot_run(
    copied: DeployableFiles, verified_fused: None, caplog: pytest.LogCaptureFixture
) -> None:
    """The operator is named; `auto` warns once and takes ONNX Runtime, which runs the graph."""
    rename_operator(copied)
    with pytest.raises(AccelError, match=r"^runtime.engine=fused can't run decoder_static_decode\.onnx: .*Softplus"):
        open_model(copied.folder, FUSED)
    with open_model(copied.folder, replace(FUSED, engine="auto")) as model:
        assert model.runtime.engine == "onnxruntime"
        assert model.generate(IDS, max_new_tokens=3).shape[1] == 4
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "runtime.engine=auto: fused can't run decoder_static_decode.onnx, onnxruntime takes its place" in warnings[0]
    assert "Softplus" in warnings[0]


def test_no_memory_is_no_reason_to_fall_back(
    folder: Path, verified_fused: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second copy of the engine's memory wouldn't fit either."""

    def fail(*_: Any) -> None:
        raise DeviceMemoryError("out of memory")

    monkeypatch.setattr(decode_step, "FusedStep", fail)
    with pytest.raises(DeviceMemoryError):
        open_model(folder, replace(FUSED, engine="auto"))


def test_a_kernel_that_gave_up_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step names the operation, once."""
    with open_model(folder, FUSED) as model:
        expected = model.generate(IDS, max_new_tokens=4)
        planned = model.runtime._graphs.decode.planned
        found = [1]
        monkeypatch.setattr(planned, "_watchdog", SimpleNamespace(gave_up=lambda: found.pop() if found else None))
        second = [node.name for node in planned.plan.graph.nodes if node.kind[0] == DOMAIN][1]
        with pytest.raises(AccelError, match=re.escape(f"waited in vain for the input of {second}: its results")):
            model.generate(IDS, max_new_tokens=4)
        assert torch.equal(model.generate(IDS, max_new_tokens=4), expected)


def test_auto(folder: Path, verified_fused: None) -> None:
    with open_model(folder, replace(FUSED, engine="auto")) as model:
        assert model.runtime.engine == "fused"


def test_replays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where steps can be captured, buffers call them through what captures them; else directly."""
    for capturable in (False, True):
        with open_model(folder, FUSED) as model:
            monkeypatch.setattr(model.runtime._graphs.decode, "capturable", capturable)
            buffers = model.runtime.take_buffers(1, 8, model.runtime._constant_shapes(1, 16))
            assert isinstance(buffers.run_decode, CudaGraphCallable) is capturable


def test_auto_is_the_first_engine_that_passes(
    build: Build, tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where a device can run both engines, `verify` tries the fused one first, and says why it takes the other."""
    monkeypatch.setattr(verify, "engines_to_verify", lambda requested, device, dtype: ["fused", "onnxruntime"])
    judge, judged = verify.judge, []

    def strict(config: Config, result: VerificationResult) -> None:
        judged.append((result.engine, config.runtime.fused_prefill))
        judge(config, result)
        if result.engine == "fused" and config.verify.inputs == 3:
            result.failures.append("an error was planted")

    monkeypatch.setattr(verify, "judge", strict)
    for inputs, engine in ((2, "fused"), (3, "onnxruntime")):
        overrides = ("runtime.static=true", f"verify.inputs={inputs}", "verify.latency=false")
        _, made = build(tiny, "verify", overrides)
        result = verification_of(made["verify"].folder)
        assert result is not None
        assert (result["engine"], result["passed"], result["failures"]) == (engine, True, [])
    assert judged == [("fused", 0), ("fused", 0), ("onnxruntime", 0)]  # prompts of any length by the engine
    assert "by fused are not verified, onnxruntime is next: an error was planted" in caplog.text


def test_verification_names_the_engine(build: Build, tiny: Path) -> None:
    """`verify` runs the engine, whose name is in the result, the certificate, the model card and the summary."""
    _, made = build(tiny, "verify", ("runtime.static=true", "runtime.engine=fused"))
    files = first_variant(made["verify"].folder)
    verification = verification_of(files.folder)
    assert verification is not None
    assert verification["engine"] == made["verify"].summary["engine"] == "fused"
    assert set(verification["identical"].values()) == {1.0}
    assert "by the engine fused" in files.certificate_page.read_text()
    assert "native on cpu, engine fused" in (files.folder / "README.md").read_text()
    with accel.load(files.folder) as model:  # as it was built
        assert model.runtime.engine == "fused"
    _, other = build(tiny, "verify", ("runtime.static=true",))
    assert other["verify"].key != made["verify"].key
    assert other["verify"].manifest.upstream["merge"] == made["verify"].manifest.upstream["merge"], (
        "no engine changes the graphs"
    )
    result = verification_of(other["verify"].folder)
    assert result is not None
    assert result["engine"] == "onnxruntime"
