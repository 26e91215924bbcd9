"""A server with replicas, started as its users start it."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2
import openai
import psutil

START_S = 300  # on a machine that does other things as well
KEY = "sesame"


class NotStartedError(Exception):
    """The server ended before it was ready.

    Args:
        status: Its exit status.
        error: What it wrote to standard error.
    """

    def __init__(self, status: int, error: str) -> None:
        super().__init__(error)
        self.status, self.error = status, error


@dataclass(frozen=True)
class Started:
    """A server in a process of its own.

    Attributes:
        process: The process.
        folder: Folder with what it writes to standard output and standard error, `out` and `err`.
        lines: What it printed when it was ready.
        address: Scheme, host and port.
        http: A client with the key.
        api: OpenAI's own client, with the key and without retries.
    """

    process: subprocess.Popen[str]
    folder: Path
    lines: list[str]
    address: str
    http: httpx2.Client
    api: openai.OpenAI

    def children(self) -> list[psutil.Process]:
        """Return the processes that it started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def replicas(self) -> list[psutil.Process]:
        """Return the processes of the replicas."""
        return [child for child in self.children() if child.name().startswith("ray::ServeRepl")]

    def values(self, name: str) -> dict[str, float]:
        """Return the values of one metric, by its labels."""
        return values_of(self.http.get("/metrics").text, name)


def values_of(metrics: str, name: str) -> dict[str, float]:
    """Return the values of one metric, by its labels."""
    return {labels: float(value) for labels, value in re.findall(rf"^{name}{{(.*)}} (.*)$", metrics, re.MULTILINE)}


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@contextmanager
def started(folders: Mapping[str, Path], folder: Path, *overrides: str) -> Iterator[Started]:
    """Start a server, wait until it is ready, and end it.

    Args:
        folders: Name -> deployable.
        folder: Working directory.
        overrides: Further options.
    """
    models = ", ".join(f"{name}: '{path}'" for name, path in folders.items())
    options = [
        f"serve.models={{{models}}}",
        "serve.port=0",
        "serve.executor=ray",
        "serve.cpus_per_replica=1",
        *overrides,
    ]
    environment = os.environ | {"ACCEL_API_KEY": KEY, "PYTHONPATH": str(Path(__file__).parents[3])}
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "accel", "stage=serve", *options, *overrides],
            stdout=out,
            stderr=err,
            text=True,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
    try:
        wait_for(lambda: process.poll() is not None or "  try" in (folder / "out").read_text(), START_S)
        lines = (folder / "out").read_text().splitlines()
        found = re.search(r"http://127\.0\.0\.1:\d+", "".join(lines))
        if found is None:
            raise NotStartedError(process.wait(60), (folder / "err").read_text())
        headers = {"Authorization": f"Bearer {KEY}"}
        with (
            httpx2.Client(base_url=found[0], timeout=120, headers=headers) as http,
            openai.OpenAI(base_url=f"{found[0]}/v1", api_key=KEY, max_retries=0) as api,
        ):
            yield Started(process, folder, lines, found[0], http, api)
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            child.kill()
        process.kill()
        process.wait()
