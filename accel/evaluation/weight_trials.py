"""Sensitivity trials of weight formats: the quantized graphs, on inputs whose FP32 outputs are recorded."""

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from accel.adapters.types import Component
from accel.evaluation.compare import error, output_mask
from accel.graph import files
from accel.graph.quantization.formats import WeightFormat
from accel.graph.quantization.quantize_products import QuantizedWeights, QuantizeProducts
from accel.runtime.session import HostSession, SessionSettings

LOGITS = "logits"
TEXT = "text"  # kind of calibration batches whose tokens count; at random ids near ties are common


@dataclass
class WeightTrialResult:
    """Distance of quantized graphs from FP32.

    Attributes:
        tokens: Tokens of text that were compared.
        changed: Those at which another id became the likeliest.
        divergence: Kullback-Leibler divergence of the next token's distribution from that in FP32, in nats, the mean
            over those tokens.
        error: Relative error of the outputs other than logits: root mean square over calls, each with its worst output.
    """

    tokens: int = 0
    changed: int = 0
    divergence: float = 0.0
    error: float = 0.0

    @property
    def changed_share(self) -> float:
        """Share of the compared tokens that changed."""
        return self.changed / max(1, self.tokens)


@dataclass(frozen=True)
class WeightTrial:
    """Graphs of all components, to be run with some of their weights quantized.

    Attributes:
        graphs: Folder of the FP32 graphs.
        calls: Component -> (kind of batch, file) of each recorded call.
        settings: Settings of the sessions.
        quantized: Weights that were quantized before.
        self_attention_caches: Names of the outputs that are caches of the decoder's own keys and values.
    """

    graphs: Path
    calls: Mapping[Component, Sequence[tuple[str, Path]]]
    settings: SessionSettings
    quantized: QuantizedWeights
    self_attention_caches: Container[str]

    def __call__(self, formats: Mapping[str, WeightFormat]) -> WeightTrialResult:
        """Run the recorded calls with the weights in `formats` quantized, and compare the outputs with FP32."""
        result, divergences, errors = WeightTrialResult(), 0.0, []
        has_text = any(kind == TEXT for calls in self.calls.values() for kind, _ in calls)
        for component, calls in self.calls.items():
            model = files.load(self.graphs / f"{component}.onnx")
            QuantizeProducts(formats, self.quantized)(model)
            session = HostSession(files.dump(model), self.settings)
            del model
            for kind, path in calls:
                tensors = load_file(path)
                inputs = {name.removeprefix("in."): value for name, value in tensors.items() if name.startswith("in.")}
                expected = {name: tensors[f"out.{name}"] for name in session.outputs}
                outputs = session(inputs)
                worst = 0.0
                for name, found in outputs.items():
                    mask = output_mask(component, name, inputs, expected[name], self.self_attention_caches)
                    if name != LOGITS:
                        relative = error(found, expected[name], mask)
                        worst = max(worst, relative if math.isfinite(relative) else math.inf)
                    elif kind == TEXT or not has_text:
                        changed, divergence = _compare_logits(found, expected[name])
                        result.tokens += len(found)
                        result.changed += changed
                        divergences += divergence
                errors.append(worst)
        result.divergence = divergences / max(1, result.tokens)
        result.error = math.sqrt(sum(value**2 for value in errors) / max(1, len(errors)))
        return result


def _compare_logits(found: Tensor, expected: Tensor) -> tuple[int, float]:
    """Compare logits [rows, tokens, vocabulary] at the last token of each row.

    Returns:
        Rows at which another id is the likeliest, and the sum of their divergences from the expected distribution, in
        nats; infinite if a logit isn't finite.
    """
    last, expected_last = found[:, -1].double(), expected[:, -1].double()
    changed = int((last.argmax(-1) != expected_last.argmax(-1)).sum())
    divergence = torch.nn.functional.kl_div(
        last.log_softmax(-1), expected_last.log_softmax(-1), reduction="sum", log_target=True
    )
    return changed, float(divergence.nan_to_num(math.inf))
