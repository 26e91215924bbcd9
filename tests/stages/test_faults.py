"""`verify` finds faults, on trained models and at ill-conditioned inputs, and tolerates PyTorch's own rounding."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from torch import Tensor

from accel.adapters import registry
from accel.config.schema import Config
from accel.evaluation import parity
from accel.evaluation.rounding import FACTOR
from accel.pipeline.runner import Pipeline
from accel.pipeline.store import Artifact
from accel.runtime import layout
from accel.runtime.dynamic_cache import DynamicCacheRuntime, DynamicCacheState
from accel.stages import verify
from tests.conftest import Build
from tests.ill_conditioned import ill_conditioned_llama
from tests.integration.test_precision import saved

StepChange = Callable[[dict[str, Tensor], DynamicCacheState], None]
Array = np.ndarray[Any, Any]
FAST = ("verify.inputs=4", "verify.num_beams=2", "verify.max_new_tokens=16", "verify.references=0")


@dataclass
class Case:
    """Unverified bundle of a model, and the inputs of `verify`."""

    config: Config
    inputs: Mapping[str, Artifact]

    @property
    def has_encoder(self) -> bool:
        """True for encoder-decoder models."""
        return layout.first_variant(self.inputs["merge"].folder).encoder.is_file()

    def examine(self, folder: Path | None = None) -> parity.VerificationResult:
        """Return the verification result of the bundle, or of the one in `folder`."""
        architecture = registry.build(self.config.architecture)
        verification = parity.VerificationResult(precision=self.config.precision.dtype)
        verify.examine(folder or self.inputs["merge"].folder, self.config, self.inputs, architecture, verification)
        return verification

    def edited(self, folder: Path, change: Callable[[onnx.GraphProto], None]) -> Path:
        """Copy the bundle to `folder`, change its decoder, and return the folder."""
        shutil.copytree(self.inputs["merge"].folder, folder)
        decoder = layout.first_variant(folder).decoder
        model = onnx.load(decoder)
        change(model.graph)
        for path in decoder.parent.glob(f"{decoder.name}*"):
            path.unlink()
        onnx.save(model, decoder)
        return folder


@pytest.fixture(scope="module", params=["trained", "ill-conditioned"])
def case(request: pytest.FixtureRequest, build: Build, shared: Path) -> Case:
    if request.param == "trained":  # with a residual stream that FP16 can't hold
        checkpoint, options = saved(shared / "scaled-3e+03-None", 3e3), ["model.references=heldout.tsv"]
        options.append("verify.unique_tokens=false")
    else:
        checkpoint, options = shared / "ill-conditioned", []
        if not (checkpoint / "config.json").exists():
            ill_conditioned_llama().save_pretrained(checkpoint)
    config, _ = build(checkpoint, "merge", [*FAST, *options])
    pipeline = Pipeline(config, registry.build(config.architecture))
    return Case(config, {name: pipeline.artifact(name) for name in verify.input_stages(config)})


pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("faults")]


def test_rounding_is_no_fault(case: Case) -> None:
    """The bundle passes, also where PyTorch's own error exceeds the bound that depends on the depth."""
    verification = case.examine()
    assert verification.failures == []
    assert min(verification.identical.values()) == 1
    beyond = [output for output in verification.outputs.values() if output.error > verification.threshold]
    assert bool(beyond) is not case.has_encoder, "only the ill-conditioned model should exceed the threshold"
    assert all(output.torch_error is not None and output.error <= FACTOR * output.torch_error for output in beyond)


@contextmanager
def every_step(change: StepChange) -> Iterator[None]:
    """Open a context in which `change` is applied to the inputs or caches of every decode step before it runs."""
    real = DynamicCacheRuntime.decode

    def decode(self: DynamicCacheRuntime, inputs: Mapping[str, Tensor], state: DynamicCacheState) -> Tensor:
        changed_inputs = dict(inputs)
        change(changed_inputs, state)
        return real(self, changed_inputs, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DynamicCacheRuntime, "decode", decode)
        yield


def shift_positions(inputs: dict[str, Tensor], state: DynamicCacheState) -> None:
    """Shift all positions by one."""
    inputs["position_ids"] = inputs["position_ids"] + 1


def hide_a_token(inputs: dict[str, Tensor], state: DynamicCacheState) -> None:
    """Mask the first token."""
    if "encoder_attention_mask" in state.constants:
        mask = state.constants["encoder_attention_mask"].clone()
        mask[:, 0] = 0
        state.constants["encoder_attention_mask"], state.bound_constants = mask, None
    else:
        inputs["attention_mask"] = inputs["attention_mask"].clone()
        inputs["attention_mask"][:, 0] = 0


def repeat_a_row(inputs: dict[str, Tensor], state: DynamicCacheState) -> None:
    """Overwrite the newest token of the last layer's caches by the one before it."""
    caches = {name: tensor.clone() for name, tensor in state.self_caches.items()}
    for name in list(caches)[-2:]:
        if caches[name].shape[2] > 1:
            caches[name][:, :, -1] = caches[name][:, :, -2]
    state.self_caches = caches


def with_weight(name: str, change: Callable[[Array], Array]) -> Callable[[onnx.GraphProto], None]:
    """Return an edit that changes the weight `name`."""

    def edit(graph: onnx.GraphProto) -> None:
        (weight,) = [initializer for initializer in graph.initializer if initializer.name == name]
        changed = np.ascontiguousarray(change(numpy_helper.to_array(weight)))
        weight.CopyFrom(numpy_helper.from_array(changed, name))

    return edit


def product_in_half(weight: str) -> Callable[[onnx.GraphProto], None]:
    """Return an edit that casts the result of the product with `weight` to FP16 and back."""

    def edit(graph: onnx.GraphProto) -> None:
        (product,) = [node for node in graph.node if weight in node.input]
        result = product.output[0]
        product.output[0] = f"{result}.exact"
        position = list(graph.node).index(product) + 1
        casts = [
            onnx.helper.make_node("Cast", [f"{result}.exact"], [f"{result}.half"], to=onnx.TensorProto.FLOAT16),
            onnx.helper.make_node("Cast", [f"{result}.half"], [result], to=onnx.TensorProto.FLOAT),
        ]
        for node in reversed(casts):
            graph.node.insert(position, node)

    return edit


BIAS = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight.by_distance"
PRODUCTS = {True: "decoder.block.1.layer.2.DenseReluDense.wo.weight", False: "model.layers.0.mlp.down_proj.weight"}


FAULTS = ("position", "mask", "cache", "weight", "overflow")


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found(case: Case, fault: str, tmp_path: Path) -> None:
    assert_fault_is_found(case, fault, tmp_path)


def assert_fault_is_found(case: Case, fault: str, folder: Path) -> None:
    """Assert that verification fails with a message that names the output, its location, and PyTorch's own error."""
    steps = {"mask": hide_a_token, "cache": repeat_a_row} | ({} if case.has_encoder else {"position": shift_positions})
    edits = {
        "position": with_weight(
            BIAS, lambda table: np.roll(table, 1, 0)
        ),  # T5 counts positions by distance, in a table
        "weight": with_weight(PRODUCTS[case.has_encoder], lambda weight: weight * np.float32(1.001)),
        "overflow": product_in_half(PRODUCTS[case.has_encoder]),
    }
    if fault in steps:
        with every_step(steps[fault]):
            verification = case.examine()
    else:
        verification = case.examine(case.edited(folder / "edited", edits[fault]))
    assert not verification.passed
    worst = max(verification.outputs.values(), key=lambda output: output.rank)
    assert worst.used > 2, worst
    (named, *_) = [failure for failure in verification.failures if f"{worst.error:.1e}" in failure]
    assert f"allowed {worst.allowed:.1e}, PyTorch's own float32 {worst.torch_error:.1e}" in named
    assert worst.location in named
