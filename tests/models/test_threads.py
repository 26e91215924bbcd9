"""Concurrent calls leave the number of threads of torch's operators as it was."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import accel

NUMBER = 3  # the tests' own number is 1, which is also the limit within a call
WORKERS, CALLS = 4, 48


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(NUMBER)
    yield
    torch.set_num_threads(before)


def in_new_thread() -> int:
    """Return the number that a thread finds which starts now."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_threads_of_new_threads(deployable: Path, three_threads: None) -> None:
    """Also while the calls are under way, and after calls that failed."""
    modes: tuple[dict[str, Any], ...] = ({}, {"num_beams": 2}, {"do_sample": True}, {"max_new_tokens": -1})
    during: list[int] = []

    def call(number: int) -> int:
        ids = torch.randint(2, 100, (1 + number % 3, 2 + number % 7))
        with suppress(ValueError):
            model.generate(ids, **{"max_new_tokens": 1 + number % 5} | modes[number % 4])
        return torch.get_num_threads()

    assert in_new_thread() == NUMBER
    with accel.load(deployable, runtime="cpu", threads=1) as model, ThreadPoolExecutor(WORKERS) as pool:
        results = [pool.submit(call, number) for number in range(CALLS)]
        while not all(result.done() for result in results):
            during.append(in_new_thread())
        after = [result.result() for result in results]
    assert set(during) | {in_new_thread(), torch.get_num_threads()} | set(after) == {NUMBER}
