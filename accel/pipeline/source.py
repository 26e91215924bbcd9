"""Hashes of the code that makes an artifact: a change of it makes the artifact anew."""

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
    """Return the hash of the code that stage `name` runs: its module, and every module of accel that leads to.

    Comments, docstrings and layout don't count. Code of other packages counts by its version: see `Stage.packages`.
    """
    seen: dict[str, str] = {}
    found = [f"{PACKAGE}.stages.{name}"]
    while found:
        module = found.pop()
        if module not in seen:
            seen[module], imported = _module(module)
            found += imported
    return make_key(**seen)


@cache
def _module(name: str) -> tuple[str, tuple[str, ...]]:
    """Return the hash of a module's code, and the modules of accel that it imports anywhere, by their full names."""
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
    own = sorted({one for one in imported if one.startswith(f"{PACKAGE}.") and _path(one) is not None})
    return make_key(code=ast.dump(tree)), tuple(own)


@cache
def _path(module: str) -> Path | None:
    """Return the file of a module of accel, found without importing it; None for the name of something in a module."""
    place = Path(__file__).parents[1].joinpath(*module.split(".")[1:])
    files = (place.with_suffix(".py"), place / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def adapter_source(config: Mapping[str, Any], adapter: Architecture) -> str:
    """Hash of the code that an adapter runs: the packages of its class, of those it derives from, and of every wrapper
    that its config names; of a class that was typed in, as in a notebook, what it was compiled to.
    """
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
