"""The lines that dependencies keep to, the sizes of files and functions, and what the package is made of."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((*(ROOT / "accel").rglob("*.py"), *(ROOT / "architectures").rglob("*.py")))
FAMILIES = re.compile(
    r"(?<![A-Za-z])"
    r"(?i:m?t5|flan|ul2|m?bart|marian|pegasus|whisper|gpt|llama|qwen|bert|mistral|gemma|bloom|falcon)"
    r"(?![a-z])"
)
EMBEDDED = "t5-g2p"  # the model that ships with accel may be named where a default is
FILE_LINES, FUNCTION_LINES = 400, 60


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_layers() -> None:
    """Dependencies point one way, and nothing is in a circle: the contracts in pyproject.toml, by import-linter."""
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_only_the_registry_instantiates() -> None:
    """`hydra.utils.instantiate` runs code that a config names: one place may call it."""
    callers = {
        name(path)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if (
            (isinstance(node, ast.Attribute) and node.attr in ("instantiate", "call", "get_class", "get_method"))
            and "hydra" in ast.unparse(node)
        )
        or (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hydra.utils"))
    }
    assert callers == {"accel/adapters/registry.py"}


def test_every_package_says_what_belongs_in_it() -> None:
    """Its docstring, in a few lines."""
    for path in (path for path in SOURCES if path.name == "__init__.py"):
        assert len(ast.get_docstring(ast.parse(path.read_text())) or "") > 30, name(path)


def test_only_the_command_line_prints() -> None:
    """The library logs."""
    printing = {
        name(path)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print")
        or (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rich"))
    }
    assert {path for path in printing if not path.startswith("accel/cli/")} == set()


def code_words(path: Path) -> Iterator[tuple[int, str]]:
    """Identifiers and strings of a file, docstrings and comments left out."""
    tree = ast.parse(path.read_text())
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.lineno, node.value
        elif isinstance(node, ast.Name | ast.Attribute):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.arg):
            yield node.lineno, node.arg if isinstance(node, ast.arg) else node.name


def test_no_model_family_outside_architectures_and_conf() -> None:
    """The generic code makes no difference between families; only the embedded model's name may stand in it."""
    hits = [
        f"{name(path)}:{line}: {word}"
        for path in SOURCES
        if name(path).startswith("accel/")
        for line, word in code_words(path)
        if FAMILIES.search(word.replace(EMBEDDED, ""))
    ]
    assert hits == []


def test_model_types_are_compared_in_adapters_only() -> None:
    """`if model_type == ...` is how generic code stops being generic: what differs stands in an adapter or a YAML."""
    compared = re.compile(r"model_type\s*(==|!=|in\s*[\[({])|(==|!=)\s*[\w.]*model_type")
    hits = [
        f"{name(path)}:{number}: {line.strip()}"
        for path in SOURCES
        if name(path).startswith("accel/")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if compared.search(line)
    ]
    assert hits == []
    for line in ('if config.model_type == "x":', "if model_type in ('x', 'y'):", 'if "x" != model_type:'):
        assert compared.search(line), line


def test_architectures_stay_small() -> None:
    """A family is a YAML of a few lines; all adapters together are a few hundred."""
    adapters = list((ROOT / "architectures").glob("*.py"))
    assert sum(len(path.read_text().splitlines()) for path in adapters) < 500
    for path in (ROOT / "conf" / "architecture").glob("*.yaml"):
        assert len(path.read_text().splitlines()) < 15, path.name


def test_the_family_check_finds_families() -> None:
    """Names that must be found, and words that merely hold the same letters."""
    for word in ("T5Block", "t5_layers", "bart", "GPT2LMHeadModel", "google/mt5-small", "BertModel", "flan-t5"):
        assert FAMILIES.search(word), word
    for word in ("option", "optimize", "start", "format5", "chart"):
        assert not FAMILIES.search(word), word


def test_packages_are_the_folders_that_hold_code() -> None:
    """setuptools lists each package by hand: none missing, none left over."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    roots = {"accel": "accel", "conf": "accel.conf", "architectures": "accel.architectures"}
    found = {
        ".".join([package, *path.parent.relative_to(ROOT / folder).parts])
        for folder, package in roots.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert set(settings["packages"]) == found
    assert settings["package-dir"] == {package: folder for folder, package in roots.items()}
    for folder in roots:
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), name(path.parent)


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_sizes(path: Path) -> None:
    """A file over 400 lines or a function over 60 is asking to be split."""
    text = path.read_text()
    assert len(text.splitlines()) <= FILE_LINES
    long = [
        f"{node.name} has {(node.end_lineno or 0) - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > FUNCTION_LINES
    ]
    assert long == []


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_documentation(path: Path) -> None:
    """Every module says what it is for, and no module is called utils."""
    tree = ast.parse(path.read_text())
    assert path.stem not in ("utils", "helpers", "common", "misc")
    if tree.body:
        assert ast.get_docstring(tree), name(path)


def test_no_assertions_for_users() -> None:
    """`assert` vanishes under -O: what a user can cause is raised."""
    hits = [
        f"{name(path)}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert) and path.parent.name != "testing"
    ]
    assert hits == []
