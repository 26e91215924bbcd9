"""Check of options of `generate` against a model, before anything is exported."""

import inspect
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PretrainedConfig
from transformers.generation.utils import GENERATION_MODES_MAPPING

from accel.errors import AccelError, summarize
from accel.models.arguments import vocabulary_sizes
from accel.models.model_class import model_class

TOKEN_IDS = re.compile(r"_token_id$|_ids$|suppress_tokens$")  # names of options that hold ids, single or nested
INPUTS = {"attention_mask", "decoder_input_ids", "encoder_outputs"}  # tensors, which no option can hold
PROMPT_LENGTH = 1  # tokens of the input that the processors are tried on


class _Processors(GenerationMixin):
    """Builder of transformers' logits processors for a model that isn't loaded."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config


def option_names(config: PretrainedConfig) -> set[str]:
    """Return the names of options: those of `GenerationConfig`, and those that the model's own `generate` adds."""
    names = {name for name in GenerationConfig().to_dict() if not name.startswith("_")} - {"transformers_version"}
    own_class: Any = model_class(config)
    if own_class is not None:
        own = set(inspect.signature(own_class.generate).parameters)
        names |= (
            own - set(inspect.signature(GenerationMixin.generate).parameters) - INPUTS - {own_class.main_input_name}
        )
    return names


def check_options(options: Mapping[str, Any], config: PretrainedConfig) -> None:
    """Check values by transformers' own means, and ids against the vocabulary.

    The options are validated by `GenerationConfig`, and the logits processors that they ask for are made and applied
    once. `guidance_scale` is left out: its processor runs the model.

    Args:
        options: Options of `GenerationConfig`.
        config: Hugging Face config of the model.

    Raises:
        AccelError: A value can't be used.
    """
    vocabulary = vocabulary_sizes(config)[1]
    for name, value in options.items():
        if TOKEN_IDS.search(name):
            _check_ids(name, value, vocabulary)
    for smaller, larger in (("min_new_tokens", "max_new_tokens"), ("min_length", "max_length")):
        if (options.get(smaller) or 0) > (options.get(larger) or float("inf")):
            raise AccelError(
                f"generate.{smaller}={options[smaller]}: must not exceed generate.{larger}={options[larger]}"
            )
    if config.is_encoder_decoder and options.get("guidance_scale") not in (None, 1):
        raise AccelError(
            f"generate.guidance_scale={options['guidance_scale']}: transformers' guidance runs a model on the ids "
            "of its decoder alone, which an encoder-decoder can't"
        )
    error = _try(options, config, vocabulary)
    if error is not None:
        alone = [name for name in options if _try({name: options[name]}, config, vocabulary) is not None]
        blamed = alone[:1] or [name for name in options if _try(_without(options, name), config, vocabulary) is None]
        culprits = " and ".join(f"generate.{name}={options[name]}" for name in blamed)
        raise AccelError(f"{culprits or 'generate'}: {summarize(error)}") from error


def _without(options: Mapping[str, Any], left_out: str) -> dict[str, Any]:
    """Return all options but one."""
    return {name: value for name, value in options.items() if name != left_out}


def _try(options: Mapping[str, Any], config: PretrainedConfig, vocabulary: int) -> Exception | None:
    """Return the error that transformers raises on these options, when it validates or applies them."""
    try:
        settings = GenerationConfig(**{**options, "guidance_scale": None})
        settings.validate()
        loop = GENERATION_MODES_MAPPING[settings.get_generation_mode()]
        if "/" in loop:
            raise ValueError(
                f"transformers would download the code for this from https://hf.co/{loop}, and accel won't"
            )
        settings.max_length = settings.max_length or settings.max_new_tokens or 20
        settings._eos_token_tensor = torch.zeros(1, dtype=torch.int64)
        ids = torch.zeros(1, PROMPT_LENGTH, dtype=torch.int64)
        builder: Any = _Processors(config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            processors = builder._get_logits_processor(
                settings,
                input_ids_seq_length=PROMPT_LENGTH,
                encoder_input_ids=ids,
                logits_processor=LogitsProcessorList(),
                device="cpu",
                model_kwargs={},
            )
            processors(ids, torch.zeros(1, vocabulary))
    except Exception as error:  # of any class, depending on the value
        return error
    return None


def _check_ids(name: str, value: Any, vocabulary: int) -> None:
    """Raise `AccelError` unless `value` is None, an id of the vocabulary, or a list of ids or of further lists."""
    for element in _flatten(value):
        if type(element) is not int or not 0 <= element < vocabulary:
            raise AccelError(f"generate.{name}={value}: {element!r} is no id of the vocabulary, 0 to {vocabulary - 1}")


def _flatten(value: Any) -> Iterator[Any]:
    """Yield the elements of nested lists; nothing for None."""
    if isinstance(value, list):
        for element in value:
            yield from _flatten(element)
    elif value is not None:
        yield value
