"""Ctrl-C and SIGTERM, to the whole process group as from a terminal: one line, and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.conftest import overrides_for

ROOT = Path(__file__).parents[2]
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
RUN = "import sys; sys.argv = ['accel', *{arguments!r}]; from accel.__main__ import main; main()"
WORKER = """
import time
from accel.cli.interrupts import one_line_exit
with one_line_exit():
    from accel.benchmark.process import WorkerProcess
    with WorkerProcess("one") as one, WorkerProcess("two") as two:
        print("ready", flush=True)
        one.call(time.sleep, 60)
"""
WAITING = """
import signal, threading, time
from accel.cli.interrupts import one_line_exit
def receive():
    time.sleep(0.3)
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
    time.sleep(60)
with one_line_exit():
    threading.Thread(target=receive, daemon=True).start()
    threading.Event().wait()
"""
DROPPED = """
import signal, time
from accel.cli.interrupts import one_line_exit
class Slow:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)
with one_line_exit():
    Slow()
    time.sleep(60)
"""
COMPOSING = """
import signal, sys
sys.argv = ["accel", "stage=plan"]
from hydra._internal.config_loader_impl import ConfigLoaderImpl
def load(*args, **kwargs):
    try:
        print("ready", flush=True)
        signal.raise_signal(signal.SIGINT)
    finally:
        raise AttributeError("as OmegaConf's cleanup may raise")
ConfigLoaderImpl.load_configuration = load
from accel.__main__ import main
main()
"""
BUSY = """
import hashlib, threading
from accel.cli.interrupts import one_line_exit
with one_line_exit():
    threading.Timer(0.3, print, ["ready"], {"flush": True}).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


def start(code: str) -> subprocess.Popen[str]:
    """Run code in a new process group."""
    pipe = subprocess.PIPE
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True, env=environment, process_group=0
    )


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def group(pid: int) -> list[psutil.Process]:
    """Return the processes of a group that haven't ended."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):  # it ended meanwhile
            if process.status() != psutil.STATUS_ZOMBIE and os.getpgid(process.pid) == pid:
                found.append(process)
    return found


def assert_one_line(process: subprocess.Popen[str], signum: signal.Signals, lines: int | None = None) -> None:
    """Assert that the process ends with the signal's exit code and line, without any process of its group left.

    `lines`: of all that it prints to stderr.
    """
    _, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_CODES[signum], errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == f"interrupted by {signum.name}"
    assert lines is None or len(errors.splitlines()) == lines, errors
    wait_until(lambda: group(process.pid) == [], 10)


@pytest.mark.parametrize("signum", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_during_a_stage(tiny: Path, tmp_path: Path, signum: signal.Signals) -> None:
    """The temporary folder of the artifact is removed."""
    process = start(RUN.format(arguments=overrides_for(tiny, tmp_path, "stage=export")))
    wait_until(lambda: any(tmp_path.glob("*/*.tmp*")))
    os.killpg(process.pid, signum)
    assert_one_line(process, signum)
    assert [path for path in tmp_path.glob("*/*") if path.suffix != ".lock"] == []


def test_during_imports() -> None:
    """Ctrl-C is handled before torch is imported."""
    code = "import accel.__main__; print('ready', flush=True); accel.__main__.main()"
    process = start(code)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    assert_one_line(process, signal.SIGINT)


def test_during_composition() -> None:
    """An error of a library that a signal interrupted doesn't hide the signal."""
    process = start(COMPOSING)
    assert_one_line(process, signal.SIGINT, lines=1)


@pytest.mark.parametrize("send", [os.kill, os.killpg])
@pytest.mark.parametrize("signum", EXIT_CODES)
def test_with_worker_processes(signum: signal.Signals, send: Callable[[int, int], None]) -> None:
    """Worker processes end, and print nothing, whether the signal reaches them or not."""
    process = start(WORKER)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    send(process.pid, signum)
    assert_one_line(process, signum)


def test_while_worker_processes_start() -> None:
    """At any moment: a worker process that began to start ends as well, and prints nothing."""
    for step in range(8):
        process = start(WORKER.replace("with WorkerProcess", "print('starting', flush=True)\n    with WorkerProcess"))
        assert process.stdout is not None
        assert process.stdout.readline() == "starting\n"
        time.sleep(0.01 * step)
        os.kill(process.pid, signal.SIGTERM)
        assert_one_line(process, signal.SIGTERM, lines=1)


def test_worker_processes_end_with_a_killed_parent() -> None:
    process = start(WORKER)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.kill()
    wait_until(lambda: group(process.pid) == [], 10)


def test_while_waiting_for_a_lock() -> None:
    """A signal that another thread receives doesn't interrupt the main thread's wait by itself."""
    assert_one_line(start(WAITING), signal.SIGTERM)


def test_where_python_drops_exceptions() -> None:
    """A signal that arrives in a destructor isn't lost."""
    assert_one_line(start(DROPPED), signal.SIGTERM, lines=1)


def test_second_one_ends_at_once() -> None:
    """Also where the process computes outside Python, which doesn't handle the first one then."""
    process = start(BUSY)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=5)
    assert process.returncode == 130
