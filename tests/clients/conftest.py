"""The clients, installed in folders of their own, and the models that they load."""

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

HERE = Path(__file__).parent
# Without dependencies: torch, ONNX Runtime and the rest are those of this environment.
OPTIMUM = ("optimum-onnx==0.1.0", "optimum==2.1.0", "transformers==4.57.6", "huggingface-hub==0.36.2")
OPTIMUM += ("tokenizers==0.22.2", "requests", "urllib3", "idna", "charset-normalizer", "certifi")
TRANSFORMERS_JS = "@huggingface/transformers@4.3.1"

Client = Callable[..., dict[str, dict[str, Any]]]
"""(deployable's folder, cases, further arguments) -> case -> `inputs` and `tokens`, lists of ids."""


def run(command: list[Any], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in `folder` and return its result."""
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, **environment})


def client(command: list[Any], folder: Path) -> Client:
    """Return a client that is called as `command`."""

    def generate(deployable: Path, cases: Mapping[str, Any], *arguments: str) -> dict[str, dict[str, Any]]:
        path = folder / f"cases-{os.getpid()}.json"
        path.write_text(json.dumps(cases))
        done = run([*command, deployable, path, *arguments], folder)
        assert done.returncode == 0, done.stderr[-3000:]
        results: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
        return results

    return generate


@pytest.fixture(scope="session")
def optimum(shared: Path) -> Client:
    """Optimum, with an older transformers than ours."""
    folder = shared / "clients" / "optimum"
    python = folder / "bin" / "python"
    with FileLock(shared / "optimum.lock"):
        if not (folder / "installed").is_file():
            venv.create(folder, with_pip=True, clear=True)
            done = run([python, "-m", "pip", "install", "--no-deps", *OPTIMUM], folder)
            if done.returncode:
                pytest.skip(f"pip can't install {OPTIMUM[0]}: {done.stderr.strip()[-300:]}")
            (site,) = folder.glob("lib/python*/site-packages")
            packages = [path for path in sys.path if path.endswith("site-packages")]
            (site / "zz_host.pth").write_text("\n".join(packages))  # after the folder's own packages
            (folder / "installed").touch()
    return client([python, HERE / "optimum_client.py"], folder)


@pytest.fixture(scope="session")
def transformers_js(shared: Path) -> Client:
    """Transformers.js in Node."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("Node or npm is not installed")
    folder = shared / "clients" / "node"
    with FileLock(shared / "node.lock"):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "installed").is_file():
            (folder / "package.json").write_text("{}")
            done = run(["npm", "install", TRANSFORMERS_JS], folder, ONNXRUNTIME_NODE_INSTALL="skip")
            if done.returncode:
                pytest.skip(f"npm can't install {TRANSFORMERS_JS}: {done.stderr.strip()[-300:]}")
            (folder / "installed").touch()
    script = folder / "client.mjs"
    shutil.copyfile(HERE / "transformers_js_client.mjs", script)  # Node looks for packages beside the script
    return client(["node", script], folder)
