"""Tutorials in docs/ run: the blocks of each in order, in one folder and a new virtual environment."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.project.test_packaging import ROOT, fresh, install, source
from tests.project.test_readme import blocks

TUTORIALS = [ROOT / "docs" / name for name in ("add-an-architecture.md", "when-yaml-is-not-enough.md")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.xdist_group(page.stem)) for page in TUTORIALS],
    ids=lambda page: page.stem,
)
def test_tutorial(page: Path, tmp_path: Path) -> None:
    """Every block runs without an error, with accel installed from a copy of the checkout."""
    python = fresh(tmp_path / "venv")
    install(python, "-e", source(tmp_path / "checkout"))
    folder = tmp_path / "work"
    folder.mkdir()
    environment = os.environ | {
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PYTHONPATH": str(folder),
    }
    for name in ("VIRTUAL_ENV", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_CURRENT_TEST"):
        environment.pop(name, None)
    page_blocks = blocks(page.read_text())
    assert {block.kind for block in page_blocks} <= {"bash", "python"}
    assert len(page_blocks) >= 4
    for block in page_blocks:
        program = ["bash", "-euo", "pipefail", "-c"] if block.kind == "bash" else [str(python), "-c"]
        done = subprocess.run([*program, block.code], capture_output=True, text=True, cwd=folder, env=environment)
        message = f"{page.name}, line {block.line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        assert done.returncode == 0, message
        assert "Traceback" not in done.stderr, message
