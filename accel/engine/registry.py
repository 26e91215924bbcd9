"""Registry of the operators that the engine runs."""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from accel.errors import AccelError

MICROSOFT = "com.microsoft"  # ONNX Runtime's own operators

Function = TypeVar("Function", bound=Callable[..., Tensor | tuple[Tensor | None, ...]])


@dataclass(frozen=True)
class Operator:
    """One operator: its function, and what the executor must know of it.

    Attributes:
        function: Takes the inputs as tensors, in ONNX's order, None for one that is left out, and the attributes by
            name, with ONNX's defaults. Returns the output, or all outputs in order; None for those that it can't make.
        host: Indices of the inputs whose values decide the output's shape. They are on the CPU, unless their values
            depend on data.
        data_dependent: The output's shape depends on the values of the other inputs.
        writes: Input that the function writes into -> output in which it returns it, as indices. The executor passes a
            copy, or the input itself where the graph may update it in place.
    """

    function: Callable[..., Tensor | tuple[Tensor | None, ...]]
    host: frozenset[int]
    data_dependent: bool
    writes: Mapping[int, int]

    @property
    def attributes(self) -> list[str]:
        """Names of the attributes that the function takes."""
        parameters = inspect.signature(self.function).parameters.values()
        return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]

    @property
    def max_inputs(self) -> float:
        """Number of inputs that the function takes; infinite for any number."""
        kinds = [parameter.kind for parameter in inspect.signature(self.function).parameters.values()]
        if inspect.Parameter.VAR_POSITIONAL in kinds:
            return float("inf")
        return kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD)


OPERATORS: dict[tuple[str, str], Operator] = {}  # (domain, name) -> operator


def operator(
    name: str,
    domain: str = "",
    *,
    host: Collection[int] = (),
    data_dependent: bool = False,
    writes: Mapping[int, int] | None = None,
) -> Callable[[Function], Function]:
    """Return a decorator that registers a function for an operator. The arguments are those of `Operator`."""

    def register(function: Function) -> Function:
        OPERATORS[domain, name] = Operator(function, frozenset(host), data_dependent, writes or {})
        return function

    return register


def unsupported(what: str, value: Any, choices: str) -> AccelError:
    """Return the error for an attribute's value, or an input, that an operator's function doesn't support."""
    return AccelError(f"{what}={value!r} is not supported, only {choices}")
