"""Log-probabilities along a prescribed text are those of PyTorch's own forward pass, prompts of `generate` included."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from accel.data import texts
from accel.evaluation.prescribed_generation import score_text
from accel.stages import reference
from accel.testing import random_model
from tests.families import FAMILIES

OPTIONS = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False, "num_beams": 1, "no_repeat_ngram_size": 1}


def forward_rows(model: PreTrainedModel, inputs: Mapping[str, Tensor], ids: list[int], start: int) -> Tensor:
    """Return the log-probabilities at positions from `start` to the end, by one forward pass."""
    decoder: dict[str, Any] = {"input_ids": torch.tensor([ids])}
    if model.config.is_encoder_decoder:
        decoder = {**inputs, "decoder_input_ids": torch.tensor([ids])}
    with torch.no_grad():
        rows: Tensor = model(**decoder).logits[0].log_softmax(-1)
    return rows[start - 1 :]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_rows_are_those_of_a_forward_pass(family: str) -> None:
    """For a text that greedy search wouldn't choose, and whatever processors would forbid."""
    model = random_model(FAMILIES[family])
    inputs = texts.unpadded([41, 20, 21, 22, 7])
    (generated,) = reference.generate_ids(model, [inputs], OPTIONS)
    start = 1 if model.config.is_encoder_decoder else 5
    ids = [*generated[: start + 2], 33, 33, 12, 33]
    scored = score_text(model, inputs, OPTIONS, ids, len(ids))
    assert scored.start == start
    torch.testing.assert_close(scored.rows, forward_rows(model, inputs, ids, start), rtol=1e-4, atol=1e-4)
    assert scored.at(start + 2, 33) == pytest.approx(float(scored.rows[2, 33]))
    shorter = score_text(model, inputs, OPTIONS, ids[: start + 1], start + 1)
    torch.testing.assert_close(shorter.rows, scored.rows[:2], rtol=1e-4, atol=1e-4)


def test_prompt_that_generate_does_not_return() -> None:
    """Whisper's decoder is given tokens before the text; the model is left as it was."""
    model = random_model(FAMILIES["whisper"])
    features = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(0))
    inputs = {"input_features": features[:, : model.config.num_mel_bins, : 2 * model.config.max_source_positions]}
    (generated,) = reference.generate_ids(model, [inputs], OPTIONS)
    prompt = [model.generation_config.decoder_start_token_id]
    scored = score_text(model, inputs, OPTIONS, generated, len(generated) - 1)
    returned = generated[: len(prompt)] == prompt
    assert scored.start == (len(prompt) if returned else 0)
    decoder_ids = generated if returned else prompt + generated
    expected = forward_rows(model, inputs, decoder_ids, len(prompt))[: len(scored.rows)]
    torch.testing.assert_close(scored.rows, expected, rtol=1e-4, atol=1e-4)
    assert not model._forward_hooks
