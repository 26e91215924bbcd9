"""Presets of runtimes and precisions, read from YAML files without Hydra.

A deployable opens in any application and thread, and a precision can name others.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from accel.config import bounds
from accel.config.packages import group_files
from accel.config.schema import PrecisionConfig, RuntimeConfig
from accel.errors import AccelError, unknown

RUNTIME, PRECISION = "runtime", "precision"  # groups
TRIAL_LIMITS = ("max_token_changes", "max_divergence", "max_output_error")  # of `PrecisionConfig`
OPTIONS = tuple(field.name for field in fields(RuntimeConfig) if field.name != "name")


def runtime_preset(name: str, built: Mapping[str, Any] | None = None, **options: Any) -> RuntimeConfig:
    """Return the runtime that a preset's YAML file describes.

    A file's `defaults` list may name other files of the group and `_self_`, as in Hydra.

    Args:
        name: Name of the preset: that of a file in a group `runtime`.
        built: Values of the runtime that a deployable was built with; they replace the file's if their `name` is the
            same.
        **options: Fields of `RuntimeConfig` that replace both.

    Raises:
        AccelError: On an unknown name or option, with the choices, or a value of the wrong type or out of bounds.
    """
    for option in options:
        if option not in OPTIONS:
            raise unknown(f"option of accel.load(runtime={name!r})", option, OPTIONS)
    merged = OmegaConf.merge(OmegaConf.structured(RuntimeConfig), _read(RUNTIME, name))
    try:
        if built is not None and built.get("name") == name:
            merged = OmegaConf.merge(merged, {key: value for key, value in built.items() if key in OPTIONS})
        merged = OmegaConf.merge(merged, options)
        runtime = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise AccelError(f"runtime={name}: {str(error).splitlines()[0]}") from error
    if not isinstance(runtime, RuntimeConfig):
        raise AccelError(
            f"runtime={name}: {name}.yaml doesn't describe a runtime; its keys must be {', '.join(OPTIONS)}"
        )
    bounds.check(runtime, "runtime")
    return runtime


def dump(runtime: RuntimeConfig) -> dict[str, Any]:
    """Return a runtime's values as JSON, for the argument `built` of `runtime_preset`."""
    return asdict(runtime)


def precision_candidates(precision: PrecisionConfig) -> dict[str, PrecisionConfig]:
    """Return the precisions that `precision.candidates` names, by name.

    The limits of trials that `precision` sets replace those of candidates in low bits.

    Raises:
        AccelError: A candidate is no preset in FP32 or in low bits, or named twice, or `precision` sets something that
            each candidate sets for itself.
    """
    presets = {name: _precision(name) for name in group_files(PRECISION)}
    choices = [name for name, each in presets.items() if each is not None]
    default = PrecisionConfig(name=precision.name, candidates=precision.candidates)
    changed = {key: value for key, value in vars(precision).items() if value != getattr(default, key)}
    for key, value in changed.items():
        if key not in TRIAL_LIMITS:
            raise AccelError(
                f"precision.{key}={value} with precision.candidates={precision.candidates}: candidates have their own. "
                f"What can be set for all of them: {', '.join(TRIAL_LIMITS)}"
            )
    candidates: dict[str, PrecisionConfig] = {}
    for name in precision.candidates:
        preset = presets.get(name)
        if preset is None:
            raise unknown("precision in precision.candidates", name, choices)
        if name in candidates:
            raise AccelError(f"precision.candidates={precision.candidates} names {name} twice")
        candidates[name] = preset if preset.exact else replace(preset, **changed)
    return candidates


def _precision(name: str) -> PrecisionConfig | None:
    """Return a precision that may be a candidate: one with FP32 between its products, that isn't a choice itself."""
    merged = OmegaConf.merge(OmegaConf.structured(PrecisionConfig), _read(PRECISION, name))
    precision = OmegaConf.to_object(merged)
    named = isinstance(precision, PrecisionConfig) and name == precision.name and name != "auto"
    if not isinstance(precision, PrecisionConfig) or not named or precision.candidates:
        return None
    return precision if precision.dtype == "float32" else None


def _read(group: str, name: str, including: tuple[str, ...] = ()) -> DictConfig:
    """Read the file `name` of a group, merged with the files of its `defaults` list.

    `including`: the files whose `defaults` lists led here, outermost first.
    """
    presets = group_files(group)
    if name not in presets:
        raise unknown(group, name, presets)
    if name in including:
        cycle = " -> ".join((*including, name))
        raise AccelError(f"{group}={name}: its defaults list leads back to itself: {cycle}. Remove one of the entries")
    own = OmegaConf.create(presets[name].read_text(encoding="utf-8"))
    if not isinstance(own, DictConfig):
        raise AccelError(f"{group}={name}: {name}.yaml must hold keys and values")
    defaults = [str(entry) for entry in own.pop("defaults", ["_self_"])]
    if "_self_" not in defaults:
        defaults.append("_self_")
    parts = [own if entry == "_self_" else _read(group, entry, (*including, name)) for entry in defaults]
    merged = OmegaConf.merge(*parts)
    if not isinstance(merged, DictConfig):
        raise AccelError(f"{group}={name}: {name}.yaml must hold keys and values")
    return merged
