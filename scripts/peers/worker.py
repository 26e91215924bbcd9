"""Process that generates with one library on request: JSON by lines on standard input and output.

    python -m scripts.peers.worker THREADS

The first line is a `Request` for `libraries`; each further one an object with `ids`, `beams` and `new_tokens`. Every
line is answered by one: `seconds` and `tokens`, or `error` with a reason in one line. `Worker` is the other end.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from scripts.peers.libraries import OPENERS, Ids, NotOfferedError, Request, last_line, limit_threads

REPOSITORY = Path(__file__).resolve().parents[2]


class WorkerError(Exception):
    """A worker's reason, in one line, why it can't generate."""


class Worker:
    """Context with a process for one library.

    Args:
        python: The interpreter of the library's environment.
        threads: Threads that compute.
    """

    def __init__(self, python: Path, threads: int) -> None:
        command = [str(python), "-m", "scripts.peers.worker", str(threads)]
        # S603: a fixed command; standard error is discarded, as reasons come back as answers
        self._process = subprocess.Popen(  # noqa: S603
            command,
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def open(self, request: Request) -> None:
        """Open a model. Raise `WorkerError` if that fails."""
        self._ask({name: str(value) if isinstance(value, Path) else value for name, value in vars(request).items()})

    def generate(self, ids: Ids, beams: int, new_tokens: int) -> tuple[float, Ids]:
        """Return the seconds of one generation, and its new tokens. Raise `WorkerError` if that fails."""
        answer = self._ask({"ids": ids, "beams": beams, "new_tokens": new_tokens})
        return answer["seconds"], answer["tokens"]

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to one line."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise TypeError("the worker's pipes are closed")
        try:
            stdin.write(json.dumps(question) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"its process ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()


# Everything below runs in the worker process.


def parse_request(values: dict[str, Any]) -> Request:
    """Return the request that `Worker.open` wrote."""
    paths = {name: values[name] and Path(values[name]) for name in ("checkpoint", "deployable", "converted")}
    return Request(**values | paths)


def serve() -> None:
    """Answer the lines of standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print doesn't mix with the answers
    generate = None
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if generate is None:
                request = parse_request(question)
                generate = OPENERS[request.library](request)
                answer: dict[str, Any] = {}
            else:
                start = time.perf_counter()
                tokens = generate(question["ids"], question["beams"], question["new_tokens"])
                answer = {"seconds": time.perf_counter() - start, "tokens": tokens}
        except NotOfferedError as reason:
            answer = {"error": str(reason)}
        except Exception as error:  # of any library: the table shows it
            answer = {"error": f"{type(error).__name__}: {last_line(str(error))}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    limit_threads(int(sys.argv[1]))
    serve()
