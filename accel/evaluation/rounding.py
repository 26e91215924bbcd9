"""PyTorch's own rounding error: the model in float64, and again in its own precision with perturbed inputs.

Trained models have ill-conditioned inputs (attention sinks, outlier channels), where two correct implementations differ
by far more than elsewhere. How much is a property of the model and its input, so it is measured and not assumed.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from accel.adapters.types import Component, Signature
from accel.evaluation.compare import token_errors
from accel.evaluation.component_runner import ComponentRunner, Run

SAMPLES = 8  # evaluations whose errors are averaged
# An error that the input amplifies is nearly Gaussian, and the errors of two implementations are independent draws. So
# ours over the root mean square of `SAMPLES` of PyTorch's is distributed as Student's t with `SAMPLES` degrees of
# freedom, which exceeds this factor with a probability of 4.4e-5 (W. S. Gosset, "The probable error of a mean", 1908,
# Biometrika 6, 1-25).
FACTOR = 8.0


class _Float64(TorchFunctionMode):
    """Keeps float64 values in float64 where a model's code asks for float32, as norms and softmax do.

    What is computed from integers, such as positions, keeps the precision that the model's code asks for: its rounding
    is part of the model, and may decide an integer, as in T5's distance buckets.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype is torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(map(_widened, args))
            given = {name: _widened(value) for name, value in given.items()}
        return func(*args, **given)


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def in_float64(model: PreTrainedModel) -> Iterator[None]:
    """Context in which `model`, in float32, computes in float64 when it is given float64 or integer tensors.

    Parameters are widened module by module while the module runs, so memory grows by the largest module's own
    parameters and not by the model.
    """
    narrow: dict[nn.Module, list[tuple[nn.Parameter, Tensor]]] = {}

    def widen(module: nn.Module, _: Any) -> None:
        own = [one for one in module.parameters(recurse=False) if one.dtype is torch.float32]
        narrow[module] = [(one, one.data) for one in own]
        for one in own:
            one.data = one.data.double()

    def restore(module: nn.Module, *_: Any) -> None:
        for parameter, data in narrow.pop(module):
            parameter.data = data

    holders = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    hooks = [module.register_forward_pre_hook(widen) for module in holders]
    hooks += [module.register_forward_hook(restore) for module in holders]
    try:
        with _Float64():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in list(narrow):  # a module that raised
            restore(module)


@contextmanager
def _perturbed(model: PreTrainedModel, copies: int, step: float, generator: torch.Generator) -> Iterator[None]:
    """Context in which every embedding that `model` looks up is off by at most one rounding, but in every `copies`-th
    row. `step`: the distance of 1 and the next larger number of the model's precision.
    """

    def perturb(module: nn.Module, _: Any, output: Tensor) -> Tensor | None:
        if output.ndim < 3 or output.shape[0] % copies:
            return None  # not looked up row by row, as some positions
        return perturbed(output, copies, step, generator)

    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    hooks = [module.register_forward_hook(perturb) for module in embeddings]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def perturbed(values: Tensor, copies: int, step: float, generator: torch.Generator) -> Tensor:
    """`values` [rows * copies, ...], each times a number within `step / 2` of 1; the first row of its copies stays."""
    noise = torch.rand(values.shape, generator=generator, device=values.device) - 0.5
    noise[::copies] = 0
    return (values.float() * (1 + step * noise)).to(values.dtype)


class Evaluator:
    """Evaluates the components of a model in PyTorch, call by call, several rounding errors at once.

    `dtype`: float64, for the values that errors are counted from, or the model's own precision.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        signatures: Mapping[Component, Signature],
        run: Run,
        dtype: torch.dtype,
        seed: int = 0,
    ) -> None:
        self.model, self.signatures, self.dtype = model, signatures, dtype
        self.copies = 1 if dtype is torch.float64 else SAMPLES
        self._generator = torch.Generator(model.device).manual_seed(seed)
        self.runner = ComponentRunner(signatures, run)

    def __call__(self, component: Component, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs of `role` by name, [rows * copies, ...], the copies of a row beside each other.

        Inputs that earlier calls made are taken from there, so errors add up as they do while generating.
        """
        with torch.no_grad(), self._context():
            return dict(self.runner(component, self._inputs(component, given)))

    def alone(self, component: Component, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same where `inputs` are all that the component takes."""
        with torch.no_grad(), self._context():
            return dict(self.runner.run(component, self._inputs(component, inputs)))

    def _inputs(self, component: Component, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        axes = {spec.name: spec.axes for spec in self.signatures[component].inputs}
        return {name: self._input(value, axes.get(name, {})) for name, value in given.items()}

    def _context(self) -> Any:
        if self.dtype is torch.float64:
            return in_float64(self.model)
        return _perturbed(self.model, self.copies, torch.finfo(self.dtype).eps, self._generator)

    def _input(self, value: Tensor, axes: Mapping[int, str]) -> Tensor:
        value = value.to(self.model.device)
        if axes.get(0) == "batch":
            value = value.repeat_interleave(self.copies, 0)
        if not value.is_floating_point():
            return value
        value = value.to(self.dtype)
        if self.copies == 1:
            return value
        return perturbed(value, self.copies, torch.finfo(self.dtype).eps, self._generator)


def allowed_errors(own: Tensor | None, scale: float, tolerance: float, like: Tensor) -> Tensor:
    """How far each token may be off, [rows, tokens], relative to `scale`, the output's largest magnitude.

    The larger of `tolerance` and `FACTOR` times what PyTorch itself is off by there. `own`: that, absolute; None where
    it isn't known. What is not finite says nothing. `like`: a tensor of that shape.
    """
    if own is None:
        return torch.full_like(like, tolerance)
    theirs = own / scale
    return torch.where(theirs.isfinite(), FACTOR * theirs, 0.0).clamp_min(tolerance)


def root_mean_square(found: Tensor, expected: Tensor, copies: int) -> Tensor:
    """Root of the mean square of a token's largest error, over the copies of its row.

    `found`: [rows * copies, ..., tokens, features]. `expected`: [rows, ..., tokens, features]. Returns [rows, tokens].
    """
    errors = token_errors(found, expected.repeat_interleave(copies, 0))  # [rows * copies, tokens]
    mean: Tensor = errors.view(-1, copies, errors.shape[1]).square().mean(1)
    return mean.sqrt()
