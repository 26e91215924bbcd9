"""Models and artefacts that many tests share. Each is made once per run, whatever the number of workers."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from accel.application import compose, execute
from accel.artifacts import Artifact
from accel.schema import Config
from tests.models import random_t5

torch.set_num_threads(1)  # two workers share the machine


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the workers of this run have in common."""
    root = tmp_path_factory.getbasetemp()
    return root.parent if os.environ.get("PYTEST_XDIST_WORKER") else root


@pytest.fixture(scope="session")
def tiny(shared: Path) -> Path:
    """The checkpoint of a tiny T5 with random weights."""
    folder = shared / "tiny"
    if not (folder / "config.json").exists():
        scratch = shared / f"tiny.{os.getpid()}"
        random_t5().save_pretrained(scratch)
        if not folder.exists():
            scratch.rename(folder)
    return folder


Build = Callable[..., tuple[Config, dict[str, Artifact]]]


@pytest.fixture(scope="session")
def build(shared: Path) -> Build:
    """Run stages over a checkpoint; artefacts are shared by all tests of this run."""

    def run(checkpoint: Path, stage: str, overrides: Sequence[str] = ()) -> tuple[Config, dict[str, Artifact]]:
        config = compose(
            [
                "model=auto",
                f"model.checkpoint={checkpoint}",
                f"artifacts={shared / 'artifacts'}",
                "runtime=cpu",
                f"stage={stage}",
                "verify.unique_tokens=true",
                *overrides,
            ]
        )
        _, artifacts = execute(config)
        return config, artifacts

    return run
