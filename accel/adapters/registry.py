"""Registry of architectures: built in, installed with another package, or registered from Python.

This is the only module that instantiates objects from configuration.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from omegaconf import OmegaConf

from accel.adapters.types import Architecture
from accel.config.hydra_setup import composing
from accel.errors import AccelError

GROUP = "architecture"
MEMBERS = ("model_types", "components", "wrap", "signature", "sample_inputs")  # of an `Architecture`


def register(name: str, target: Callable[..., Architecture], **options: Any) -> None:
    """Register an architecture from Python, to be chosen by `architecture=name`.

    Args:
        name: Name that no other architecture has.
        target: Class or function that makes the adapter. Must be importable by its name, as a class of a module or
            notebook is.
        **options: Arguments for `target`; `model_types` is required.

    Raises:
        AccelError: If the name is taken or `model_types` is missing.
    """
    if name in names() or name == "auto":
        raise AccelError(f"architecture {name!r} is already registered; choose a name other than {', '.join(names())}")
    if not options.get("model_types"):
        raise AccelError(
            f"architecture {name!r}: model_types is missing; pass model_types=[...] with the config.model_type values "
            "that the adapter handles"
        )
    path = f"{target.__module__}.{target.__qualname__}"
    ConfigStore.instance().store(name=name, group=GROUP, node={"_target_": path, **options}, provider="accel.register")


def names() -> list[str]:
    """Return the names of all architectures, without `auto`."""
    with composing() as loader:
        return [name for name in loader.get_group_options(GROUP, ObjectType.CONFIG) if name != "auto"]


def served() -> dict[str, Sequence[str]]:
    """Return the model types of every architecture, by its name."""
    types: dict[str, Sequence[str]] = {}
    with composing() as loader:
        for name in names():
            loaded = loader.repository.load_config(f"{GROUP}/{name}")
            if loaded:
                types[name] = tuple(loaded.config.get("model_types", ()))
    return types


def choose(model_type: str) -> str | None:
    """Return the architecture whose `model_types` contain `model_type`; None if there is none.

    Raises:
        AccelError: If there are several.
    """
    matches = [name for name, types in served().items() if model_type in types]
    if len(matches) > 1:
        raise AccelError(
            f"model type {model_type!r} is named by {', '.join(matches)}: choose one of them, as in "
            f"architecture={matches[0]}"
        )
    return matches[0] if matches else None


def model_types() -> list[str]:
    """Return the model types of all architectures, sorted."""
    return sorted({model_type for types in served().values() for model_type in types})


def build(config: Mapping[str, Any]) -> Architecture:
    """Make the adapter that a resolved `architecture` config describes.

    Raises:
        AccelError: If `_target_` is missing, can't be called with the config's values, or makes no `Architecture`.
    """
    if "_target_" not in config:
        raise AccelError(f"architecture: _target_ is missing from {dict(config)}")
    try:
        adapter = hydra.utils.instantiate(OmegaConf.create(dict(config)), _convert_="all")
    except Exception as error:  # whatever the adapter's constructor raises is a mistake in its YAML
        raise AccelError(f"architecture {config['_target_']}: {error.__cause__ or error}") from error
    if not isinstance(adapter, Architecture):
        missing = [member for member in MEMBERS if not hasattr(adapter, member)]
        raise AccelError(f"architecture {config['_target_']} is no Architecture: it lacks {', '.join(missing)}")
    return adapter
