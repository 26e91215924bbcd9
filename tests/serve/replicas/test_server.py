"""A server with two replicas: replies, figures, a replica that is killed, and the end, in this order, of one server."""

import json
import os
import re
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil
import pytest
from transformers import AutoTokenizer

from accel.models.loading import load
from tests.serve.replicas.command_line import KEY, NotStartedError, Started, started, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("replicas")]

RECOVERY_S = 90
WORDS = ["ice", "speculative", "photosynthesis", "Ünïcödé", "unquestionably"]
GREEDY = {"temperature": 0, "max_tokens": 24}
VARIED = {"no_repeat_ngram_size": 1}  # random weights repeat a token otherwise


@pytest.fixture(scope="module")
def folders(llama_folder: Path, g2p_folder: Path) -> dict[str, Path]:
    return {"llama": llama_folder, "g2p": g2p_folder}


@pytest.fixture(scope="module")
def server(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    limits = ["serve.max_waiting=8", "serve.max_rows=4", "serve.max_prompt_tokens=100"]
    with started(folders, tmp_path_factory.mktemp("replicas"), "serve.replicas=2", *limits) as opened:
        yield opened


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[tuple[str, str], str]:
    """Model and word -> text of `generate`, called for this word alone."""
    texts = {}
    for name, folder in folders.items():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        with load(folder, "cpu") as model:
            for word in WORDS:
                inputs = tokenizer([word], return_tensors="pt")
                inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
                ids = model.generate(**inputs, do_sample=False, max_new_tokens=24, **VARIED)
                start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
                texts[name, word] = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    assert len(set(texts.values())) == len(texts)
    return texts


def test_what_the_user_sees(server: Started) -> None:
    """The message of the plain server, with a line about the replicas; all of it listens on 127.0.0.1 only."""
    assert [line.split()[0] for line in server.lines] == ["serving", "model", "model", "replicas", "page", "API", "try"]
    assert "replicas 2, by Ray on this machine" in server.lines[3]
    processes = [psutil.Process(server.process.pid), *server.children()]
    listening = [one for process in processes for one in process.net_connections() if one.status == "LISTEN"]
    assert len(listening) > 2
    assert {one.laddr.ip for one in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert len(server.replicas()) == 2
    for path, status in (("/ready", 200), ("/health", 200), ("/", 200), ("/v1/models", 401), ("/metrics", 401)):
        assert httpx2.get(f"{server.address}{path}").status_code == status
    assert [model.id for model in server.api.models.list()] == ["llama", "g2p"]
    created = {model.created for _ in range(8) for model in server.api.models.list()}
    assert len(created) == 1


@pytest.mark.parametrize("name", ["llama", "g2p"])
def test_replies_are_those_of_generate(name: str, server: Started, expected: dict[tuple[str, str], str]) -> None:
    """As a whole and streamed, several at once, so that both replicas compute some."""
    before = server.values("accel_generated_tokens_total")

    def ask(word: str, stream: bool) -> str:
        options: dict[str, Any] = {"model": name, "prompt": word, "extra_body": VARIED, **GREEDY}
        reply = server.api.completions.create(**options, stream=stream)
        return "".join(event.choices[0].text for event in (reply if stream else [reply]))

    with ThreadPoolExecutor(8) as threads:
        jobs = [(word, stream) for word in WORDS for stream in (False, True)] * 2
        texts = list(threads.map(lambda job: ask(*job), jobs))
    assert texts == [expected[name, word] for word, _ in jobs]
    after = server.values("accel_generated_tokens_total")
    assert len(after) == 4  # two models in two replicas
    assert sum(after[labels] > before[labels] for labels in after if f'model="{name}"' in labels) == 2


def test_seeds(server: Started) -> None:
    """A seed gives the same text in every replica; `n` counts seeds up."""
    options: dict[str, Any] = {"model": "llama", "prompt": "ice", "temperature": 2.0, "max_tokens": 12}
    together = [choice.text for choice in server.api.completions.create(**options, n=3, seed=5).choices]
    assert len(set(together)) == 3
    with ThreadPoolExecutor(6) as threads:
        seeds = [5 + index % 3 for index in range(12)]
        alone = list(
            threads.map(lambda seed: server.api.completions.create(**options, seed=seed).choices[0].text, seeds)
        )
    assert alone == [together[seed - 5] for seed in seeds]


def test_mistakes_and_limits(server: Started) -> None:
    """The plain server's messages, from the replicas."""
    with pytest.raises(openai.NotFoundError, match="Did you mean llama"):
        server.api.completions.create(model="lama", prompt="a")
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        server.api.completions.create(model="llama", prompt="a", max_tokens=-1)
    with pytest.raises(openai.APIStatusError, match="100 tokens") as raised:
        server.api.completions.create(model="llama", prompt="a" * 200)
    assert raised.value.status_code == 413
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        server.api.chat.completions.create(model="g2p", messages=[{"role": "user", "content": "x"}])
    long: dict[str, Any] = {"model": "llama", "prompt": "ice", "n": 8, "min_new_tokens": 1000, "max_tokens": 1000}
    with ThreadPoolExecutor(5) as threads:  # 40 sequences, for 2 x 4 rows and 2 x 8 places in queues
        replies = list(threads.map(lambda _: server.http.post("/v1/completions", json=long), range(5)))
    assert 429 in {reply.status_code for reply in replies} <= {200, 429}
    assert {reply.json()["error"]["code"] for reply in replies if reply.status_code == 429} == {"queue_full"}


def test_a_client_that_vanishes(server: Started) -> None:
    """Its request leaves the batch of its replica, long before its end."""

    def running() -> float:
        return sum(server.values("accel_requests_running").values())

    wait_for(lambda: running() == 0, 60)
    before = sum(server.values("accel_generated_tokens_total").values())
    body = {"model": "llama", "prompt": "ice", "stream": True, "min_new_tokens": 2000, "max_tokens": 2000, "n": 4}
    content = json.dumps(body)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json"
    port = int(server.address.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(f"{head}\r\nContent-Length: {len(content)}\r\n\r\n{content}".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        wait_for(lambda: running() > 0, 20)
    wait_for(lambda: running() == 0, 60)
    assert sum(server.values("accel_generated_tokens_total").values()) - before < 4 * 2000


def test_a_killed_replica(server: Started, expected: dict[tuple[str, str], str]) -> None:
    """Under load: what it computed gets a clear error, all else is right, and another takes its place."""
    over, right, errors = threading.Event(), [], []

    def client(number: int) -> None:
        stream = bool(number % 2)
        while not over.is_set():
            word = WORDS[(len(right) + number) % len(WORDS)]
            options: dict[str, Any] = {"model": "g2p", "prompt": word, "extra_body": VARIED, **GREEDY}
            try:
                reply = server.api.completions.create(**options, stream=stream)
                text = "".join(event.choices[0].text for event in (reply if stream else [reply]))
            except openai.APIError as error:
                errors.append(error.code)
            else:
                right.append(text == expected["g2p", word])

    first, second = server.replicas()
    with ThreadPoolExecutor(6) as threads:
        clients = [threads.submit(client, number) for number in range(6)]
        try:
            wait_for(lambda: len(right) > 20, 60)
            first.kill()
            count = len(right)
            wait_for(lambda: len(right) > count + 20, 60)
            assert server.http.get("/health").status_code == 200
            assert server.http.get("/ready").status_code == 200
            wait_for(lambda: len(server.values("accel_requests_running")) == 4, RECOVERY_S)
        finally:
            over.set()
        for one in clients:
            one.result()
    assert all(right)
    assert set(errors) <= {"replica_lost"}
    assert len(errors) <= 6
    assert {second.pid} < {replica.pid for replica in server.replicas()}
    assert server.values("accel_http_requests_total")


def test_the_end(server: Started) -> None:
    """Ctrl-C in a terminal goes to all processes: a stream in progress goes on to its end, and nothing is left."""
    children = server.children()
    commands = " ".join(argument for child in children for argument in child.cmdline())
    temporary = [Path(folder) for folder in re.findall(r"/[^ =]*accel-ray-\w+", commands)]
    assert temporary
    options: dict[str, Any] = {"model": "llama", "prompt": "ice", "stream": True, "max_tokens": 300}
    stream = server.api.completions.create(**options, extra_body={"min_new_tokens": 300})
    next(stream)
    os.killpg(server.process.pid, signal.SIGINT)
    *_, last = stream
    assert last.choices[0].finish_reason == "length"
    assert server.process.wait(60) == 0
    _, alive = psutil.wait_procs(children, 10)
    assert not alive
    assert not any(folder.exists() for folder in temporary)
    *records, stopped = (server.folder / "err").read_text().strip().splitlines()
    assert stopped == "stopped"
    assert not [line for line in records if re.search("Traceback|INFO|WARNING", line)]
    entries = [json.loads(line) for line in records if line.startswith("{")]
    whole = [{"stop"}, {"length"}]  # a stream that lost its replica has no reason to end, one without a client another
    done = [entry for entry in entries if entry["status"] == 200 and set(entry.get("finish_reasons", [])) in whole]
    assert done
    assert all(entry["model"] in ("llama", "g2p") and entry["completion_tokens"] for entry in done)
    assert "photosynthesis" not in "".join(records)


def test_a_replica_that_cannot_start(folders: dict[str, Path], tmp_path: Path) -> None:
    """The server ends with one line, the reason that the replica has."""
    damaged = tmp_path / "damaged"
    shutil.copytree(folders["g2p"], damaged)
    (damaged / "onnx" / "encoder_model.onnx").write_bytes(b"broken")
    with pytest.raises(NotStartedError) as raised, started({"g2p": damaged}, tmp_path):
        pass
    assert raised.value.status == 2
    first, *others, message = raised.value.error.splitlines()
    assert first == "starting 1 replica …"
    assert all("is over 95% full" in line for line in others)  # Ray's word on the disk of this machine
    assert "the replicas can't be started" in message
    assert "encoder_model.onnx has 6 bytes" in message


def test_autoscaling(folders: dict[str, Path], tmp_path: Path) -> None:
    """More requests than one replica should have start a second one, which ends when they are over."""
    scaling = ["serve.max_replicas=2", "serve.target_ongoing_requests=1", "serve.upscale_delay_s=0.1"]
    with started({"llama": folders["llama"]}, tmp_path, *scaling, "serve.downscale_delay_s=0.1") as server:
        assert "replicas 1 to 2, by Ray" in server.lines[2]
        assert len(server.values("accel_batch_rows")) == 1
        over = threading.Event()

        def client() -> None:
            while not over.is_set():
                server.api.completions.create(
                    model="llama", prompt="ice", max_tokens=500, extra_body={"min_new_tokens": 500}
                )

        with ThreadPoolExecutor(6) as threads:
            clients = [threads.submit(client) for _ in range(6)]
            try:
                wait_for(lambda: len(server.values("accel_batch_rows")) == 2, 2 * RECOVERY_S)
            finally:
                over.set()
            for one in clients:
                one.result()  # no request is lost, whichever replica had it
        wait_for(lambda: len(server.values("accel_batch_rows")) == 1, 2 * RECOVERY_S)
        assert server.http.get("/ready").status_code == 200
