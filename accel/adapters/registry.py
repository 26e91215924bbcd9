"""Finds architectures: built in, installed with another package, or registered by hand. The only instantiate() call."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from omegaconf import OmegaConf

from accel.adapters.types import Architecture
from accel.config.hydra_setup import composing
from accel.errors import AccelError
from accel.pipeline.store import file_hash, make_key

GROUP = "architecture"


def register(name: str, target: Callable[..., Architecture], **options: Any) -> None:
    """Add an architecture from Python: `target(**options)` makes it, `architecture=name` chooses it.

    `target` must be importable by its name, as a class of a module or notebook is. Raises `AccelError` if the name is
    taken or `options` lacks `model_types`.
    """
    if name in names() or name == "auto":
        raise AccelError(f"architecture {name!r} is already registered; choose a name other than {', '.join(names())}")
    if not options.get("model_types"):
        raise AccelError(f"architecture {name!r}: model_types=[...] is missing: the config.model_type values it serves")
    path = f"{target.__module__}.{target.__qualname__}"
    ConfigStore.instance().store(name=name, group=GROUP, node={"_target_": path, **options}, provider="accel.register")


def names() -> list[str]:
    """Every architecture that can be chosen, `auto` aside."""
    with composing() as loader:
        return [name for name in loader.get_group_options(GROUP, ObjectType.CONFIG) if name != "auto"]


def served() -> dict[str, Sequence[str]]:
    """Architecture -> the model types it serves."""
    with composing() as loader:
        found = {name: loader.repository.load_config(f"{GROUP}/{name}") for name in names()}
    return {name: tuple(result.config.get("model_types", ())) for name, result in found.items() if result}


def choose(model_type: str) -> str | None:
    """The architecture whose YAML names `model_type`, if any does. Raises `AccelError` if several do."""
    found = [name for name, types in served().items() if model_type in types]
    if len(found) > 1:
        raise AccelError(
            f"model type {model_type!r} is named by {', '.join(found)}: choose, as in architecture={found[0]}"
        )
    return found[0] if found else None


def model_types() -> list[str]:
    """Every model type that some architecture names."""
    return sorted({kind for types in served().values() for kind in types})


def build(config: Mapping[str, Any]) -> Architecture:
    """The adapter that a resolved `architecture` config describes."""
    if "_target_" not in config:
        raise AccelError(f"architecture: _target_ is missing from {dict(config)}")
    try:
        adapter = hydra.utils.instantiate(OmegaConf.create(dict(config)), _convert_="all")
    except Exception as error:  # whatever the adapter's constructor raises is a mistake in its YAML
        raise AccelError(f"architecture {config['_target_']}: {error.__cause__ or error}") from error
    if not isinstance(adapter, Architecture):
        missing = [
            name for name in ("model_types", "roles", "wrap", "signature", "feeds") if not hasattr(adapter, name)
        ]
        raise AccelError(f"architecture {config['_target_']} is no Architecture: it lacks {', '.join(missing)}")
    return adapter


def source_hash(config: Mapping[str, Any], adapter: Architecture) -> str:
    """Hash of the code that an adapter runs: the packages of its class, of those it derives from, and of every wrapper
    that its config names; of a class that was typed in, as in a notebook, what it was compiled to."""
    kinds = [kind for kind in type(adapter).__mro__ if kind.__module__ not in ("builtins", "typing", "abc")]
    modules = {kind.__module__ for kind in kinds} | {target.rpartition(".")[0] for target in _targets(config)}
    files = sorted({path for module in modules for path in _files(module)})
    typed = [line for kind in kinds if kind.__module__ == "__main__" for line in _compiled(kind)]
    return make_key(files={str(path.name): file_hash(path) for path in files}, typed=typed)


def _targets(config: Any) -> Iterator[str]:
    """Every `_target_` in a config, at any depth."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            if key == "_target_":
                yield str(value)
            else:
                yield from _targets(value)


def _files(module: str) -> list[Path]:
    """The module's file, and those beside it if it is in a package."""
    found = sys.modules.get(module)
    file = getattr(found, "__file__", None)
    if file is None:
        return []
    return sorted(Path(file).parent.glob("*.py")) if getattr(found, "__package__", "") else [Path(file)]


def _compiled(kind: type) -> Iterator[str]:
    """What the functions of a class were compiled to."""
    for name, member in vars(kind).items():
        if isinstance(member, FunctionType):
            yield f"{kind.__qualname__}.{name}"
            yield from _code(member.__code__)


def _code(code: CodeType) -> Iterator[str]:
    yield code.co_code.hex()
    yield repr((code.co_names, code.co_varnames))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant)
        else:
            yield repr(constant)
