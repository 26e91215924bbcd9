"""From a composed configuration to finished stages: what the command line and `accel.build` share."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

from accel import progress
from accel.adapters import registry
from accel.cli.validate import check_lengths, check_texts, validate
from accel.config.hydra_setup import composing
from accel.config.schema import Config
from accel.errors import AccelError, unknown
from accel.pipeline.runner import Pipeline, chosen
from accel.pipeline.store import Artifact
from accel.runtime.providers import fastest
from accel.stages import generate

if TYPE_CHECKING:
    from transformers import PretrainedConfig

AUTO = "auto"
ENCODER_DECODER, DECODER_ONLY = "seq2seq", "causal"  # architectures of any model of that shape
ADD_ONE = "docs/add-an-architecture.md says how to add one: often a YAML of two lines"


def settle(composed: DictConfig, overrides: Sequence[str]) -> Config:
    """Return the typed configuration, with every `auto` replaced by what it stands for.

    `overrides`: what `composed` was composed from. Raises `AccelError` on a value that can't be used.
    """
    chosen(OmegaConf.to_container(composed.stage) if OmegaConf.is_config(composed.stage) else composed.stage)
    resolved = resolve(composed, overrides)
    config = typed(composed if resolved == list(overrides) else hydra.compose("config", resolved))
    validate(config)
    return config


def resolve(composed: DictConfig, overrides: Sequence[str]) -> list[str]:
    """Return the overrides with every `auto` replaced: choices of files in `conf/`, and values that follow from them.

    Raises `AccelError` where what decides, as the checkpoint, can't be read.
    """
    config = typed(composed)
    keys = {_key(given) for given in overrides}
    if "model.checkpoint" in keys and "model" not in keys:  # of the default model nothing but its name was meant
        other = [*overrides, f"model={AUTO}"]
        return resolve(hydra.compose("config", other), other)
    if config.model.name == AUTO and not config.model.checkpoint:
        raise AccelError("model=auto needs model.checkpoint=FOLDER_OR_HUB_ID")
    choices: dict[str, str] = {}
    if config.runtime.name == AUTO:
        choices["runtime"] = fastest()
    if config.precision.name == AUTO:
        runtime = choices.get("runtime", config.runtime.name)
        choices["precision"] = "fp32" if runtime == "cpu" else "fp16"
    if config.architecture.get("_target_") is None:
        choices["architecture"] = _architecture(config)
    kept = [given for given in overrides if _key(given) not in choices]
    values: dict[str, str] = {}
    if config.model.weights == "random" and config.model.references is not None:
        values["model.references"] = "null"  # nothing that random weights write is right
    if config.model.name == AUTO:
        values["model.name"] = _quoted(Path(str(config.model.checkpoint)).name or "model")
    return [*kept, *(f"{key}={value}" for key, value in (choices | values).items())]


def _key(override: str) -> str:
    return override.split("=")[0].lstrip("+")


def _quoted(value: str) -> str:
    """A value as Hydra's override grammar takes it. https://hydra.cc/docs/advanced/override_grammar/basic/"""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def resolved_overrides(overrides: Sequence[str]) -> list[str]:
    """Return what `resolve` does, outside Hydra's own application."""
    with composing():
        return resolve(hydra.compose("config", list(overrides)), overrides)


def typed(composed: DictConfig) -> Config:
    """The dataclass behind a composed configuration."""
    _refuse_extra(composed, Config, "")
    config = OmegaConf.to_object(composed)
    if not isinstance(config, Config):
        raise AccelError("conf/config.yaml must start from the schema")
    return config


def _refuse_extra(section: Any, kind: Any, prefix: str) -> None:
    """Raises `AccelError` on a key that `+section.key=value` added where the schema has none."""
    known = {field.name: field.type for field in fields(kind)}
    for key in section:
        if key not in known:
            raise unknown("config key", f"{prefix}{key}", [f"{prefix}{name}" for name in known])
        if is_dataclass(known[key]):
            _refuse_extra(section[key], known[key], f"{prefix}{key}.")


def execute(config: Config) -> dict[str, Artifact]:
    """Run the stages the configuration asks for."""
    architecture = registry.build(config.architecture)
    description = _description(config)
    model_type = description.model_type
    if architecture.model_types and model_type not in architecture.model_types:
        raise unknown(
            f"model type for architecture {config.architecture['_target_']}", model_type, architecture.model_types
        )
    stages = chosen(config.stage, mixed=config.precision.dtype != "float32")
    check_lengths(config, description, stages)
    if "generate" in stages:
        generate.check(config, description)
    check_texts(config, stages)
    return Pipeline(config, architecture).run(stages)


def compose(overrides: Sequence[str]) -> Config:
    """The configuration for `overrides` as on the command line, outside Hydra's own application."""
    with composing():
        return settle(hydra.compose("config", list(overrides)), overrides)


def _description(config: Config) -> "PretrainedConfig":
    """The Hugging Face config of the model, which generates text and keeps keys and values. Raises `AccelError`."""
    from accel.models import checkpoints
    from accel.models.model_class import obstacle
    from accel.stages import checkpoint

    checkpoint.check(config.model)
    description = checkpoints.model_config(config.model)
    if reason := obstacle(description):
        raise AccelError(
            f"{config.model.checkpoint or config.model.name}: {reason}.\n"
            f"Model types with an architecture of their own: {', '.join(registry.model_types())}.\n{ADD_ONE}"
        )
    return description


def _architecture(config: Config) -> str:
    """The architecture whose YAML names the checkpoint's model type; failing that, the one of its shape."""
    description = _description(config)
    name = registry.choose(description.model_type)
    if name is None:
        name = ENCODER_DECODER if description.is_encoder_decoder else DECODER_ONLY
        progress.note(
            f"model type {description.model_type!r}: no architecture names it, so architecture={name}, the generic "
            f"{'encoder-decoder' if description.is_encoder_decoder else 'decoder-only'} shape, is taken"
        )
    return name
