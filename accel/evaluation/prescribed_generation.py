"""Log-probabilities along a text that a PyTorch model is made to generate.

`generate` itself runs, so that prompt, masks and caches are those of any generation, also where the decoder is given
tokens that `generate` doesn't return, as Whisper's is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)


@dataclass(frozen=True)
class ScoredText:
    """A text with the log-probabilities of each id that could have stood in its place.

    Attributes:
        start: Position of the first id that is generated; those before it are the prompt.
        rows: Log-probabilities at the positions from `start` on, [positions, vocabulary], in host memory.
    """

    start: int
    rows: Tensor

    def at(self, position: int, token: int) -> float:
        """Return the log-probability of `token` after the ids before `position`."""
        return float(self.rows[position - self.start, token])


class _Prescription(LogitsProcessor):
    """Allow only the next of given ids at each step, and keep the log-probabilities that the model gives all ids.

    Attributes:
        start: See `ScoredText`.
        rows: Log-probabilities of each step so far, [vocabulary] each.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = list(ids)
        self.start = 0
        self.rows: list[Tensor] = []
        self.logits: Tensor | None = None

    def take_logits(self, _: Any, __: Any, output: Any) -> None:
        """Keep the logits after the last token: a hook of the model's forward pass."""
        self.logits = output.logits[0, -1].detach()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores that leave one id, [1, vocabulary]."""
        if self.logits is None:
            raise RuntimeError("the model computed no logits before it chose a token")
        if not self.rows:
            prompt = input_ids[0].tolist()
            self.start = len(prompt) if self.ids[: len(prompt)] == prompt else 0
        position = self.start + len(self.rows)
        self.rows.append(self.logits.float().log_softmax(-1).cpu())
        forced = torch.full_like(scores, -torch.inf)
        forced[0, self.ids[position] if position < len(self.ids) else 0] = 0.0
        return forced


class _Until(StoppingCriteria):
    """Stop after the step at which the id at `position` was scored."""

    def __init__(self, prescription: _Prescription, position: int) -> None:
        self.prescription, self.position = prescription, position

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Return whether the generation is done, [1]."""
        scored = self.prescription.start + len(self.prescription.rows)
        return torch.full(input_ids.shape[:1], scored > self.position, device=input_ids.device)


def score_text(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], options: Mapping[str, Any], ids: Sequence[int], until: int
) -> ScoredText:
    """Return the log-probabilities along a text by one greedy generation.

    They are those of the logits, before processors such as `no_repeat_ngram_size`.

    Args:
        model: The PyTorch model.
        inputs: A single input, [1, source].
        options: Options of `GenerationConfig`; beams and sampling are ignored.
        ids: Ids as `generate` returns them.
        until: Position of the last id to score, at most `len(ids)`: the log-probabilities after the whole text.
    """
    prescription = _Prescription(ids)
    prompt = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    length = {"min_length": 0, "min_new_tokens": None, "max_length": None, "max_new_tokens": until + 1 - prompt}
    settings = GenerationConfig(
        **{**model.generation_config.to_diff_dict(), **options, **length, "num_beams": 1, "do_sample": False}
    )
    generate: Any = model.generate
    hook = model.register_forward_hook(prescription.take_logits)
    try:
        with torch.inference_mode():
            generate(
                **{name: tensor.to(model.device) for name, tensor in inputs.items()},
                generation_config=settings,
                logits_processor=LogitsProcessorList([prescription]),
                stopping_criteria=StoppingCriteriaList([_Until(prescription, until)]),
            )
    finally:
        hook.remove()
    return ScoredText(prescription.start, torch.stack(prescription.rows))
