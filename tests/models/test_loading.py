"""`accel.load` works in any thread and inside any application, and imports nothing that only `build` needs."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import accel
from accel.errors import AccelError
from accel.models import loading
from accel.models.loading import PLAIN_ATTENTION
from accel.reporting import delivery
from accel.runtime import dynamic_cache, layout
from accel.runtime.session import SessionSettings
from tests.conftest import Build, overrides_for

IDS = torch.tensor([[5, 9, 40, 17, 8]])
UNWANTED = (
    *("hydra", "onnxscript", "networkx", "matplotlib", "seaborn"),
    *("accel.stages", "accel.cli", "accel.pipeline", "accel.benchmark", "accel.reporting", "accel.graph"),
)


def tokens(folder: Path, **options: object) -> list[int]:
    """Load a deployable with `options`, and return the ids that it generates."""
    with accel.load(folder, runtime="cpu", **options) as model:
        ids: list[int] = model.generate(IDS, max_new_tokens=8, no_repeat_ngram_size=1)[0].tolist()
    return ids


def test_load_imports_no_build_packages(deployable: Path) -> None:
    """Neither Hydra nor packages for plots and graph rewriting, which take longer to import than a model to open."""
    code = f"""
import sys
before = set(sys.modules)
import accel
model = accel.load({str(deployable)!r}, runtime="cpu")
print(*sorted(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = done.stdout.split()
    assert "accel.models.loading" in imported
    unwanted = [
        name for name in imported if any(name == module or name.startswith(f"{module}.") for module in UNWANTED)
    ]
    assert unwanted == []


def test_inside_a_hydra_application(deployable: Path, tiny: Path, artifacts: Path, tmp_path: Path) -> None:
    """Loading and building work there, and the library's messages go to the application's log."""
    (tmp_path / "config.yaml").write_text("folder: null\n")
    build = [str(tiny), overrides_for(tiny, artifacts)[2:]]
    (tmp_path / "application.py").write_text(
        "import accel, hydra, torch\n"
        "@hydra.main(config_path='.', config_name='config', version_base='1.3')\n"
        "def main(config):\n"
        f"    assert str(accel.build(*{build}).folder) == config.folder\n"
        "    with accel.load(config.folder, runtime='cpu', threads=1) as model:\n"
        f"        ids = torch.tensor({IDS.tolist()})\n"
        "        print(model.generate(ids, max_new_tokens=8, no_repeat_ngram_size=1).tolist())\n"
        "main()\n"
    )
    command = [sys.executable, tmp_path / "application.py", f"folder={deployable}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *logged, printed = done.stdout.splitlines()
    assert json.loads(printed) == [tokens(deployable)]
    assert any("decoding in accel" in line for line in logged)  # by the host's own configuration of logging


def test_in_threads(deployable: Path) -> None:
    """Four threads load at the same time, with different options."""
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda threads: tokens(deployable, threads=threads), (1, 2, 1, 2)))
    assert found == [tokens(deployable)] * 4


def test_buckets_of_the_build_are_the_default(build: Build, tiny: Path) -> None:
    """`load` uses the buckets that the deployable was built with, unless an option replaces them."""
    folder = build(tiny, "verify", ["runtime.buckets=[24,48]", "runtime.static=true"])[1]["verify"].folder
    with accel.load(folder, runtime="cpu") as model:
        assert model.runtime.buckets.lengths == [24, 48]
    with accel.load(folder) as model:
        assert model.runtime.buckets.lengths == [24, 48]
    with accel.load(folder, runtime="cpu", buckets=[32]) as model:
        assert model.runtime.buckets.lengths == [32]


def test_scores_are_stored_of_chunks_alone(deployable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where prompts are computed at once, the kernel that stores no scores runs."""
    settings = []
    open_session = dynamic_cache.open_session

    def noting(path: Path, given: SessionSettings, *rest: Any) -> Any:
        settings.append(given)
        return open_session(path, given, *rest)

    monkeypatch.setattr(dynamic_cache, "open_session", noting)
    for options in ({}, {"prefill_chunk": 0}):
        accel.load(deployable, "cpu", **options).close()
    monkeypatch.setattr(loading, "angles_depend_on_length", lambda config: True)
    accel.load(deployable, "cpu").close()
    chunked, *at_once = (PLAIN_ATTENTION in given.environment for given in settings[1::2])
    assert chunked
    assert at_once == [False, False]


def test_unknown_option(deployable: Path) -> None:
    with pytest.raises(
        AccelError, match=r"unknown option of accel\.load\(runtime='cpu'\): 'thread'. Did you mean threads"
    ):
        accel.load(deployable, runtime="cpu", thread=1)
    with pytest.raises(AccelError, match="unknown runtime: 'gpu'"):
        accel.load(deployable, runtime="gpu")


def test_folder_without_a_manifest(deployable: Path, tmp_path: Path) -> None:
    """A folder without a manifest is opened with the preset's own values, if its files needn't be checked."""
    for path in deployable.iterdir():
        if path.name != layout.MANIFEST:
            (tmp_path / path.name).symlink_to(path)
    assert tokens(tmp_path, check=False) == tokens(deployable)


def test_a_folder_of_the_old_layout(deployable: Path, tmp_path: Path) -> None:
    """Is refused with the command that builds it again."""
    shutil.copytree(deployable, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / layout.GRAPHS).iterdir():
        path.rename(tmp_path / path.name)
    with pytest.raises(AccelError, match=r"python -m accel model\.checkpoint=CHECKPOINT precision=fp32 runtime=cpu"):
        accel.load(tmp_path)


def test_variants_side_by_side(deployable: Path, build: Build, tiny: Path, tmp_path: Path) -> None:
    """The widest dtype is the default, and a dtype that is missing is refused with those that are there."""
    half = build(tiny, "verify", ["precision=fp16", "verify.min_token_agreement=0"])[1]["verify"].folder
    with accel.load(half, runtime="cpu") as model:
        assert model.dtype is torch.float16
    for folder in (half, deployable):
        delivery.deliver(folder, tmp_path)
    for dtype, expected in ((None, torch.float32), ("float16", torch.float16), (torch.float32, torch.float32)):
        with accel.load(tmp_path, runtime="cpu", dtype=dtype) as model:
            assert model.dtype is expected
    with pytest.raises(AccelError, match=r"bfloat16.*float16, float32"):
        accel.load(tmp_path, runtime="cpu", dtype="bfloat16")
