"""Configs of options that came before are copied, and equal to those that transformers combines anew."""

from typing import Any

import pytest
from transformers import CompileConfig

from accel.models.decoding import generation_configs
from accel.models.decoding.generation_configs import GenerationConfigs, generation_config_for
from accel.models.generation import AcceleratedModel

OPTIONS: list[dict[str, Any]] = [
    {},
    {"max_new_tokens": 5},
    {"max_new_tokens": 7},
    {"max_length": 9},
    {"max_new_tokens": 7, "do_sample": True, "temperature": 0.5, "top_k": 3},
    {"max_new_tokens": 8, "do_sample": True, "temperature": 0.5, "top_k": 4},
    {"max_new_tokens": 8, "bad_words_ids": [[5, 6]]},
    {"eos_token_id": [3, 4]},
    {"num_beams": 2, "max_new_tokens": 3},
    {"num_beams": True, "max_new_tokens": 3},
]


def test_equal_to_new_ones(model: AcceleratedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """In three rounds, of which only the first combines, once for those that differ in `max_new_tokens` alone."""
    configs, combined = GenerationConfigs(model), []

    def combine(*arguments: Any) -> Any:
        combined.append(arguments)
        return generation_config_for(*arguments)

    monkeypatch.setattr(generation_configs, "generation_config_for", combine)
    for _ in range(3):
        for options in OPTIONS:
            assert configs.of(options).to_dict() == generation_config_for(model, options).to_dict()
    assert len(combined) == len(OPTIONS) - 1


def test_nothing_leaks(model: AcceleratedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a caller does to its config isn't in the next one; changes of the model's own config are."""
    configs = GenerationConfigs(model)
    first = configs.of({"max_new_tokens": 5})
    first.temperature, first._eos_token_tensor = 0.1, object()
    again = configs.of({"max_new_tokens": 6})
    assert again.temperature != 0.1
    assert not hasattr(again, "_eos_token_tensor")
    monkeypatch.setattr(model.generation_config, "top_k", 17)
    assert configs.of({"max_new_tokens": 6}).top_k == 17


def test_what_is_not_kept(model: AcceleratedModel) -> None:
    """Objects, and values that are refused: those are refused each time."""
    configs = GenerationConfigs(model)
    for options in ({"max_new_tokens": 0}, {"max_new_tokens": -1}, {"num_beamz": 2}):
        for _ in range(2):
            with pytest.raises(ValueError, match=next(iter(options))):
                configs.of({"max_new_tokens": 4} | options)
    given = CompileConfig()
    assert configs.of({"compile_config": given}).compile_config is given
    assert not configs._kept


def test_few_are_kept(model: AcceleratedModel) -> None:
    """The ones that were used last."""
    configs = GenerationConfigs(model)
    for number in range(1, generation_configs.KEPT + 10):
        assert configs.of({"top_k": number}).top_k == number
        assert configs.of({"top_k": 1}).top_k == 1
    assert len(configs._kept) == generation_configs.KEPT
    assert any('"top_k": 1}' in key for key in configs._kept)
