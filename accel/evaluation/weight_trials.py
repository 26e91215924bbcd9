"""Sensitivity trials of weight formats: the quantized graphs, on inputs whose FP32 outputs are recorded."""

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from accel.adapters.types import Component
from accel.evaluation.compare import error, output_mask
from accel.evaluation.divergence import Divergence, share_bound
from accel.evaluation.sensitivity import RecordedCall
from accel.evaluation.trial_calls import counted_kind, counted_tokens
from accel.graph import files
from accel.graph.quantization.formats import WeightFormat
from accel.graph.quantization.quantize_products import QuantizedWeights, QuantizeProducts
from accel.runtime.session import HostSession, SessionSettings

LOGITS = "logits"


@dataclass
class WeightTrialResult:
    """Distance of quantized graphs from FP32.

    Attributes:
        tokens: Tokens of texts and sampled continuations that were compared.
        divergence: Kullback-Leibler divergence of the next token's distribution from that in FP32, in nats, the mean
            over those tokens.
        standard_error: Standard error of that mean: see `accel.evaluation.divergence.Divergence`.
        greedy_tokens: Tokens of greedy search that were compared.
        changed: Those at which another id became the likeliest.
        clear_changes: Those of them that are no near ties of FP32: see `accel.evaluation.divergence.Divergence`.
        change_bound: Upper bound of the share of clear changes over all such texts, from 0 to 1.
        error: Relative error of the outputs other than logits: root mean square over calls, each with its worst output.
    """

    tokens: int = 0
    divergence: float = 0.0
    standard_error: float = 0.0
    greedy_tokens: int = 0
    changed: int = 0
    clear_changes: int = 0
    change_bound: float = 1.0
    error: float = 0.0


@dataclass(frozen=True)
class WeightTrial:
    """Graphs of all components, to be run with some of their weights quantized.

    Attributes:
        graphs: Folder of the FP32 graphs.
        calls: Component -> its recorded calls.
        settings: Settings of the sessions.
        quantized: Weights that were quantized before.
        self_attention_caches: Names of the outputs that are caches of the decoder's own keys and values.
        end_tokens: Ids that end a text.
        near_tie: Divergence in nats up to which a change of the likeliest token is a near tie of FP32.
    """

    graphs: Path
    calls: Mapping[Component, Sequence[RecordedCall]]
    settings: SessionSettings
    quantized: QuantizedWeights
    self_attention_caches: Container[str]
    end_tokens: Sequence[int]
    near_tie: float

    def __call__(self, formats: Mapping[str, WeightFormat]) -> WeightTrialResult:
        """Run the recorded calls with the weights in `formats` quantized, and compare the outputs with FP32."""
        sampled, greedy, errors = Divergence(), Divergence(), []
        kind = counted_kind([call.kind for calls in self.calls.values() for call in calls])
        for component, calls in self.calls.items():
            model = files.load(self.graphs / f"{component}.onnx")
            QuantizeProducts(formats, self.quantized)(model)
            session = HostSession(files.dump(model), self.settings)
            del model
            for call in calls:
                inputs, expected = call.inputs(), call.outputs()
                outputs = session(inputs)
                if LOGITS in outputs and call.kind == kind:
                    compared = greedy if call.greedy else sampled
                    self._add_logits(compared, component, call, inputs, outputs[LOGITS], expected[LOGITS])
                errors.append(self._worst_error(component, inputs, outputs, expected))
        clear_changes = greedy.clear_changes(self.near_tie)
        return WeightTrialResult(
            sampled.tokens,
            sampled.mean,
            sampled.standard_error,
            greedy.tokens,
            greedy.changed,
            int(clear_changes.total),
            share_bound(clear_changes),
            math.sqrt(sum(value**2 for value in errors) / max(1, len(errors))),
        )

    def _add_logits(
        self,
        divergence: Divergence,
        component: Component,
        call: RecordedCall,
        inputs: Mapping[str, Tensor],
        found: Tensor,
        expected: Tensor,
    ) -> None:
        """Add a call's logits, [rows, new, vocabulary], at the tokens that count; each row is a text."""
        counted = counted_tokens(component, call.kind, inputs, self.end_tokens)  # [rows, new]
        for row, tokens in enumerate(counted):
            divergence.add((call.batch, row), found[row, tokens], expected[row, tokens])

    def _worst_error(
        self,
        component: Component,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        expected: Mapping[str, Tensor],
    ) -> float:
        """Return the largest relative error of a call's outputs other than logits, infinite where one isn't finite."""
        worst = 0.0
        for name in outputs.keys() - {LOGITS}:
            mask = output_mask(component, name, inputs, expected[name], self.self_attention_caches)
            relative = error(outputs[name], expected[name], mask)
            worst = max(worst, relative if math.isfinite(relative) else math.inf)
        return worst
