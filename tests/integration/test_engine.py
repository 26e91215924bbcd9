"""Every family generates PyTorch's tokens by the fused engine, by every way of decoding."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

import accel
from accel import testing
from accel.config.engines import FUSED
from accel.runtime.cuda_graph import CudaGraphCallable
from accel.testing.subject import BUCKETS
from tests.families import FAMILIES
from tests.integration.test_cuda import KINDS

FAST = {"gpt2", "whisper"}  # exported in the fast tier anyway
OTHER = {"verified", "weights_once", "mostly_fp16"}  # of artifacts, in which no engine takes part
CHECKS = [check for check in testing.CHECKS if testing.name(check) not in OTHER]
MORE = ("umt5", "mistral", "gemma2", "falcon-alibi")  # biases by distance, windows, soft-capping, ALiBi
ALL_CHECKS = ("t5", *KINDS, *MORE)
TOKENS = {"greedy", "padding", "beams", "rows_alone"}
NOT_CAPTURED = {"mixtral"}  # its experts' inputs have shapes that depend on data


@contextmanager
def fused(name: str, shared: Path, artifacts: Path, runtime: str) -> Iterator[testing.Subject]:
    """Open the tiny model of one family with static caches and the fused engine in place of all others."""
    folder = shared / "families" / name
    folder.mkdir(parents=True, exist_ok=True)
    with (
        FileLock(shared / f"{name}.lock"),
        testing.prepare(FAMILIES[name], folder, artifacts=artifacts, runtime=runtime) as subject,
        accel.load(
            subject.artifacts["verify"].folder, runtime, static=True, capture=True, buckets=BUCKETS, engine=FUSED
        ) as model,
    ):
        assert model.runtime.engine == FUSED
        yield replace(subject, model=model, static=model)


@pytest.fixture(scope="module")
def subject(request: pytest.FixtureRequest, shared: Path, artifacts: Path) -> Iterator[testing.Subject]:
    """One family on the CPU."""
    with fused(request.param, shared, artifacts, "cpu") as subject:
        yield subject


@pytest.fixture(scope="module")
def captured(request: pytest.FixtureRequest, shared: Path, artifacts: Path) -> Iterator[testing.Subject]:
    """One family on a GPU, its decode steps captured as CUDA graphs."""
    with fused(request.param, shared, artifacts, "cuda") as subject:
        yield subject


def family(name: str) -> Any:
    """Return the parameter of one family: its checks run in one worker, and only those of `FAST` in the fast tier."""
    marks = [pytest.mark.xdist_group(name)]
    return pytest.param(name, marks=marks if name in FAST else [*marks, pytest.mark.slow])


@pytest.mark.parametrize("check", CHECKS, ids=testing.name)
@pytest.mark.parametrize("subject", [family(name) for name in ALL_CHECKS], indirect=True, scope="module")
def test_conformance(check: testing.Check, subject: testing.Subject) -> None:
    check(subject)


@pytest.mark.parametrize("check", [check for check in CHECKS if testing.name(check) in TOKENS], ids=testing.name)
@pytest.mark.parametrize(
    "subject", [family(name) for name in FAMILIES if name not in ALL_CHECKS], indirect=True, scope="module"
)
def test_tokens(check: testing.Check, subject: testing.Subject) -> None:
    """Of the other families, which differ from those in what the engine computes and not in how it is called."""
    check(subject)


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS, ids=testing.name)
@pytest.mark.parametrize("captured", ALL_CHECKS, indirect=True, scope="module")
def test_conformance_on_the_gpu(check: testing.Check, captured: testing.Subject) -> None:
    check(captured)


@pytest.mark.gpu
@pytest.mark.parametrize("captured", ALL_CHECKS, indirect=True, scope="module")
def test_steps_are_captured(captured: testing.Subject, request: pytest.FixtureRequest) -> None:
    """Buffers are captured by their second step, replayed after that, and used again by a second generation."""
    inputs = captured.inputs(2)
    first = captured.assert_same_tokens(**inputs)
    runtime: Any = captured.model.runtime
    (_, buffers) = runtime.spare_buffers[-1]
    assert torch.equal(captured.assert_same_tokens(**inputs), first)
    assert buffers in [kept for _, kept in runtime.spare_buffers]
    if request.node.callspec.params["captured"] in NOT_CAPTURED:
        assert not isinstance(buffers.run_decode, CudaGraphCallable)
    else:
        assert buffers.run_decode.captured
