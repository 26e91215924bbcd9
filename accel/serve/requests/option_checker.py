"""Check of the options that clients send, beyond what stage=generate allows the user of this machine."""

import json
from collections.abc import Callable
from functools import lru_cache

from transformers import PretrainedConfig

from accel.config.generate_options import check_types
from accel.models.option_check import check_options

# Options that clients can't set: what `generate` returns, how it computes, and what `accel.serve` itself does.
FORBIDDEN = {
    "stop_strings": "use stop",
    "num_return_sequences": "use n",
    **dict.fromkeys(("max_length", "min_length"), "use max_new_tokens or min_new_tokens, which don't count the prompt"),
    **dict.fromkeys(("max_time",), "the server limits the time of requests"),
    **dict.fromkeys(
        (
            *("return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores"),
            *("output_logits", "use_cache", "cache_implementation", "cache_config", "max_cache_len"),
            *("return_legacy_cache", "prefill_chunk_size", "compile_config", "disable_compile", "is_assistant"),
            *("low_memory", "token_healing", "return_timestamps", "return_token_timestamps", "return_segments"),
        ),
        "it is about how results are computed or returned, which the server decides",
    ),
}


def checker(config: PretrainedConfig) -> Callable[[str], None]:
    """Return a function that checks options against a model, and remembers those that passed: clients repeat theirs.

    Args:
        config: Hugging Face config of the model.

    Returns:
        Function of the options as JSON, which raises `AccelError` if a value can't be used.
    """

    @lru_cache(maxsize=1024)
    def check(options: str) -> None:
        values = json.loads(options)
        check_types(values)
        check_options(values, config)

    return check
