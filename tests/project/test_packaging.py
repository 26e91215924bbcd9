"""accel works as an editable install and from a wheel, in another directory, in new virtual environments."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DIST_INFO = {"LICENSE", "METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt"}
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]


def run(*command: object, folder: Path = ROOT) -> str:
    """Run a command, and return its output; fail with its error output."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def fresh(folder: Path) -> Path:
    """Make a virtual environment with this one's packages except accel, and return its Python."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    borrowed = folder / "borrowed"
    borrowed.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "accel" not in entry.name.lower().split("-")[0] and entry.suffix != ".pth":
            (borrowed / entry.name).symlink_to(entry)
    (site / "borrowed.pth").write_text(f"{borrowed}\n")
    return folder / "bin" / "python"


def install(python: Path, *requirements: object) -> None:
    """Install without dependencies and build isolation, so without any download."""
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", *requirements)


def source(folder: Path) -> Path:
    """Copy the files that git tracks or would track, so that a build writes nothing into the checkout."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard")
    for line in listed.splitlines():
        if (ROOT / line).is_file():
            target = folder / line
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / line).read_bytes())
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel made by `python -m build`."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, folder=checkout)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module", params=["wheel", "editable"])
def python(
    request: pytest.FixtureRequest, checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Python with accel installed, and the folder that accel must be imported from."""
    folder = tmp_path_factory.mktemp(request.param)
    executable = fresh(folder / "venv")
    if request.param == "wheel":
        install(executable, request.getfixturevalue("wheel"))
        return executable, folder
    install(executable, "-e", checkout)
    return executable, checkout


def test_wheel_contents(wheel: Path) -> None:
    """The wheel has configuration, adapters, the embedded model and `py.typed`, but no tests and no scripts."""
    files = set(zipfile.ZipFile(wheel).namelist())
    tracked = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "accel", "conf", "architectures")
    prefixes = {"accel/": "accel/", "conf/": "accel/conf/", "architectures/": "accel/architectures/"}
    expected = set()
    for line in tracked.splitlines():
        start = next(start for start in prefixes if line.startswith(start))
        expected.add(prefixes[start] + line.removeprefix(start))
    assert {"accel/conf/config.yaml", "accel/architectures/seq2seq.py", "accel/py.typed"} <= expected
    assert {entry for entry in files if entry.startswith("accel/")} == expected  # no artifacts, no leftovers of a run
    metadata = {entry for entry in files if not entry.startswith("accel/")}
    assert {entry.split("/")[0].rpartition(".")[2] for entry in metadata} == {"dist-info"}
    assert {entry.rpartition("/")[2] for entry in metadata} == DIST_INFO


def test_wheel_metadata(wheel: Path) -> None:
    """The metadata has name, licence, extras and the console script."""
    archive = zipfile.ZipFile(wheel)
    (metadata,) = [entry for entry in archive.namelist() if entry.endswith(".dist-info/METADATA")]
    text = archive.read(metadata).decode()
    for line in ("Name: accel", "License-Expression: Apache-2.0", "Requires-Python: >=3.11"):
        assert line in text
    for extra in ("cpu", "cuda13", "cuda12", "cuda11", "test"):
        assert f"Provides-Extra: {extra}" in text
    (scripts,) = [entry for entry in archive.namelist() if entry.endswith("entry_points.txt")]
    assert "accel = accel.__main__:main" in archive.read(scripts).decode()


def test_help_and_configuration(python: tuple[Path, Path], tmp_path: Path) -> None:
    """`--help` and `--cfg job` work as module and console script, in a folder that isn't the checkout."""
    executable, _ = python
    shown = run(executable, "-m", "accel", "--help", folder=tmp_path)
    assert "t5-large" in shown
    assert run(executable.parent / "accel", "--help", folder=tmp_path) == shown
    assert "flag: use_cache_branch" in run(executable, "-m", "accel", "--cfg", "job", folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_code_comes_from_the_installation(python: tuple[Path, Path], tiny: Path, tmp_path: Path) -> None:
    """Package, configuration and adapters are the installed ones, and a configuration composes with them."""
    executable, home = python
    code = (
        "import accel, accel.conf, accel.architectures.seq2seq as adapter\n"
        "from accel.adapters import registry\nfrom accel.cli.compose import compose\n"
        f"config = compose(['model=auto', 'model.checkpoint={tiny}', 'runtime=cpu'])\n"
        "built = registry.build(config.architecture)\n"
        "assert type(built) is adapter.Seq2Seq and config.precision.name == 'fp32'\n"
        "print(accel.__file__, accel.conf.__path__[0], adapter.__file__, sep='\\n')"
    )
    lines = run(executable, "-c", code, folder=tmp_path).splitlines()
    assert len(lines) == 3
    for line in lines:
        assert Path(line).resolve().is_relative_to(home.resolve())


def test_invalid_input_exits_with_two(python: tuple[Path, Path], tmp_path: Path) -> None:
    """An unknown model is refused with the choices, and nothing is written."""
    executable, _ = python
    done = subprocess.run([executable, "-m", "accel", "model=nothing"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "t5-large" in done.stderr
    assert list(tmp_path.iterdir()) == []
