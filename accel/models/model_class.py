"""Lookup of the transformers class that a Hugging Face config describes, without loading weights."""

from typing import Any

import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

# For configs that name no class: auto classes, whose `_model_mapping` maps a config class to a model class, and whether
# their models have an encoder.
AUTO_CLASSES = {AutoModelForSeq2SeqLM: True, AutoModelForSpeechSeq2Seq: True, AutoModelForCausalLM: False}

REMOTE_MODULES = "transformers_modules."  # package of the classes that transformers loads from a folder's own code

# Values of a config's `layer_types` for layers that keep a recurrent state instead of keys and values.
RECURRENT = {"linear_attention", "hybrid", "conv", "mamba"}


def model_class(config: PretrainedConfig) -> Any:
    """Return the transformers class of a config.

    Args:
        config: Hugging Face config. The first entry of `architectures` names the class; without one, the class is the
            one that transformers' auto classes for text generation map the config to.

    Returns:
        A subclass of `PreTrainedModel`, or None if transformers has no such class.
    """
    if type(config).__module__.startswith(REMOTE_MODULES):
        return _remote_class(config)
    name = next(iter(config.architectures or []), None)
    if name:
        named = getattr(transformers, name, None)
        return named if isinstance(named, type) and issubclass(named, PreTrainedModel) else None
    for auto_class, has_encoder in AUTO_CLASSES.items():
        classes: Any = auto_class._model_mapping
        if type(config) in classes and bool(config.is_encoder_decoder) is has_encoder:
            return classes[type(config)]
    return None


def _remote_class(config: PretrainedConfig) -> Any:
    """Return the model class in the code that the config itself came from, which the user allowed to run; or None."""
    auto_map = getattr(config, "auto_map", None) or {}
    for auto_class in AUTO_CLASSES:
        if auto_class.__name__ in auto_map:
            return get_class_from_dynamic_module(auto_map[auto_class.__name__], config.name_or_path or "")
    return None


def obstacle(config: PretrainedConfig) -> str | None:
    """Return the reason why accel can't export models with this config, as text for the user; None if none is known."""
    transformers_class = model_class(config)
    if transformers_class is None:
        name = next(iter(config.architectures or ["none"]))
        return f"transformers has no text generation class for a model of type {config.model_type!r} ({name})"
    subject = f"a model of type {config.model_type!r} ({transformers_class.__name__})"
    if not transformers_class.can_generate():
        return f"{subject} doesn't generate text token by token: an encoder alone predicts no next token"
    layers = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ())
    if transformers_class._is_stateful or layers & RECURRENT:
        return f"{subject} keeps a recurrent state instead of keys and values: accel supports KV caches only"
    return None
