"""PyTorch's own rounding error: the model in float64 against its own precision with perturbed inputs.

Trained models have ill-conditioned inputs (attention sinks, outlier channels), where two correct implementations differ
by far more than elsewhere. By how much depends on the model and its input, so it is measured and not assumed.
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
    """Mode in which float64 values stay float64 where a model's code asks for float32, as norms and softmax do.

    Values computed from integers, such as positions, keep the precision that the model's code asks for: that rounding
    is part of the model, and another rounding may give another integer, as in T5's distance buckets.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        keywords = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype is torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(map(_float32_to_float64, args))
            keywords = {name: _float32_to_float64(value) for name, value in keywords.items()}
        return func(*args, **keywords)


def _float32_to_float64(value: Any) -> Any:
    """Return `torch.float64` for `torch.float32`, and any other argument unchanged."""
    return torch.float64 if value is torch.float32 else value


class _Buffers:
    """Float64 tensors to convert parameters into, used again and again: new pages cost more than the conversion."""

    def __init__(self) -> None:
        self._free: dict[tuple[torch.Size, torch.device], list[Tensor]] = {}

    def take(self, values: Tensor) -> Tensor:
        """Return `values` in float64."""
        free = self._free.get((values.shape, values.device))
        buffer = free.pop() if free else torch.empty(values.shape, dtype=torch.float64, device=values.device)
        return buffer.copy_(values)

    def give_back(self, buffer: Tensor) -> None:
        """Let a tensor that `take` returned be overwritten."""
        self._free.setdefault((buffer.shape, buffer.device), []).append(buffer)


@contextmanager
def in_float64(model: PreTrainedModel, buffers: _Buffers | None = None) -> Iterator[None]:
    """Open a context in which a float32 `model` computes in float64 on float64 or integer inputs.

    A module's parameters are converted while that module runs, so memory grows by the largest modules' own parameters,
    one of each shape, and not by the model. Of an embedding, the rows that it returns are converted.

    Args:
        model: Model in float32.
        buffers: Those of earlier contexts, to use again; None for new ones.
    """
    buffers = buffers or _Buffers()
    originals: dict[nn.Module, list[tuple[nn.Parameter, Tensor]]] = {}

    def convert(module: nn.Module, _: Any) -> None:
        originals[module] = []
        for parameter in module.parameters(recurse=False):
            if parameter.dtype is torch.float32:
                originals[module].append((parameter, parameter.data))
        for parameter, data in originals[module]:
            parameter.data = buffers.take(data) if type(module) is nn.Linear else data.double()

    def restore(module: nn.Module, *_: Any) -> None:
        for parameter, data in originals.pop(module):
            if type(module) is nn.Linear:  # other modules may return a view of a parameter
                buffers.give_back(parameter.data)
            parameter.data = data

    hooks = []
    for module in model.modules():
        if type(module) is nn.Embedding:  # not a subclass, which may compute more than it looks up
            hooks.append(module.register_forward_hook(lambda module, inputs, output: output.double()))
        elif next(module.parameters(recurse=False), None) is not None:
            hooks.append(module.register_forward_pre_hook(convert))
            hooks.append(module.register_forward_hook(restore))
    try:
        with _Float64():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in list(originals):  # a module that raised was not restored by its hook
            restore(module)


@contextmanager
def _perturbed_embeddings(
    model: PreTrainedModel, copies: int, epsilon: float, generator: torch.Generator
) -> Iterator[None]:
    """Open a context in which `perturb` is applied to the output of every embedding of `model`."""

    def perturb_output(module: nn.Module, _: Any, output: Tensor) -> Tensor | None:
        if output.ndim < 3 or output.shape[0] % copies:
            return None  # not one row per input row, as with some position embeddings
        return perturb(output, copies, epsilon, generator)

    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    hooks = [module.register_forward_hook(perturb_output) for module in embeddings]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def perturb(values: Tensor, copies: int, epsilon: float, generator: torch.Generator) -> Tensor:
    """Multiply each value by a random number within half an `epsilon` of 1, which changes it by at most one rounding.

    Args:
        values: Values, [rows * copies, ...]. The first of each row's copies stays unchanged.
        copies: Copies of each row.
        epsilon: Distance from 1 to the next larger number of the model's precision.
        generator: Source of random numbers on the device of `values`.

    Returns:
        Perturbed values, same shape and dtype.
    """
    noise = torch.rand(values.shape, generator=generator, device=values.device) - 0.5
    noise[::copies] = 0
    return (values.float() * (1 + epsilon * noise)).to(values.dtype)


class Evaluator:
    """Evaluation of a model's components in PyTorch, over several differently rounded copies of the inputs at once.

    Attributes:
        model: Model to evaluate.
        signatures: Signature of each component.
        dtype: float64, for the values that errors are counted from, or the model's own precision.
        copies: Copies of each row: 1 in float64, else `SAMPLES`.
        runner: Runner that holds the values of earlier calls.
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
        self._buffers = _Buffers()
        self.runner = ComponentRunner(signatures, run)

    def __call__(self, component: Component, caller_inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run `component` on the caller's inputs and the outputs of earlier calls, so that errors add up.

        Args:
            component: Component to run.
            caller_inputs: Its other inputs, [rows, ...].

        Returns:
            Outputs by name, [rows * copies, ...], the copies of a row next to each other.
        """
        with torch.no_grad(), self._context():
            return dict(self.runner(component, self._prepare(component, caller_inputs)))

    def evaluate_isolated(self, component: Component, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run `component` on all of its inputs, [rows, ...], without the values of earlier calls.

        Returns:
            Outputs by name, [rows * copies, ...], the copies of a row next to each other.
        """
        with torch.no_grad(), self._context():
            return dict(self.runner.run(component, self._prepare(component, inputs)))

    def _context(self) -> Any:
        """Return the context in which the model computes in `dtype`."""
        if self.dtype is torch.float64:
            return in_float64(self.model, self._buffers)
        return _perturbed_embeddings(self.model, self.copies, torch.finfo(self.dtype).eps, self._generator)

    def _prepare(self, component: Component, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the component's inputs on the model's device, copied along the batch, in `dtype`, and perturbed."""
        axes = {spec.name: spec.axes for spec in self.signatures[component].inputs}
        return {name: self._prepare_tensor(value, axes.get(name, {})) for name, value in inputs.items()}

    def _prepare_tensor(self, value: Tensor, axes: Mapping[int, str]) -> Tensor:
        """Prepare one input as `_prepare` does; `axes` maps its dimensions to their names."""
        value = value.to(self.model.device)
        if axes.get(0) == "batch_size":
            value = value.repeat_interleave(self.copies, 0)
        if not value.is_floating_point():
            return value
        value = value.to(self.dtype)
        if self.copies == 1:
            return value
        return perturb(value, self.copies, torch.finfo(self.dtype).eps, self._generator)


def allowed_errors(torch_error: Tensor | None, scale: float, tolerance: float, like: Tensor) -> Tensor:
    """Return the error that each token may have: the larger of `tolerance` and `FACTOR` times PyTorch's own error.

    Where PyTorch's own error is not finite, `tolerance` alone counts.

    Args:
        torch_error: PyTorch's own absolute error, [rows, tokens]; None if it isn't known.
        scale: Largest magnitude of the output.
        tolerance: Error allowed everywhere, relative to `scale`.
        like: Tensor whose shape, dtype and device the result has if `torch_error` is None.

    Returns:
        Allowed errors relative to `scale`, [rows, tokens].
    """
    if torch_error is None:
        return torch.full_like(like, tolerance)
    relative = torch_error / scale
    return torch.where(relative.isfinite(), FACTOR * relative, 0.0).clamp_min(tolerance)


def root_mean_square(found: Tensor, expected: Tensor, copies: int) -> Tensor:
    """Return the root mean square, over the copies of a row, of each token's largest error.

    Args:
        found: Values of all copies, [rows * copies, ..., tokens, features].
        expected: Values in float64, [rows, ..., tokens, features].
        copies: Copies of each row.

    Returns:
        Absolute errors, [rows, tokens], float64.
    """
    errors = [token_errors(found[copy::copies], expected) for copy in range(copies)]  # [rows, tokens] each
    return torch.stack(errors).square().mean(0).sqrt()
