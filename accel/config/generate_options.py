"""Section `generate`: options of accel's own, and options of transformers' `GenerationConfig`."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from accel.config import bounds
from accel.config.bounds import number
from accel.errors import AccelError

SMALLEST = 1e-6  # of numbers that must be above 0


@dataclass
class OwnOptions:
    """Options of the stage itself.

    Attributes:
        text: A text, or a list of them.
        file: File with one text per line.
        audio: A sound file, or a list of them.
        output: File for the outputs of `file`, one per line.
        batch_size: Inputs per batch.
        seed: Seed of sampling.
        chat: Put each text into the tokenizer's chat template.
    """

    text: Any = None
    file: str | None = None
    audio: Any = None
    output: str | None = None
    batch_size: int = number(16)
    seed: int = bounds.seed()
    chat: bool = False


@dataclass
class TransformersOptions:
    """Types and bounds of `GenerationConfig`'s numbers and switches, which transformers doesn't check.

    Its other options are checked by `GenerationConfig.validate` and by transformers' logits processors.
    """

    max_length: int | None = number(None)
    max_new_tokens: int | None = number(None)
    min_length: int | None = number(None, 0)
    min_new_tokens: int | None = number(None, 0)
    max_time: float | None = number(None, SMALLEST)
    do_sample: bool | None = None
    num_beams: int | None = number(None)
    num_return_sequences: int | None = number(None)
    use_cache: bool | None = None
    temperature: float | None = number(None, SMALLEST)
    top_k: int | None = number(None, 0)
    top_p: float | None = number(None, SMALLEST, 1)
    min_p: float | None = number(None, 0, 1)
    top_h: float | None = number(None, SMALLEST, 1)
    typical_p: float | None = number(None, SMALLEST, 1)
    epsilon_cutoff: float | None = number(None, 0, 1)
    eta_cutoff: float | None = number(None, 0, 1)
    repetition_penalty: float | None = number(None, SMALLEST)
    encoder_repetition_penalty: float | None = number(None, SMALLEST)
    length_penalty: float | None = number(None, -1000, 1000)
    no_repeat_ngram_size: int | None = number(None, 0)
    encoder_no_repeat_ngram_size: int | None = number(None, 0)
    guidance_scale: float | None = number(None, SMALLEST, 1000)
    renormalize_logits: bool | None = None
    remove_invalid_values: bool | None = None
    token_healing: bool | None = None
    output_attentions: bool | None = None
    output_hidden_states: bool | None = None
    output_scores: bool | None = None
    output_logits: bool | None = None
    return_dict_in_generate: bool | None = None
    prompt_lookup_num_tokens: int | None = number(None)
    max_matching_ngram_size: int | None = number(None)
    num_assistant_tokens: int | None = number(None)
    prefill_chunk_size: int | None = number(None)
    max_cache_len: int | None = number(None)
    disable_compile: bool | None = None
    is_assistant: bool | None = None
    assistant_confidence_threshold: float | None = number(None, 0, 1)
    assistant_early_exit: int | None = number(None)
    assistant_lookbehind: int | None = number(None)
    target_lookbehind: int | None = number(None)


OWN_OPTIONS = frozenset(item.name for item in fields(OwnOptions))


def generation_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that belong to transformers' `GenerationConfig`.

    Args:
        options: Section `generate` of the configuration.
    """
    return {name: value for name, value in options.items() if name not in OWN_OPTIONS}


def check_types(options: Mapping[str, Any]) -> None:
    """Check the types and bounds of the section's values.

    Args:
        options: The section.

    Raises:
        AccelError: A value has another type than its option, or is out of bounds.
    """
    for declared in (OwnOptions, TransformersOptions):
        names = {item.name for item in fields(declared)}
        section = OmegaConf.structured(declared)
        for name in names & set(options):
            try:
                section[name] = options[name]
            except OmegaConfBaseException as error:
                raise AccelError(f"generate.{name}={options[name]}: {str(error).splitlines()[0]}") from error
        bounds.check(OmegaConf.to_object(section), "generate")
    for name in ("text", "audio", "stop_strings"):
        _check_texts(f"generate.{name}", options.get(name))


def _check_texts(key: str, value: Any) -> None:
    """Raise `AccelError` unless `value` is None, a text, or a list of one or more texts. A number counts as text."""
    texts = value if isinstance(value, list) else [] if value is None else [value]
    if value is not None and not (texts and all(isinstance(text, str | int | float) for text in texts)):
        raise AccelError(f"{key}={value}: must be a text, or a list of one or more texts")
