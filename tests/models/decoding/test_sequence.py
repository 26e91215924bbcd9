"""Options of one sequence, and which of them only `generate` can run."""

from typing import Any

import pytest
import torch

from accel.models.decoding.generation_configs import generation_config_for
from accel.models.decoding.sequence import open_sequence, why_not_stepwise
from accel.models.generation import AcceleratedModel

IDS = torch.arange(5, 14)[None]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, None),
        ({"do_sample": True, "top_k": 5}, None),
        ({"repetition_penalty": 2.0, "min_new_tokens": 3}, None),
        ({"num_beams": 2}, "beam_search"),
        ({"prompt_lookup_num_tokens": 2}, "assisted_generation"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"guidance_scale": 1}, None),
        ({"max_time": 3.0}, "max_time"),
        ({"stop_strings": ["x"]}, "stop_strings"),
        ({"use_cache": False}, "use_cache"),
        ({"cache_implementation": "static"}, "cache_implementation"),
    ],
)
def test_what_needs_generate(model: AcceleratedModel, options: dict[str, Any], reason: str | None) -> None:
    assert why_not_stepwise(generation_config_for(model, options)) == reason


def test_decoder_prompt_and_lengths(model: AcceleratedModel) -> None:
    """As `generate` derives them: the start token comes first, and the model's own options are the defaults."""
    sequence = open_sequence(
        model, {"input_ids": IDS, "decoder_input_ids": torch.tensor([[7, 9]])}, {"max_new_tokens": 5}
    )
    assert sequence.prompt.tolist() == [[0, 7, 9]]
    assert (sequence.length, sequence.max_length, sequence.finished) == (3, 8, False)
    sequence.append(50)
    assert sequence.ids.tolist() == [[0, 7, 9, 50]]
    default = open_sequence(model, {"input_ids": IDS}, {})
    generated = model.generate(IDS, eos_token_id=None)
    assert default.max_length == generated.shape[1]
    sequence = open_sequence(model, {"input_ids": IDS}, {"max_new_tokens": 5, "eos_token_id": [50, 51]})
    sequence.append(51)
    assert sequence.ended
    assert sequence.finished


def test_mistakes(model: AcceleratedModel) -> None:
    for options in ({"top_k": "many", "do_sample": True}, {"num_beamz": 2}, {"bad_words_ids": 3}):
        with pytest.raises(ValueError, match=next(iter(options))):
            open_sequence(model, {"input_ids": IDS}, options)
