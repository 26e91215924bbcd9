"""Thousands of calls of mixed shape leave memory, file descriptors and threads as they were."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import accel
from accel.models.generation import AcceleratedModel
from tests.conftest import Build

pytestmark = pytest.mark.soak

WARMUP = 200  # calls after which memory must not grow
CALLS, GPU_CALLS = 3000, 2000
GROWTH = 1.03
BUCKETS = [8, 16, 32, 64]
VOCABULARY = 100


def calls(count: int, lengths: tuple[int, ...]) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """Yield inputs and options: several batches, sources, lengths, beams and sampling."""
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        batch, source = 1 + number % 4, 2 + number % 23
        ids = torch.randint(2, VOCABULARY, (batch, source), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, source // 2 + 1 :] = 0
        options = {"max_new_tokens": lengths[number % len(lengths)], "min_new_tokens": lengths[number % len(lengths)]}
        mode = ({}, {"num_beams": 2}, {"do_sample": True, "top_k": 5}, {"num_beams": 3, "num_return_sequences": 2})
        yield {"input_ids": ids, "attention_mask": mask}, options | mode[number % 4]


def in_use() -> tuple[int, int, int]:
    """Return resident memory in bytes, open file descriptors and threads of this process."""
    process = psutil.Process()
    return process.memory_info().rss, process.num_fds(), threading.active_count() + process.num_threads()


def soak(model: AcceleratedModel, count: int, lengths: tuple[int, ...]) -> Iterator[int]:
    """Generate `count` times, and yield the number of each call after it."""
    for number, (inputs, options) in enumerate(calls(count, lengths)):
        model.generate(**{name: tensor.to(model.device) for name, tensor in inputs.items()}, **options)
        yield number + 1


def test_memory_stays_flat(deployable: Path) -> None:
    with accel.load(deployable, runtime="cpu", threads=1) as model:
        for done in soak(model, CALLS, (1, 3, 6, 9)):
            if done == WARMUP:
                memory, descriptors, threads = in_use()
    with accel.load(deployable, runtime="cpu", threads=1):
        at_end = in_use()
    print(f"soak: {memory / 1e6:.1f} MB after {WARMUP} calls, {at_end[0] / 1e6:.1f} MB after {CALLS}")
    assert at_end[0] <= GROWTH * memory
    assert at_end[1:] == (descriptors, threads)


@pytest.mark.gpu
def test_device_memory_stays_flat(build: Build, tiny: Path) -> None:
    """On CUDA, over static caches of all buckets: neither torch's memory nor the device's grows."""
    folder = build(tiny, "verify", ["runtime=cuda-graph", f"runtime.buckets={BUCKETS}", "precision=fp32"])[1]["verify"]
    with accel.load(folder.folder) as model:
        for done in soak(model, GPU_CALLS, tuple(bucket - 3 for bucket in BUCKETS)):
            if done == WARMUP:
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
        torch.cuda.synchronize()
        after = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    print(f"soak: torch {before[0]} and {after[0]} bytes, free {before[1]} and {after[1]} bytes")
    assert after[0] <= GROWTH * before[0]
    assert after[1] >= before[1] - 2**24
