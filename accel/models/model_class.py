"""From a Hugging Face config to the transformers class it describes, without its weights."""

from typing import Any

import transformers
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq, PretrainedConfig

# Where a config names no class: the mappings from config to class, and whether the class has an encoder.
AUTO_CLASSES = {AutoModelForSeq2SeqLM: True, AutoModelForSpeechSeq2Seq: True, AutoModelForCausalLM: False}

RECURRENT = {"linear_attention", "hybrid", "conv", "mamba"}  # `layer_types` of layers that keep no keys and values


def model_class(config: PretrainedConfig) -> Any:
    """The class that `config.architectures` names, or that generates for such a config; None if there is none."""
    if name := next(iter(config.architectures or []), None):
        return getattr(transformers, name, None)
    for auto, encodes in AUTO_CLASSES.items():
        classes: Any = auto._model_mapping
        if type(config) in classes and bool(config.is_encoder_decoder) is encodes:
            return classes[type(config)]
    return None


def obstacle(config: PretrainedConfig) -> str | None:
    """Why such a model can't be accelerated, in words; None if nothing is known against it."""
    kind = model_class(config)
    name = kind.__name__ if kind is not None else next(iter(config.architectures or ["none"]))
    what = f"a model of type {config.model_type!r} ({name})"
    if kind is None:
        return f"transformers has no class that generates for {what}"
    if not kind.can_generate():
        return f"{what} doesn't generate text token by token: an encoder alone knows no next token"
    layers = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ())
    if kind._is_stateful or layers & RECURRENT:
        return f"{what} keeps a recurrent state instead of keys and values, and nothing else can be cached here"
    return None
