"""Every command in README.md and docs/precision.md runs.

Fenced blocks marked `bash` or `python` are run in order of appearance, in one folder, with the artifacts of this run.
A block is skipped if an HTML comment before it says so: `<!-- test: needs hub -->`, `<!-- test: needs gpu -->`,
`<!-- test: tests -->` for the test run itself, `<!-- test: server -->` for what ends by a signal only,
`<!-- test: installs -->` for what `.ci/run` does in a clean clone, and `<!-- test: large -->` for what takes a quarter
of an hour.
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
SKIPPED = {"needs hub", "needs gpu", "installs", "tests", "large", "server"}


@dataclass(frozen=True)
class Block:
    """Fenced block: its line, language and code, and the mark in the comment before it."""

    line: int
    kind: str
    code: str
    mark: str | None


def blocks(text: str) -> list[Block]:
    """Return the `bash` and `python` blocks of a page, in order."""
    return [
        Block(text[: match.start("code")].count("\n") + 1, match["kind"], match["code"], match["mark"])
        for match in BLOCK.finditer(text)
    ]


BLOCKS = blocks(README.read_text()) if README.is_file() else []


def test_blocks_are_found() -> None:
    """Language, line and comment are parsed; other fences are ignored."""
    text = (
        "# x\n\n```bash\npython -m accel\n```\n\n<!-- test: needs hub -->\n\n```python\nimport accel\n```\n\n"
        "```\nplain\n```\n\n```yaml\na: 1\n```\n\n<!-- test: needs gpu -->\n```bash\na\nb\n```\n"
    )
    assert blocks(text) == [
        Block(4, "bash", "python -m accel\n", None),
        Block(10, "python", "import accel\n", "needs hub"),
        Block(23, "bash", "a\nb\n", "needs gpu"),
    ]


def test_readme_has_blocks() -> None:
    """README has blocks of both languages, known comments only, and the commands to run and to test."""
    assert {block.kind for block in BLOCKS} == {"bash", "python"}
    assert {block.mark for block in BLOCKS} <= SKIPPED | {None}
    assert any(block.mark is None for block in BLOCKS)
    assert "python -m accel" in README.read_text()
    assert "python -m pytest" in README.read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, artifacts: Path) -> Path:
    """Folder with links to the checkout's files and to the artifacts of this test run."""
    root = tmp_path_factory.mktemp("readme")
    for name in ("conf", "scripts", "architectures", "tests", "accel", "constraints.txt", "pyproject.toml"):
        if (ROOT / name).exists():
            (root / name).symlink_to(ROOT / name)
    artifacts.mkdir(exist_ok=True)
    (root / "artifacts").symlink_to(artifacts)
    (root / "bin").mkdir()
    for name in ("python", "python3"):
        (root / "bin" / name).symlink_to(sys.executable)
    script = shutil.which("accel", path=str(Path(sys.executable).parent))
    if script:
        (root / "bin" / "accel").symlink_to(script)
    return root


def command(block: Block) -> list[str]:
    """Return the command that runs a block; the shell stops at the first error."""
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
    """The block runs without an error, on the embedded model and without a network."""
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
