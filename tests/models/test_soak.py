"""Thousands of calls of mixed shape leave memory, file descriptors and threads as they were."""

import gc
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

WARMUP = 200  # calls after which memory must not grow; all shapes of a bucket occur in them
CALLS, GPU_CALLS = 3000, 2000
GROWTH = 1.03
BUCKETS = [8, 16, 32, 64]
VOCABULARY = 100
MODES: tuple[dict[str, Any], ...] = (
    {},
    {"num_beams": 2},
    {"do_sample": True, "top_k": 5},
    {"num_beams": 3, "num_return_sequences": 2},
)


def calls(count: int, lengths: tuple[int, ...]) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """Yield inputs and options: each of 4 batch sizes with each mode and each of 4 lengths, 23 source lengths."""
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        batch, source = 1 + number % 4, 2 + number % 23
        mode, length = MODES[number // 4 % 4], lengths[number // 16 % 4]
        ids = torch.randint(2, VOCABULARY, (batch, source), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, source // 2 + 1 :] = 0
        yield {"input_ids": ids, "attention_mask": mask}, {"max_new_tokens": length, "min_new_tokens": length} | mode


def in_use() -> tuple[int, int, int]:
    """Return resident memory in bytes, open file descriptors and threads of this process."""
    gc.collect()
    process = psutil.Process()
    return process.memory_info().rss, process.num_fds(), process.num_threads()


def soak(model: AcceleratedModel, count: int, lengths: tuple[int, ...]) -> Iterator[int]:
    """Generate `count` times, and yield the number of calls so far after each."""
    for number, (inputs, options) in enumerate(calls(count, lengths), 1):
        model.generate(**{name: tensor.to(model.device) for name, tensor in inputs.items()}, **options)
        yield number


def test_memory_stays_flat(deployable: Path) -> None:
    with accel.load(deployable, runtime="cpu", threads=1) as model:
        found = {done: in_use() for done in soak(model, CALLS, (1, 3, 6, 9)) if done in (WARMUP, CALLS)}
    (before, *handles), (after, *handles_after) = found[WARMUP], found[CALLS]
    print(
        f"soak: {before / 1e6:.1f} MB, {handles} file descriptors and threads after {WARMUP} calls; "
        f"{after / 1e6:.1f} MB, {handles_after} after {CALLS}"
    )
    assert after <= GROWTH * before
    assert handles == handles_after


@pytest.mark.gpu
def test_device_memory_stays_flat(build: Build, tiny: Path) -> None:
    """On CUDA, over static caches of all buckets: neither torch's memory nor the device's grows."""
    options = ["runtime=cuda-graph", f"runtime.buckets={BUCKETS}", "precision=fp32"]
    found: dict[int, tuple[int, int]] = {}
    with accel.load(build(tiny, "verify", options)[1]["verify"].folder) as model:
        for done in soak(model, GPU_CALLS, tuple(bucket - 3 for bucket in BUCKETS)):
            if done in (WARMUP, GPU_CALLS):
                torch.cuda.synchronize()
                gc.collect()
                found[done] = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    (allocated, free), (allocated_after, free_after) = found[WARMUP], found[GPU_CALLS]
    print(f"soak: torch {allocated} and {allocated_after} bytes, free {free} and {free_after} bytes")
    assert allocated_after <= GROWTH * allocated
    assert free_after >= free - 2**24  # the allocator takes blocks of 2 or 20 MB
