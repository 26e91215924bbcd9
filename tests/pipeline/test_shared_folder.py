"""Runs in processes of their own over one artifact folder, and over too small a one."""

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import overrides_for

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LIMIT = 100_000  # bytes of the largest file; the exported encoder alone has more
SMALL_DISK = "1m"


class Run:
    """`python -m accel stage=export` on a checkpoint, with its output in a file.

    Args:
        checkpoint: Folder of the checkpoint.
        artifacts: Artifact folder.
        output: File that stdout and stderr go to.
        prepare: Runs in the new process first.
    """

    def __init__(
        self, checkpoint: Path, artifacts: Path, output: Path, prepare: Callable[[], None] | None = None
    ) -> None:
        self.output = output
        with output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "accel", *overrides_for(checkpoint, artifacts, "stage=export")],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "400"},
                cwd=output.parent,
                preexec_fn=prepare,
            )

    def wait_for(self, text: str) -> None:
        """Wait until the output holds a text."""
        deadline = time.monotonic() + 300
        while text not in self.output.read_text():
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.05)

    def finish(self) -> str:
        """Return the whole output, once the process has ended."""
        self.process.wait(300)
        return self.output.read_text()


def wait_for_folder(artifacts: Path) -> None:
    """Wait until an export has its temporary folder, and so its lock."""
    deadline = time.monotonic() + 300
    while not any(artifacts.glob("*/export-*.tmp*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("killed", [False, True])
def test_two_runs(tiny: Path, tmp_path: Path, killed: bool) -> None:
    """The second waits, says for what, and uses what the first one made; or goes on where that one was killed."""
    first = Run(tiny, tmp_path / "artifacts", tmp_path / "first.txt")
    wait_for_folder(tmp_path / "artifacts")
    second = Run(tiny, tmp_path / "artifacts", tmp_path / "second.txt")
    second.wait_for("waiting for another run, which is making export-")
    if killed:
        first.process.kill()
    outputs = first.finish(), second.finish()
    assert first.process.returncode == (-9 if killed else 0), outputs[0]
    assert second.process.returncode == 0, outputs[1]
    made = ["made in" in output.partition("export ")[2] for output in outputs]
    assert made == [not killed, killed], outputs
    folders = [path.name for path in (tmp_path / "artifacts").glob("*/export-*") if path.suffix != ".lock"]
    assert len(folders) == 1, folders


def assert_space(output: str, returncode: int, artifacts: Path) -> None:
    """Assert that a run ended with a message of the file, the stage and the space, and removed its files."""
    assert returncode == 2, output
    assert "Traceback" not in output
    message = " ".join(output.split())
    assert "stage export can't write" in message
    assert f"{artifacts}" in message
    assert "the stage needs about" in message
    assert not [path for path in artifacts.glob("*/*") if path.suffix != ".lock"]


def test_limit_on_the_size_of_files(tiny: Path, tmp_path: Path) -> None:
    """As after `ulimit -f`."""
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
    run = Run(tiny, tmp_path / "artifacts", tmp_path / "output.txt", limit)
    assert_space(run.finish(), run.process.returncode, tmp_path / "artifacts")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """File system of one MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        shutil.which("mount")
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", str(folder)], capture_output=True, check=False
        ).returncode
    )
    if not mounted:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(tiny: Path, tmp_path: Path, small_disk: Path) -> None:
    run = Run(tiny, small_disk, tmp_path / "output.txt")
    assert_space(run.finish(), run.process.returncode, small_disk)
