"""Structure of the code: layers of imports, sizes of files and functions, docstrings, packages."""

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
EMBEDDED = "t5-g2p"  # the model that ships with accel, which defaults may name
FILE_LINES, FUNCTION_LINES = 400, 60


def name(path: Path) -> str:
    """Return a path relative to the repository."""
    return str(path.relative_to(ROOT))


def test_layers() -> None:
    """Imports keep to the contracts in pyproject.toml: one direction, no cycles."""
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_only_the_registry_instantiates() -> None:
    """`hydra.utils.instantiate`, which runs code that a configuration names, is called in one module only."""
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


def test_packages_have_docstrings() -> None:
    """Every package has a docstring of more than a few words."""
    for path in (path for path in SOURCES if path.name == "__init__.py"):
        assert len(ast.get_docstring(ast.parse(path.read_text())) or "") > 30, name(path)


def test_only_the_command_line_prints() -> None:
    """Only `accel.cli` prints or imports rich; the library logs."""
    printing = {
        name(path)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print")
        or (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rich"))
    }
    assert {path for path in printing if not path.startswith("accel/cli/")} == set()


def identifiers_and_strings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield identifiers and strings of a file with their lines, without docstrings and comments."""
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
    """Generic code doesn't name model families, except the embedded model."""
    hits = [
        f"{name(path)}:{line}: {word}"
        for path in SOURCES
        if name(path).startswith("accel/")
        for line, word in identifiers_and_strings(path)
        if FAMILIES.search(word.replace(EMBEDDED, ""))
    ]
    assert hits == []


def test_model_types_are_compared_in_adapters_only() -> None:
    """Generic code doesn't compare `model_type`: differences between families belong in an adapter or YAML."""
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
    """A family's YAML has a few lines, all adapters together a few hundred."""
    adapters = list((ROOT / "architectures").glob("*.py"))
    assert sum(len(path.read_text().splitlines()) for path in adapters) < 500
    for path in (ROOT / "conf" / "architecture").glob("*.yaml"):
        assert len(path.read_text().splitlines()) < 15, path.name


def test_pattern_of_families() -> None:
    """The pattern matches names of families, not words that contain the same letters."""
    for word in ("T5Block", "t5_layers", "bart", "GPT2LMHeadModel", "google/mt5-small", "BertModel", "flan-t5"):
        assert FAMILIES.search(word), word
    for word in ("option", "optimize", "start", "format5", "chart"):
        assert not FAMILIES.search(word), word


def test_packages_are_listed() -> None:
    """setuptools lists exactly the folders that contain code."""
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
    """No file has more than 400 lines, and no function more than 60."""
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
    """Every module has a docstring, and none is called utils or the like."""
    tree = ast.parse(path.read_text())
    assert path.stem not in ("utils", "helpers", "common", "misc")
    if tree.body:
        assert ast.get_docstring(tree), name(path)


def test_no_assertions_for_users() -> None:
    """The library raises errors instead of asserting, because -O removes assertions."""
    hits = [
        f"{name(path)}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert) and path.parent.name != "testing"
    ]
    assert hits == []
