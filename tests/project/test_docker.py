"""Dockerfiles: they can't be built here, so they are linted, and their paths compared with the checkout."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "scripts" / "docker").iterdir())


@pytest.fixture(params=DOCKERFILES, ids=[path.name for path in DOCKERFILES])
def dockerfile(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_there_is_one_for_the_cpu_and_one_for_cuda() -> None:
    assert [path.name for path in DOCKERFILES] == ["Dockerfile.cpu", "Dockerfile.cuda"]


def test_hadolint_has_nothing_to_say(dockerfile: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "hadolint", "--no-color", dockerfile], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_paths_and_extras_exist(dockerfile: Path) -> None:
    """What is copied is what the package is built from, and the extras are those of pyproject.toml."""
    text = dockerfile.read_text()
    copied = {name for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for name in line.split()}
    assert copied == {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "accel", "conf", "architectures"}
    assert all((ROOT / name).exists() for name in copied)
    extras = re.search(r"\.\[(.*)\]", text)
    assert extras is not None
    project = (ROOT / "pyproject.toml").read_text()
    for extra in extras[1].split(","):
        assert f"\n{extra} = [" in project


def test_the_server_has_no_rights_and_is_watched(dockerfile: Path) -> None:
    text = dockerfile.read_text()
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["10001"]
    assert "--uid 10001" in text
    assert text.rstrip().endswith('ENTRYPOINT ["python", "-m", "accel", "stage=serve", "serve.host=0.0.0.0"]')
    assert "127.0.0.1:8000/health" in text
