"""Weight plans: the format of each weight of a model's products, with the evidence that it was chosen by."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from accel.graph.quantization.formats import WeightFormat, format_named

ERROR_SLACK = 1.2  # a candidate may have this many times the smallest error, if it is faster or smaller
TIME_SLACK = 1.1  # candidates within this factor of the fastest count as equally fast, and the smallest is chosen


@dataclass
class WeightChoice:
    """Format of one weight, or why it stays in FP32.

    Attributes:
        inputs: Input features.
        outputs: Output features.
        format: Name of the format, such as `int8 block-128`; None for FP32.
        reason: Why it stays in FP32, or has more bits than asked for; else empty.
        errors: Candidate -> error of the product on the model's own activations, relative to its norm.
        microseconds: Candidate, or `float32` -> time of a product of one row plus one of four rows.
    """

    inputs: int
    outputs: int
    format: str | None = None
    reason: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    microseconds: dict[str, float] = field(default_factory=dict)

    def choose(self, candidates: Mapping[str, WeightFormat]) -> None:
        """Choose the fastest candidate, and of equally fast ones the smallest, whose error is near the smallest one.

        Args:
            candidates: Formats by name; `errors` has an entry for each of them.
        """
        limit = ERROR_SLACK * min(self.errors[name] for name in candidates)
        accurate = [name for name in candidates if self.errors[name] <= limit]
        fastest = min((self.microseconds.get(name, 0.0) for name in accurate), default=0.0)
        fast = [name for name in accurate if self.microseconds.get(name, 0.0) <= TIME_SLACK * fastest]
        self.format = min(fast, key=lambda name: candidates[name].size(self.inputs, self.outputs))

    def keep(self, reason: str) -> None:
        """Keep the weight in FP32."""
        self.format, self.reason = None, reason


@dataclass
class WeightPlan:
    """Formats of all weights that products read, over all components.

    Attributes:
        weights: Weight -> its format.
        trials: Results of the sensitivity trials, in their order, as JSON.
    """

    weights: dict[str, WeightChoice] = field(default_factory=dict)
    trials: list[dict[str, Any]] = field(default_factory=list)

    def formats(self) -> dict[str, WeightFormat]:
        """Return the formats of the weights that don't stay in FP32."""
        return {name: format_named(each.format) for name, each in self.weights.items() if each.format is not None}

    def error(self, name: str) -> float:
        """Return the error that a weight's format has, or in FP32 the smallest of its candidates'; 0 if unknown."""
        choice = self.weights[name]
        smallest = min(choice.errors.values(), default=0.0)
        return smallest if choice.format is None else choice.errors.get(choice.format, smallest)

    def describe_worst(self, count: int = 3) -> str:
        """Name the quantized weights with the largest errors, for a message."""
        worst = sorted(self.formats(), key=self.error, reverse=True)[:count]
        named = ", ".join(f"{name} ({self.weights[name].format}, error {self.error(name):.2g})" for name in worst)
        return f"the weights in low bits with the largest errors are {named}"

    def dump(self) -> dict[str, Any]:
        """Return the plan as JSON-serialisable dictionaries."""
        return asdict(self)

    @classmethod
    def parse(cls, record: Mapping[str, Any]) -> "WeightPlan":
        """Return the plan that `dump` returned as `record`."""
        weights = {name: WeightChoice(**choice) for name, choice in record["weights"].items()}
        return cls(weights, list(record["trials"]))
