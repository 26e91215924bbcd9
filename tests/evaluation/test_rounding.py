"""PyTorch's own rounding error: what float64 means for a model, and that an ill-conditioned token is seen as one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from accel.adapters import registry
from accel.adapters.types import Component
from accel.evaluation.component_runner import Shape, component_inputs, signatures, torch_run
from accel.evaluation.rounding import FACTOR, SAMPLES, Evaluator, allowed_errors, in_float64, root_mean_square
from accel.testing import random_model
from tests.families import FAMILIES
from tests.ill_conditioned import TOKEN, ill_conditioned_llama

ARCHITECTURES = Path(__file__).parents[2] / "conf" / "architecture"


class NothingNarrower(TorchDispatchMode):
    """Fails where a float64 tensor becomes a narrower one."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        wide = any(isinstance(one, Tensor) and one.dtype is torch.float64 for one in args)
        if wide and isinstance(made, Tensor) and made.is_floating_point():
            assert made.dtype is torch.float64, func
        return made


@pytest.mark.parametrize("family", FAMILIES)
def test_float64_means_float64(family: str) -> None:
    """Norms, softmax and routers that ask for float32 get none; the model itself is as it was; FP32 is near."""
    model = random_model(FAMILIES[family])
    before = {name: (value.dtype, value.data_ptr()) for name, value in model.named_parameters()}
    adapter = registry.build(OmegaConf.load(ARCHITECTURES / f"{model.config.model_type}.yaml"))
    specs, run = signatures(adapter, model.config), torch_run(adapter, model)
    given = component_inputs(adapter, model.config, Shape(1, 9, 4, 2), torch.Generator().manual_seed(0))
    exact, rounded = (Evaluator(model, specs, run, dtype) for dtype in (torch.float64, torch.float32))
    for component, one in given.items():
        with NothingNarrower():
            right = exact(component, one)
        found = rounded(component, one)
        for output, value in right.items():
            assert value.dtype is torch.float64
            own = root_mean_square(found[output], value, SAMPLES)
            assert 0 < own.max() < 1e-3 * value.abs().max(), output
    assert before == {name: (value.dtype, value.data_ptr()) for name, value in model.named_parameters()}


@pytest.fixture(scope="module")
def errors() -> tuple[Tensor, Tensor, float]:
    """An ill-conditioned Llama's own errors [1, tokens], those of another implementation, and the largest logit."""
    model = ill_conditioned_llama()
    ids = torch.tensor([[5, 9, 40, TOKEN, 11, 30]])
    with torch.no_grad(), in_float64(model):
        right = model(input_ids=ids).logits
    adapter = registry.build(OmegaConf.load(ARCHITECTURES / "llama.yaml"))
    evaluate = Evaluator(model, signatures(adapter, model.config), torch_run(adapter, model), torch.float32)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(ids.shape[1])[None],
        "logits_to_keep": torch.arange(ids.shape[1]),
    }
    own = root_mean_square(evaluate(Component.PREFILL, inputs)["logits"], right, SAMPLES)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        other = (model(input_ids=ids).logits.double() - right).abs().amax(-1)
    return own, other, float(right.abs().max())


def test_an_ill_conditioned_token_is_known_as_one(errors: tuple[Tensor, Tensor, float]) -> None:
    """PyTorch's error jumps where the token is, and so does another implementation's; nothing is allowed before it."""
    own, other, scale = errors
    assert own[0, 3] > 100 * own[0, :3].max()
    assert other[0, 3] > 100 * other[0, :3].max()
    allowed = allowed_errors(own, scale, 1e-5, own)
    assert torch.equal(allowed[0, :3], torch.full((3,), 1e-5, dtype=torch.float64))
    assert allowed[0, 3] == pytest.approx(FACTOR * float(own[0, 3]) / scale)
    assert (other / scale <= allowed).all()


def test_what_is_not_finite_allows_nothing() -> None:
    """Where PyTorch's own FP16 overflows, it is no measure."""
    own = torch.tensor([[torch.inf, torch.nan, 1.0]], dtype=torch.float64)
    assert allowed_errors(own, 10.0, 0.01, own).tolist() == [[0.01, 0.01, 0.8]]
    assert allowed_errors(None, 10.0, 0.01, own).tolist() == [[0.01] * 3]
