"""Hashes of the code that makes an artifact, so that changed code makes it again."""

import ast
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from accel.adapters.types import Architecture
from accel.system.hashing import file_hash, make_key

PACKAGE = __name__.partition(".")[0]


def stage_source(name: str) -> str:
    """Return the hash of the code that stage `name` runs: its module, and all modules of accel imported from there on.

    Comments, docstrings and layout don't count. Code of other packages counts by its version: see `Stage.packages`.
    """
    hashes: dict[str, str] = {}
    pending = [f"{PACKAGE}.stages.{name}"]
    while pending:
        module = pending.pop()
        if module not in hashes:
            hashes[module], imported = _module(module)
            pending += imported
    return make_key(**hashes)


@cache
def _module(name: str) -> tuple[str, tuple[str, ...]]:
    """Return the hash of a module's code, and the full names of the modules of accel that it imports anywhere."""
    path = _path(name)
    if path is None:
        return "", ()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            imported += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:]
    own_modules = {module for module in imported if module.startswith(f"{PACKAGE}.") and _path(module) is not None}
    return make_key(code=ast.dump(tree)), tuple(sorted(own_modules))


@cache
def _path(module: str) -> Path | None:
    """Return the file of a module of accel without importing it; None for a name that is no module."""
    base = Path(__file__).parents[1].joinpath(*module.split(".")[1:])
    for file in (base.with_suffix(".py"), base / "__init__.py"):
        if file.is_file():
            return file
    return None


def adapter_source(config: Mapping[str, Any], adapter: Architecture) -> str:
    """Return the hash of the code that an adapter runs.

    It covers the packages of the adapter's class, of its base classes and of every `_target_` in `config`. A class
    that is defined in `__main__`, as in a notebook, has no file: there the compiled code of its functions counts.

    Args:
        config: The resolved `architecture` section.
        adapter: The adapter built from it.
    """
    classes = [base for base in type(adapter).__mro__ if base.__module__ not in ("builtins", "typing", "abc")]
    modules = {base.__module__ for base in classes}
    modules |= {target.rpartition(".")[0] for target in _targets(config)}
    files = sorted({path for module in modules for path in _package_files(module)})
    compiled: list[str] = []
    for base in classes:
        if base.__module__ == "__main__":
            compiled += _class_code(base)
    return make_key(files={path.name: file_hash(path) for path in files}, typed=compiled)


def _targets(config: Any) -> Iterator[str]:
    """Yield every `_target_` in a config, at any depth."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            if key == "_target_":
                yield str(value)
            else:
                yield from _targets(value)


def _package_files(module: str) -> list[Path]:
    """Return the file of an imported module, with the other Python files of its folder if it is in a package."""
    loaded = sys.modules.get(module)
    file = getattr(loaded, "__file__", None)
    if file is None:
        return []
    if getattr(loaded, "__package__", ""):
        return sorted(Path(file).parent.glob("*.py"))
    return [Path(file)]


def _class_code(cls: type) -> Iterator[str]:
    """Yield the name and the compiled code of every function of a class."""
    for name, member in vars(cls).items():
        if isinstance(member, FunctionType):
            yield f"{cls.__qualname__}.{name}"
            yield from _code(member.__code__)


def _code(code: CodeType) -> Iterator[str]:
    """Yield the bytecode, names and constants of a code object and of those nested in it."""
    yield code.co_code.hex()
    yield repr((code.co_names, code.co_varnames))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant)
        else:
            yield repr(constant)
