"""Reading of a Hugging Face folder's config, tokenizer and feature extractor, whose code is not run unless allowed.

A folder may bring Python code (`auto_map` in its JSON files), which transformers offers to run after a question on the
terminal. Here the answer is given beforehand, by `accel.system.remote_code`: no, unless the user says otherwise.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from accel.errors import AccelError
from accel.system import remote_code


def load_config(folder: Path) -> PretrainedConfig:
    """Return the Hugging Face config of a folder.

    Raises:
        AccelError: It can't be read, transformers doesn't know its model type, or it needs code that isn't allowed.
    """
    config: PretrainedConfig = _load(AutoConfig.from_pretrained, folder, "config.json")
    attention = str(config._attn_implementation)
    if "/" in attention and not remote_code.is_allowed():  # a repository of kernels, which transformers would run
        raise _refusal(folder, f"config.json names the attention kernels {attention!r}")
    return config


def load_generation_config(folder: Path) -> GenerationConfig:
    """Return the generation config of a folder, made from its config.json where it has none.

    Raises:
        AccelError: One of them can't be read.
    """
    if not (folder / "generation_config.json").is_file():
        return GenerationConfig.from_model_config(load_config(folder))
    try:
        return GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise _unreadable(folder, "generation_config.json", error) from error


def end_tokens(folder: Path) -> tuple[int, ...]:
    """Return the ids that end a text by the generation config of a folder; none if it names none."""
    ends = load_generation_config(folder).eos_token_id
    if ends is None:
        return ()
    return tuple(ends) if isinstance(ends, list) else (int(ends),)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder. Raises `AccelError` as `load_config` does."""
    tokenizer: PreTrainedTokenizerBase = _load(AutoTokenizer.from_pretrained, folder, "tokenizer")
    return tokenizer


def load_extractor(folder: Path) -> Any:
    """Return the feature extractor of a folder. Raises `AccelError` as `load_config` does."""
    return _load(AutoFeatureExtractor.from_pretrained, folder, "feature extractor")


def _load(from_pretrained: Callable[..., Any], folder: Path, part: str) -> Any:
    """Call `from_pretrained` with the permission for remote code, and turn its errors into `AccelError`."""
    try:
        return from_pretrained(folder, trust_remote_code=remote_code.is_allowed())
    except Exception as error:  # the parsers of transformers and tokenizers raise many kinds, `Exception` among them
        if "trust_remote_code" in str(error):
            raise _refusal(folder, f"its {part} needs Python code of the folder or of its author (auto_map)") from error
        raise _unreadable(folder, part, error) from error


def _refusal(folder: Path, reason: str) -> AccelError:
    """Return the error for a folder whose code isn't allowed to run."""
    return AccelError(
        f"{folder}: {reason}, which could do anything on this machine and was not run. If you have read that code and "
        "trust it: model.trust_remote_code=true, or accel.load(..., trust_remote_code=True)"
    )


def _unreadable(folder: Path, part: str, error: Exception) -> AccelError:
    """Return the error for a damaged file."""
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return AccelError(f"{folder}: can't read its {part}: {reason}")
