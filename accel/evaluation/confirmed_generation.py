"""Confirmation of generated ids by logits that were computed for all of them in one call.

Greedy search picks each id by the logits after the ids before it. So if `generate`, given the logits along some ids in
place of the model's, picks these very ids, they are what the model generates, by induction over the ids. One call for
all ids takes a fraction of the time of a decode step for each.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast, Seq2SeqLMOutput

from accel.models.generation import Generates


def answers_by_one_call(model: Generates) -> bool:
    """Return whether `answering` holds for a model: its `generate` is transformers' own, which calls it once a step."""
    return getattr(type(model), "generate", None) is GenerationMixin.generate


@contextmanager
def answering(model: Generates, logits: Tensor) -> Iterator[None]:
    """Open a context in which the decoder of `model` isn't computed, but answers one generation from known logits.

    Args:
        model: PyTorch's model, for which `answers_by_one_call`. It is called for one sequence, with one id more at each
            step; an encoder is computed as always.
        logits: Logits after each id of the sequence that is expected, [1, ids, vocabulary]. After more steps than
            expected the last ones are given again.
    """
    owner: Any = model
    own_forward = vars(owner).get("forward")
    output_class = Seq2SeqLMOutput if model.config.is_encoder_decoder else CausalLMOutputWithPast
    position: int | None = None

    @wraps(owner.forward)  # `generate` looks at the signature
    def answer(*_: Any, **inputs: Any) -> Any:
        nonlocal position
        prompt = inputs["decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"]  # [1, ids]
        position = prompt.shape[1] - 1 if position is None else min(position + 1, logits.shape[1] - 1)
        answered = logits[:, position : position + 1].to(model.device)  # [1, 1, vocabulary]
        return output_class(logits=answered, past_key_values=inputs.get("past_key_values"))

    owner.forward = answer
    try:
        yield
    finally:
        if own_forward is None:
            del owner.forward
        else:
            owner.forward = own_forward
