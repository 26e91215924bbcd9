"""A server whose models are in a process of their own, beside one that has the same models in its own process."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from accel.errors import AccelError
from accel.serve.remote.model_process import ModelProcess
from tests.serve.servers import LIMITS, Running, running

WORDS = ["speculative", "ice", "photosynthesis", "Ünïcödé"]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
BODIES: dict[str, dict[str, Any]] = {
    "greedy": {"no_repeat_ngram_size": 1},
    "sampled": {"temperature": 1.0, "seed": 5, "n": 3, "top_p": 0.9},
    "logprobs": {"logprobs": 2},
    "stop": {"stop": ["A", "e"], "temperature": 1.0, "seed": 1},
    "beams": {"num_beams": 3},
    "json": {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
}


@pytest.fixture(scope="module")
def remote(llama_folder: Path, g2p_folder: Path) -> Iterator[Running]:
    process = ModelProcess({"llama": str(llama_folder), "g2p": str(g2p_folder)}, None, LIMITS)
    pid = process.pid
    with running(process.models, process=process) as server:
        yield server
    assert pid is not None
    assert not psutil.pid_exists(pid)


def choices(server: Running, body: dict[str, Any]) -> list[Any]:
    """Return the choices of a reply, or the texts of a streamed one, and the numbers of tokens."""
    reply = server.post("/v1/completions", **body)
    assert reply.status_code == 200, reply.text
    return [reply.json()["choices"], reply.json()["usage"]]


@pytest.mark.parametrize("options", BODIES.values(), ids=BODIES.keys())
@pytest.mark.parametrize("name", ["llama", "g2p"])
def test_replies_are_those_of_one_process(name: str, options: dict[str, Any], real: Running, remote: Running) -> None:
    if name == "g2p" and "response_format" in options:
        pytest.skip("its tokens have no bytes")
    body = {"model": name, "prompt": WORDS, "max_tokens": 24, **options}
    expected = choices(real, body)
    assert len({choice["text"] for choice in expected[0]}) > 1
    assert choices(remote, body) == expected


def test_streamed(real: Running, remote: Running) -> None:
    body = {"model": "llama", "prompt": WORDS, "max_tokens": 40, "no_repeat_ngram_size": 1}
    texts = [""] * len(WORDS)
    for event in remote.openai.completions.create(
        model="llama", prompt=WORDS, max_tokens=40, stream=True, extra_body={"no_repeat_ngram_size": 1}
    ):
        for choice in event.choices:
            texts[choice.index] += choice.text
    assert texts == [choice["text"] for choice in choices(real, body)[0]]


@pytest.mark.parametrize("stream", [False, True])
def test_refused(stream: bool, remote: Running) -> None:
    """By the status, also of a reply that would be streamed."""
    reply = remote.post("/v1/completions", model="llama", prompt=[5] * 5000, max_tokens=8, stream=stream)
    assert reply.status_code == 413, reply.text


def test_no_deployable(tmp_path: Path) -> None:
    with pytest.raises(AccelError, match=str(tmp_path)):
        ModelProcess({"none": str(tmp_path)}, None, LIMITS)


def test_the_process_is_killed(g2p_folder: Path) -> None:
    """A request in progress gets an error, and the server ends with one."""
    process = ModelProcess({"g2p": str(g2p_folder)}, None, LIMITS)
    with running(process.models, process=process) as server:
        assert process.pid is not None
        body = {"model": "g2p", "prompt": "ice", "stream": True, "max_tokens": 400, "min_new_tokens": 400}
        with server.http.stream("POST", "/v1/completions", json=body) as reply:
            lines = reply.iter_lines()
            assert next(lines).startswith("data:")
            os.kill(process.pid, signal.SIGKILL)
            last = [line for line in lines if line][-1]
        assert '"error"' in last
        end = time.monotonic() + 20
        while not server.failures and time.monotonic() < end:
            time.sleep(0.02)
    assert [str(error) for error in server.failures] == ["the process that decodes has ended"]
