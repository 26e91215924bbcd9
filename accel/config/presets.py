"""A runtime's YAML file read without Hydra, so that a deployable opens inside any application and in any thread."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from accel.config.packages import group_files
from accel.config.schema import RuntimeConfig
from accel.errors import AccelError, unknown

GROUP = "runtime"
OPTIONS = tuple(field.name for field in fields(RuntimeConfig) if field.name != "name")


def runtime_preset(name: str, built: Mapping[str, Any] | None = None, **options: Any) -> RuntimeConfig:
    """Return the runtime that `<name>.yaml` in a group `runtime` describes, with `options` in place of its values.

    `built`: values that a deployable was built with; they count where their `name` is the same. A file's `defaults`
    list may name other files of the group and `_self_`, as in Hydra. Raises `AccelError` on an unknown name or option,
    or a value of another type, and lists the choices.
    """
    for option in options:
        if option not in OPTIONS:
            raise unknown(f"option of accel.load(runtime={name!r})", option, OPTIONS)
    merged = OmegaConf.merge(OmegaConf.structured(RuntimeConfig), _read(name))
    try:
        if built is not None and built.get("name") == name:
            merged = OmegaConf.merge(merged, {key: value for key, value in built.items() if key in OPTIONS})
        merged = OmegaConf.merge(merged, options)
        found = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise AccelError(f"runtime={name}: {str(error).splitlines()[0]}") from error
    if not isinstance(found, RuntimeConfig):
        raise AccelError(f"runtime={name}: {name}.yaml describes no runtime")
    return found


def dump(runtime: RuntimeConfig) -> dict[str, Any]:
    """The values of a runtime as JSON, for `built` of a later `runtime_preset`."""
    return asdict(runtime)


def _read(name: str, above: tuple[str, ...] = ()) -> DictConfig:
    """The file `name` over the files that its `defaults` list names."""
    known = group_files(GROUP)
    if name not in known:
        raise unknown("runtime", name, known)
    if name in above:
        raise AccelError(f"runtime={name}: its defaults list leads back to itself: {' -> '.join((*above, name))}")
    own = OmegaConf.create(known[name].read_text(encoding="utf-8"))
    if not isinstance(own, DictConfig):
        raise AccelError(f"runtime={name}: {name}.yaml must hold keys and values")
    defaults = [str(entry) for entry in own.pop("defaults", ["_self_"])]
    parts = [own if entry == "_self_" else _read(entry, (*above, name)) for entry in defaults]
    merged = OmegaConf.merge(*parts, *([] if "_self_" in defaults else [own]))
    if not isinstance(merged, DictConfig):
        raise AccelError(f"runtime={name}: {name}.yaml must hold keys and values")
    return merged
