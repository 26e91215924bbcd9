"""Models and artifacts that many tests share. Each is made once per run, for any number of workers."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from filelock import FileLock

from accel import progress, testing
from accel.cli.compose import compose, execute
from accel.config.schema import Config
from accel.pipeline.store import Artifact
from accel.runtime.providers import CUDA, available_providers
from tests.families import FAMILIES
from tests.random_t5 import random_t5

torch.set_num_threads(1)  # two workers share the machine

KEEP = "ACCEL_TEST_FOLDER"  # folder kept after the run, so that the next one reuses its exports


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run tests marked `gpu` one at a time, and skip them where torch or ONNX Runtime has no GPU."""
    missing = not torch.cuda.is_available() or CUDA not in available_providers()
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.xdist_group("gpu"))
            if missing:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device and onnxruntime-gpu"))


@pytest.fixture(autouse=True)
def without_console() -> Iterator[None]:
    """Undo what the command line installs when a test calls its `main`: the progress listener and the log handler."""
    log = logging.getLogger("accel")
    handlers, propagate, level = log.handlers, log.propagate, log.level
    yield
    progress.install(None)
    log.handlers, log.propagate = handlers, propagate
    log.setLevel(level)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that the workers of this run share."""
    if kept := os.environ.get(KEEP):
        Path(kept).mkdir(parents=True, exist_ok=True)
        return Path(kept)
    root = tmp_path_factory.getbasetemp()
    return root.parent if os.environ.get("PYTEST_XDIST_WORKER") else root


@pytest.fixture(scope="session", autouse=True)
def user_cache(shared: Path) -> None:
    """Let accel keep hashes below the run's folder, not in the user's own cache."""
    os.environ["XDG_CACHE_HOME"] = str(shared / "cache")  # set after the import of huggingface_hub, which reads it too


@pytest.fixture(scope="session")
def tiny(shared: Path) -> Path:
    """Checkpoint of a tiny T5 with random weights."""
    folder = shared / "tiny"
    with FileLock(shared / "tiny.lock"):
        if not (folder / "config.json").exists():
            random_t5().save_pretrained(folder)
    return folder


Build = Callable[..., tuple[Config, dict[str, Artifact]]]


def overrides_for(checkpoint: Path, artifacts: Path, *more: str) -> list[str]:
    """Return overrides for a run on `checkpoint`, on the CPU unless `more` sets another runtime.

    No token may be generated twice, because random weights repeat one.
    """
    runtime = [] if any(override.startswith("runtime=") for override in more) else ["runtime=cpu"]
    return [
        "model=auto",
        f"model.checkpoint={checkpoint}",
        f"artifacts={artifacts}",
        "verify.unique_tokens=true",
        "verify.latency=false",
        *runtime,
        *more,
    ]


@pytest.fixture(scope="session")
def artifacts(shared: Path) -> Path:
    """Artifact folder of this run."""
    return shared / "artifacts"


@pytest.fixture(scope="session")
def build(artifacts: Path) -> Build:
    """Function that runs stages on a checkpoint; all tests of this run share the artifacts."""

    def run(checkpoint: Path, stage: str, overrides: Sequence[str] = ()) -> tuple[Config, dict[str, Artifact]]:
        config = compose(overrides_for(checkpoint, artifacts, f"stage={stage}", *overrides))
        return config, execute(config)

    return run


@pytest.fixture(scope="session")
def g2p_folder(build: Build) -> Path:
    """Unverified bundle of the embedded T5, trained, with the graph for static caches."""
    overrides = ["model.checkpoint=accel://t5-g2p", "runtime.static=true"]  # the former replaces the tiny one's
    return build(Path("t5-g2p"), "merge", overrides)[1]["merge"].folder


@pytest.fixture(scope="session")
def deployable(build: Build, tiny: Path) -> Path:
    """Deployable of the tiny T5."""
    return build(tiny, "verify")[1]["verify"].folder


@pytest.fixture(scope="module")
def gpt2(shared: Path, artifacts: Path) -> Iterator[testing.Subject]:
    """Verified tiny GPT-2, the one of `test_families`."""
    folder = shared / "families" / "gpt2"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(shared / "gpt2.lock"), testing.prepare(FAMILIES["gpt2"], folder, artifacts=artifacts) as subject:
        yield subject
