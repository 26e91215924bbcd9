"""Result of a verification, as `verify` writes it into the deployable."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from accel.config.engines import ONNXRUNTIME
from accel.evaluation.compare import Difference
from accel.evaluation.metrics import MetricLoss
from accel.evaluation.rounding import FACTOR, SAMPLES


@dataclass
class Drift:
    """Absolute error of the logits at each token position of the generated sequences.

    Statistics at a position are over the vocabulary and all sequences of at least that length.

    Attributes:
        mean: Mean error by position.
        p99: 99th percentile by position.
        worst: Largest error by position.
        torch_worst: PyTorch's own largest error by position, in the same precision; None where it isn't finite. Empty
            if it isn't known.
        scale: Largest magnitude of the reference's logits.
    """

    mean: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    worst: list[float] = field(default_factory=list)
    torch_worst: list[float | None] = field(default_factory=list)
    scale: float = 0.0


@dataclass
class VerificationResult:
    """Result of `verify`, written into the deployable as `verification.json`.

    Attributes:
        passed: No check failed.
        precision: `PrecisionConfig.variant` of the bundle.
        dtype: Dtype of the values between operators.
        torch_dtype: Dtype in which PyTorch's own error is measured.
        execution: "native", or "emulated" where the runtime can't compute in that precision.
        runtime: Name of the runtime.
        engine: What computed decode steps of one token: see `accel.runtime.protocol.Runtime`.
        threshold: Error that every token may have, relative to its output's largest magnitude.
        factor: Multiple of PyTorch's own error that is allowed where it exceeds `threshold`.
        reference: Description of the values that errors are counted from.
        outputs: Output -> its error at the worst token.
        drift: Error of the logits along generated sequences.
        inputs: Number of inputs whose generated tokens were compared.
        sequences: Decoding method -> number of sequences compared.
        identical: Decoding method -> share of sequences with the same tokens as PyTorch's.
        first_difference: "method.input" -> position of the first token that differs.
        near_tie: Divergence in nats from PyTorch's distribution that a near tie may need at most.
        near_ties: Decoding method -> number of sequences that differ, but at a near tie of PyTorch's: see
            `accel.stages.near_ties`. Empty where near ties count like any difference: without weights in low bits.
        needed_divergence: "method.input" -> divergence that the difference needs.
        differing: Sequences that differ, with both texts.
        metrics: "pytorch" and "ours" -> metric -> percent.
        metric_losses: Metric -> by how much it is worse than PyTorch's.
        references: Number of references that the metrics were computed on.
        samples: Inputs with the texts that both generated.
        divergence: Of the next token's distribution from PyTorch's in FP32, with weights in low bits: numbers of
            tokens, texts, changed (tokens at which another id is the likeliest) and clear_changes (those of them that
            are no near ties of PyTorch's); mean, standard_error and allowed (mean), in nats. Else empty.
        failures: One message for each failed check.
        files: Name -> SHA-256 of each file of the bundle that passed.
    """

    passed: bool = False
    precision: str = "float32"
    dtype: str = "float32"
    torch_dtype: str = "float32"
    execution: str = "native"
    runtime: str = "cpu"
    engine: str = ONNXRUNTIME
    threshold: float = 0.0
    factor: float = FACTOR
    reference: str = f"PyTorch in float64, module by module; its own error by {SAMPLES} evaluations"
    outputs: dict[str, Difference] = field(default_factory=dict)
    drift: Drift = field(default_factory=Drift)
    inputs: int = 0
    sequences: dict[str, int] = field(default_factory=dict)
    identical: dict[str, float] = field(default_factory=dict)
    first_difference: dict[str, int] = field(default_factory=dict)
    near_tie: float = 0.0
    near_ties: dict[str, int] = field(default_factory=dict)
    needed_divergence: dict[str, float] = field(default_factory=dict)
    differing: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    metric_losses: dict[str, MetricLoss] = field(default_factory=dict)
    references: int = 0
    samples: list[dict[str, str]] = field(default_factory=list)
    divergence: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)

    def is_near_tie(self, sequence: str) -> bool:
        """Return whether a sequence that differs, "method.input", does so at a near tie."""
        return sequence in self.needed_divergence and self.needed_divergence[sequence] <= self.near_tie

    def agreeing(self, method: str) -> float:
        """Return the share of a decoding method's sequences that are identical to PyTorch's or differ at a near tie."""
        return self.identical[method] + self.near_ties.get(method, 0) / max(1, self.sequences.get(method, 0))


def count_sequences(verification: Mapping[str, Any], method: str) -> tuple[int, int, int]:
    """Return how many sequences of a decoding method are identical, differ at a near tie, and differ otherwise.

    Args:
        verification: The result as JSON.
        method: The decoding method.
    """
    sequences, tied = verification["sequences"][method], verification["near_ties"].get(method, 0)
    identical = round(verification["identical"][method] * sequences)
    return identical, tied, sequences - identical - tied


def how_verified(verification: Mapping[str, Any]) -> str:
    """Return in words what a verification result holds for: `native on cuda-graph, engine fused`.

    Args:
        verification: The result as JSON. One of an earlier version names no engine.
    """
    engine = verification.get("engine", ONNXRUNTIME)
    return f"{verification['execution']} on {verification['runtime']}, engine {engine}"
