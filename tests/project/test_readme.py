"""Every command in README.md and docs/precision.md runs.

Fenced blocks marked `bash` or `python` are run in order of appearance, in one folder, with the artifacts of this run.
An HTML comment on the line before a block changes that: `<!-- test: needs hub -->` or `<!-- test: needs gpu -->`
leaves it to a machine that has one, `<!-- test: tests -->` is the test run itself, which can't run within itself, and
`<!-- test: installs -->` is run by `.ci/run` on a clean clone, `<!-- test: large -->` takes a quarter of an hour.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = (README, ROOT / "docs" / "precision.md")
BLOCK = re.compile(
    r"(?:^<!-- test: (?P<mark>[^>]*?) -->\s*\n)?^```(?P<kind>bash|python)\n(?P<code>.*?)^```$", re.M | re.S
)
SKIPPED = {"needs hub", "needs gpu", "installs", "tests", "large"}


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, its language, its code and what the comment before it says."""

    line: int
    kind: str
    code: str
    mark: str | None


def blocks(text: str) -> list[Block]:
    """The blocks to run, in order."""
    return [
        Block(text[: found.start("code")].count("\n") + 1, found["kind"], found["code"], found["mark"])
        for found in BLOCK.finditer(text)
    ]


BLOCKS = blocks(README.read_text()) if README.is_file() else []


def test_blocks_are_found() -> None:
    """Language, line and comment are read; other fences are left alone."""
    text = (
        "# x\n\n```bash\npython -m accel\n```\n\n<!-- test: needs hub -->\n\n```python\nimport accel\n```\n\n"
        "```\nplain\n```\n\n```yaml\na: 1\n```\n\n<!-- test: needs gpu -->\n```bash\na\nb\n```\n"
    )
    assert blocks(text) == [
        Block(4, "bash", "python -m accel\n", None),
        Block(10, "python", "import accel\n", "needs hub"),
        Block(23, "bash", "a\nb\n", "needs gpu"),
    ]


def test_readme_holds_its_promises() -> None:
    """There is a README with blocks of both kinds, and its comments are among those that mean something."""
    assert {block.kind for block in BLOCKS} == {"bash", "python"}
    assert {block.mark for block in BLOCKS} <= SKIPPED | {None}
    assert any(block.mark is None for block in BLOCKS)
    assert "python -m accel" in README.read_text()
    assert "python -m pytest" in README.read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, artifacts: Path) -> Path:
    """Where a reader would stand: beside the checkout's files, with the artifacts of this run."""
    place = tmp_path_factory.mktemp("readme")
    for name in ("conf", "scripts", "architectures", "tests", "accel", "constraints.txt", "pyproject.toml"):
        if (ROOT / name).exists():
            (place / name).symlink_to(ROOT / name)
    artifacts.mkdir(exist_ok=True)
    (place / "artifacts").symlink_to(artifacts)
    (place / "bin").mkdir()
    for name in ("python", "python3"):
        (place / "bin" / name).symlink_to(sys.executable)
    script = shutil.which("accel", path=str(Path(sys.executable).parent))
    if script:
        (place / "bin" / "accel").symlink_to(script)
    return place


def command(block: Block) -> list[str]:
    """How a block is run: the shell stops at the first command that fails."""
    return (
        ["bash", "-euo", "pipefail", "-c", block.code] if block.kind == "bash" else [sys.executable, "-c", block.code]
    )


@pytest.mark.slow
@pytest.mark.xdist_group("readme")
@pytest.mark.parametrize(
    "block",
    [pytest.param(block, id=f"{page.name} line {block.line}") for page in PAGES for block in blocks(page.read_text())],
)
def test_block_runs(block: Block, folder: Path) -> None:
    """The block ends without an error, on the embedded model and without a network."""
    if block.mark in SKIPPED:
        pytest.skip(f"marked: {block.mark}")
    # It would change the environment that the tests run in, or start them inside themselves.
    assert "pip install" not in block.code, "mark this block `<!-- test: installs -->`"
    assert "pytest" not in block.code, "mark this block `<!-- test: tests -->`"
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MPLBACKEND": "agg",
    }
    done = subprocess.run(command(block), capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, f"{block.code}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr
