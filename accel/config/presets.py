"""Runtime presets, read from YAML files without Hydra, so that a deployable opens in any application and thread."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from accel.config import bounds
from accel.config.packages import group_files
from accel.config.schema import RuntimeConfig
from accel.errors import AccelError, unknown

GROUP = "runtime"
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
    merged = OmegaConf.merge(OmegaConf.structured(RuntimeConfig), _read(name))
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


def _read(name: str, including: tuple[str, ...] = ()) -> DictConfig:
    """Read the file `name`, merged with the files of its `defaults` list.

    `including`: the files whose `defaults` lists led here, outermost first.
    """
    presets = group_files(GROUP)
    if name not in presets:
        raise unknown("runtime", name, presets)
    if name in including:
        cycle = " -> ".join((*including, name))
        raise AccelError(f"runtime={name}: its defaults list leads back to itself: {cycle}. Remove one of the entries")
    own = OmegaConf.create(presets[name].read_text(encoding="utf-8"))
    if not isinstance(own, DictConfig):
        raise AccelError(f"runtime={name}: {name}.yaml must hold keys and values")
    defaults = [str(entry) for entry in own.pop("defaults", ["_self_"])]
    if "_self_" not in defaults:
        defaults.append("_self_")
    parts = [own if entry == "_self_" else _read(entry, (*including, name)) for entry in defaults]
    merged = OmegaConf.merge(*parts)
    if not isinstance(merged, DictConfig):
        raise AccelError(f"runtime={name}: {name}.yaml must hold keys and values")
    return merged
