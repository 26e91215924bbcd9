"""PyTorch's own rounding error: evaluation in float64, and errors at an ill-conditioned token."""

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


class AssertNoNarrowing(TorchDispatchMode):
    """Mode that fails where an operation on float64 tensors returns a narrower float type."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        has_float64 = any(isinstance(argument, Tensor) and argument.dtype is torch.float64 for argument in args)
        if has_float64 and isinstance(result, Tensor) and result.is_floating_point():
            assert result.dtype is torch.float64, func
        return result


@pytest.mark.parametrize("family", FAMILIES)
def test_in_float64_computes_in_float64(family: str) -> None:
    """Norms, softmax and routers that cast to float32 stay in float64, and the model is restored afterwards."""
    model = random_model(FAMILIES[family])
    before = {name: (value.dtype, value.data_ptr()) for name, value in model.named_parameters()}
    adapter = registry.build(OmegaConf.load(ARCHITECTURES / f"{model.config.model_type}.yaml"))
    specs, run = signatures(adapter, model.config), torch_run(adapter, model)
    inputs = component_inputs(adapter, model.config, Shape(1, 9, 4, 2), torch.Generator().manual_seed(0))
    exact, rounded = (Evaluator(model, specs, run, dtype) for dtype in (torch.float64, torch.float32))
    for component, component_input in inputs.items():
        with AssertNoNarrowing():
            exact_values = exact(component, component_input)
        found = rounded(component, component_input)
        for output, value in exact_values.items():
            assert value.dtype is torch.float64
            torch_error = root_mean_square(found[output], value, SAMPLES)
            assert 0 < torch_error.max() < 1e-3 * value.abs().max(), output
    assert before == {name: (value.dtype, value.data_ptr()) for name, value in model.named_parameters()}


@pytest.fixture(scope="module")
def errors() -> tuple[Tensor, Tensor, float]:
    """Errors of PyTorch and of another implementation, [1, tokens] each, on an ill-conditioned Llama; largest logit."""
    model = ill_conditioned_llama()
    ids = torch.tensor([[5, 9, 40, TOKEN, 11, 30]])
    with torch.no_grad(), in_float64(model):
        exact_values = model(input_ids=ids).logits
    adapter = registry.build(OmegaConf.load(ARCHITECTURES / "llama.yaml"))
    evaluate = Evaluator(model, signatures(adapter, model.config), torch_run(adapter, model), torch.float32)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(ids.shape[1])[None],
        "logits_to_keep": torch.arange(ids.shape[1]),
    }
    torch_errors = root_mean_square(evaluate(Component.PREFILL, inputs)["logits"], exact_values, SAMPLES)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        other = (model(input_ids=ids).logits.double() - exact_values).abs().amax(-1)
    return torch_errors, other, float(exact_values.abs().max())


def test_errors_at_an_ill_conditioned_token(errors: tuple[Tensor, Tensor, float]) -> None:
    """The errors of PyTorch and of another implementation jump at the token, and only there more is allowed."""
    torch_errors, other, scale = errors
    assert torch_errors[0, 3] > 100 * torch_errors[0, :3].max()
    assert other[0, 3] > 100 * other[0, :3].max()
    allowed = allowed_errors(torch_errors, scale, 1e-5, torch_errors)
    assert torch.equal(allowed[0, :3], torch.full((3,), 1e-5, dtype=torch.float64))
    assert allowed[0, 3] == pytest.approx(FACTOR * float(torch_errors[0, 3]) / scale)
    assert (other / scale <= allowed).all()


def test_non_finite_errors_allow_nothing() -> None:
    """Where PyTorch's own FP16 overflows, only the bound that depends on the depth applies."""
    torch_errors = torch.tensor([[torch.inf, torch.nan, 1.0]], dtype=torch.float64)
    assert allowed_errors(torch_errors, 10.0, 0.01, torch_errors).tolist() == [[0.01, 0.01, 0.8]]
    assert allowed_errors(None, 10.0, 0.01, torch_errors).tolist() == [[0.01] * 3]
