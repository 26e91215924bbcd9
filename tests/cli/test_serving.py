"""`stage=serve` on the command line: messages, start, requests and a graceful end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import httpx2
import pytest

from accel.cli import application, compose
from accel.pipeline import runner


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *overrides: str) -> str:
    """Run the command line, which must fail with 2 before anything is built, and return its message."""

    def refuse(*_: object) -> None:
        raise AssertionError("a stage runs")

    monkeypatch.setattr(runner.Pipeline, "run", refuse)
    monkeypatch.setattr(sys, "argv", ["accel", "stage=serve", "runtime=cpu", *overrides])
    with pytest.raises(SystemExit) as raised:
        application.main()
    assert raised.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["serve.models={a: nowhere}"], ("serve.models.a=nowhere", "no such folder")),
        (["serve.models={a: .}"], ("serve.models.a=.", "not a folder that accel made")),
        (["serve.models={a: .}", "model=t5-g2p"], ("model=t5-g2p", "leave out one")),
        (["serve.models={a: .}", "stage=[verify,serve]"], ("use stage=serve",)),
        (["serve.prot=1"], ("serve.prot", "serve.port")),
        (["serve.port=70000"], ("serve.port=70000", "65535")),
        (["serve.timeout_s=0"], ("serve.timeout_s",)),
        (["serve.api_key_variable=ACCEL_NO_SUCH_KEY"], ("ACCEL_NO_SUCH_KEY", "no such variable")),
        (["serve.host=256.1.1.1"], ("serve.host=256.1.1.1",)),
        (["serve.executor=foo"], ("serve.executor", "foo", "process", "ray")),
        (["serve.replicas=2"], ("serve.replicas=2", "serve.executor=ray")),
        (["serve.executor=ray", "serve.replicas=3", "serve.max_replicas=2"], ("serve.max_replicas=2", "replicas=3")),
        (["serve.executor=ray", "serve.replicas=999"], ("999 replicas", "CPUs=1", "serve.ray_address")),
        (["serve.executor=ray", "serve.ray_address='ray://x:1'"], ("serve.ray_address=ray://x:1", "HOST:PORT", "auto")),
        (["serve.executor=ray", "serve.ray_address='127.0.0.1:1'"], ("serve.ray_address=127.0.0.1:1", "no cluster")),
        (["serve.executor=ray", "serve.model_process=true"], ("serve.model_process=true", "serve.executor=ray")),
        (["serve.executor=ray", "serve.gpus_per_replica=99"], ("GPUs=99", "serve.gpus_per_replica")),
        (
            ["serve.executor=ray", "runtime=cpu", "runtime.device='cpu:0'"],
            ("runtime.device=cpu:0", "serve.executor=ray"),
        ),
    ],
)
def test_mistakes(
    overrides: list[str],
    parts: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Each has one message that names value and choices, before anything is built."""
    monkeypatch.chdir(tmp_path)
    message = run(capsys, monkeypatch, *overrides)
    for part in parts:
        assert part in message, message
    assert len(message.splitlines()) <= 3


@pytest.mark.parametrize(
    ("overrides", "static"),
    [
        (["stage=serve"], True),
        (["stage=[verify,serve]"], True),
        (["stage=export_triton"], True),
        (["stage=serve", "runtime.static=false"], False),
        (["stage=verify"], False),
    ],
)
def test_static_caches_for_a_running_batch(overrides: list[str], static: bool) -> None:
    """A model that is built to be served gets static caches, unless the command line says otherwise."""
    config = compose.compose(["runtime=cpu", *overrides])
    assert config.runtime.static is static
    assert config.convert.static_decode is static


def test_port_in_use(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = run(capsys, monkeypatch, f"serve.port={port}")
    assert f"serve.port={port}" in message
    assert "in use" in message
    assert "serve.port=0" in message


def test_ray_that_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The message has the command that installs it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    with mock.patch.dict(os.environ):
        message = run(capsys, monkeypatch, "serve.executor=ray")
    assert "serve.executor=ray needs the package ray: pip install 'accel-onnx[ray]'" in message


@pytest.fixture
def process(g2p_folder: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Server of the embedded T5 with an API key, as a process of its own."""
    command = [sys.executable, "-m", "accel", "stage=serve", f"serve.models={{g2p: '{g2p_folder}'}}", "serve.port=0"]
    environment = os.environ | {"ACCEL_API_KEY": "sesame", "PYTHONPATH": str(Path(__file__).parents[2])}
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
    )
    yield started
    started.kill()
    started.wait()


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_server_from_start_to_end(process: subprocess.Popen[str], signum: signal.Signals) -> None:
    """The startup message has a command that works, a signal ends the server with 0, and each request has a line."""
    assert process.stdout is not None
    assert process.stderr is not None
    lines = [process.stdout.readline() for _ in range(5)]
    address = re.search(r"serving on (http://127\.0\.0\.1:\d+) ", lines[0])
    assert address is not None, lines
    assert "g2p: text" in lines[1]
    assert "needed: the value of ACCEL_API_KEY" in lines[3]
    command = lines[4].partition("try")[2].strip()
    shown = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"ACCEL_API_KEY": "sesame"},
    )
    assert json.loads(shown.stdout)["choices"][0]["text"] == "F OW2 T OW0 S IH1 N TH AH0 S IH0 S"
    assert httpx2.get(f"{address[1]}/v1/models").status_code == 401
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out == ""
    *records, last = err.strip().splitlines()
    assert last == "stopped"
    entries = [json.loads(line) for line in records if line.startswith("{")]
    assert [(entry["route"], entry["status"]) for entry in entries] == [("/v1/completions", 200), ("other", 401)]
    assert "photosynthesis" not in err
