"""Compose, resolve and validate the configuration, and run its stages; shared by the command line and `accel.build`."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

from accel import progress
from accel.adapters import registry
from accel.cli.validate import check_generate, check_lengths, check_texts, validate
from accel.config.hydra_setup import check_choices, composing
from accel.config.schema import EXPORT_TRITON, SERVE, Config
from accel.errors import AccelError, unknown
from accel.models import peft_adapter
from accel.pipeline import estimate
from accel.pipeline.replan import run_and_replan
from accel.pipeline.runner import Pipeline, includes, select_stages
from accel.pipeline.store import Artifact
from accel.runtime.providers import fastest, runs_kernel
from accel.stages import choice, generate
from accel.system import remote_code

if TYPE_CHECKING:
    from transformers import PretrainedConfig

AUTO = "auto"
ENCODER_DECODER, DECODER_ONLY = "seq2seq", "causal"  # generic architectures, for model types that no other one lists
REFERENCE = re.compile(r"\$\{([\w.]+)\}")  # a value taken from another key
ADVICE = "To add an architecture, often a YAML of two lines, see docs/add-an-architecture.md"


def settle(composed: DictConfig, overrides: Sequence[str]) -> Config:
    """Return the validated configuration, typed and with every `auto` resolved.

    Args:
        composed: Configuration as Hydra composed it.
        overrides: Overrides that it was composed from, as `key=value`.

    Raises:
        AccelError: If a value can't be used.
    """
    select_stages(OmegaConf.to_container(composed.stage) if OmegaConf.is_config(composed.stage) else composed.stage)
    resolved = resolve(composed, overrides)
    final = composed if resolved == list(overrides) else hydra.compose("config", resolved)
    config = typed(final)
    try:
        validate(config)
    except AccelError as error:
        raise AccelError(_with_given_keys(str(error), final, overrides)) from error
    return config


def _with_given_keys(message: str, composed: DictConfig, overrides: Sequence[str]) -> str:
    """Return a message in which keys that refer to an overridden one, such as `${runtime.static}`, are replaced by it.

    Args:
        message: Message that may name a key.
        composed: Configuration as Hydra composed it.
        overrides: Overrides that it was composed from.
    """
    given = {_key(override) for override in overrides}
    for key, value in _leaves(OmegaConf.to_container(composed, resolve=False), ""):
        source = REFERENCE.fullmatch(str(value))
        if source is not None and source[1] in given and key not in given:
            message = re.sub(rf"(?<![\w.]){re.escape(key)}(?![\w.])", source[1], message)
    return message


def _leaves(section: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield key and value of all values in nested dictionaries."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def resolve(composed: DictConfig, overrides: Sequence[str]) -> list[str]:
    """Return overrides in which every `auto` is replaced by a choice, and values that depend on it are set.

    Args:
        composed: Configuration as Hydra composed it.
        overrides: Overrides that it was composed from, as `key=value`.

    Raises:
        AccelError: If the choice depends on a checkpoint that can't be read.
    """
    config = typed(composed)
    keys = {_key(override) for override in overrides}
    if "model.checkpoint" in keys and "model" not in keys:  # another checkpoint: the default model's values don't hold
        with_auto = [*overrides, f"model={AUTO}"]
        return resolve(hydra.compose("config", with_auto), with_auto)
    if config.model.name == AUTO and not config.model.checkpoint:
        raise AccelError("model=auto: model.checkpoint is missing; give model.checkpoint=FOLDER_OR_HUB_ID")
    choices: dict[str, str] = {}
    if config.runtime.name == AUTO:
        choices["runtime"] = fastest()
    if config.precision.name == AUTO:
        runtime = choices.get("runtime", config.runtime.name)
        choices["precision"] = "fp32" if runtime == "cpu" else "fp16"
    values: dict[str, str] = {}
    in_16_bits = choices.get("precision", config.precision.name) == "fp16" or config.precision.dtype != "float32"
    if choices.get("runtime") == "cuda-graph" and in_16_bits and runs_kernel():
        choices["runtime"] = "cuda-fused"
        if "runtime.engine" not in keys:
            values["runtime.engine"] = AUTO  # the kernel if it is verified: nobody asked for it by name
    if config.architecture.get("_target_") is None:
        choices["architecture"] = _architecture(config)
    if config.model.weights == "random" and config.model.references is not None:
        values["model.references"] = "null"  # outputs of random weights match no reference
    if config.model.name == AUTO:
        values["model.name"] = _quoted(Path(str(config.model.checkpoint)).name or "model")
    if includes(config.stage, SERVE, EXPORT_TRITON) and "runtime.static" not in keys:
        values["runtime.static"] = "true"  # for requests that enter and leave a running batch by themselves
    resolved = [override for override in overrides if _key(override) not in choices]
    resolved += [f"{key}={value}" for key, value in (choices | values).items()]
    return resolved


def _key(override: str) -> str:
    """Return the key of an override, without Hydra's plus."""
    return override.split("=")[0].lstrip("+")


def _quoted(value: str) -> str:
    """Quote a value for Hydra's override grammar: https://hydra.cc/docs/advanced/override_grammar/basic/."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def resolved_overrides(overrides: Sequence[str]) -> list[str]:
    """Compose the configuration outside Hydra's application, and return its overrides with every `auto` replaced.

    Args:
        overrides: Overrides, as `key=value`.
    """
    with composing():
        return resolve(hydra.compose("config", list(overrides)), overrides)


def typed(composed: DictConfig) -> Config:
    """Return a composed configuration as the dataclass of the schema.

    Args:
        composed: Configuration as Hydra composed it.

    Raises:
        AccelError: If it has a key that the schema lacks.
    """
    _check_keys(composed, Config, "")
    config = OmegaConf.to_object(composed)
    if not isinstance(config, Config):
        raise AccelError("conf/config.yaml: `schema` is missing from its defaults list; make it the first entry")
    return config


def _check_keys(section: Any, dataclass_type: Any, prefix: str) -> None:
    """Raise `AccelError` on a key that `+section.key=value` added and the schema lacks."""
    types = {field.name: field.type for field in fields(dataclass_type)}
    for key in section:
        if key not in types:
            raise unknown("config key", f"{prefix}{key}", [f"{prefix}{name}" for name in types])
        if is_dataclass(types[key]):
            _check_keys(section[key], types[key], f"{prefix}{key}.")


def execute(config: Config) -> dict[str, Artifact]:
    """Run the stages that `config.stage` selects.

    Args:
        config: Configuration, resolved and validated.

    Returns:
        Stage -> artifact, for the selected stages and those they depend on.

    Raises:
        AccelError: If the model, or an input file, is not one that the stages can use.
    """
    with remote_code.allowing(config.model.trust_remote_code):
        return _execute(config)


def _execute(config: Config) -> dict[str, Artifact]:
    """Run the stages of `execute`."""
    architecture = registry.build(config.architecture)
    description = _description(config)
    model_type = description.model_type
    if architecture.model_types and model_type not in architecture.model_types:
        raise unknown(
            f"model type for architecture {config.architecture['_target_']}", model_type, architecture.model_types
        )
    if config.model.peft_adapter is not None:
        peft_adapter.check_fits(config.model.peft_adapter, description)
    check_generate(config.generate, description)
    stages = select_stages(config.stage, mixed=not config.precision.exact)
    check_lengths(config, description, stages)
    if "generate" in stages:
        generate.check(config, description)
    check_texts(config, stages)
    if config.precision.candidates:
        return choice.run(config, architecture, description)
    pipeline = Pipeline(config, architecture)
    estimate.announce(config, description, pipeline.pending(stages))
    return run_and_replan(config, architecture, stages)[1]


def compose(overrides: Sequence[str]) -> Config:
    """Return the validated configuration for `overrides`, outside Hydra's application.

    Args:
        overrides: Overrides as on the command line, `key=value`.

    Raises:
        AccelError: If a value can't be used.
    """
    with composing():
        check_choices(overrides)
        return settle(hydra.compose("config", list(overrides)), overrides)


def _description(config: Config) -> "PretrainedConfig":
    """Return the model's Hugging Face config. Raises `AccelError` if the model can't be accelerated."""
    from accel.models import checkpoints
    from accel.models.model_class import obstacle
    from accel.stages import checkpoint

    checkpoint.check(config.model)
    description = checkpoints.model_config(config.model)
    reason = obstacle(description)
    if reason is not None:
        raise AccelError(
            f"{config.model.checkpoint or config.model.name}: {reason}.\n"
            f"Model types with an architecture of their own: {', '.join(registry.model_types())}.\n{ADVICE}"
        )
    return description


def _architecture(config: Config) -> str:
    """Return the architecture that lists the checkpoint's model type, or else the generic one of its shape."""
    description = _description(config)
    name = registry.choose(description.model_type)
    if name is None:
        name = ENCODER_DECODER if description.is_encoder_decoder else DECODER_ONLY
        shape = "encoder-decoder" if description.is_encoder_decoder else "decoder-only"
        progress.note(
            f"model type {description.model_type!r}: no architecture lists it, so architecture={name} is used, the "
            f"generic one for {shape} models"
        )
    return name
