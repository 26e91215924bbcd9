"""Models with static caches beside an encoder and without one, as servers open them; servers over models."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from transformers import GenerationConfig, T5Config

from accel import testing
from accel.models.generation import AcceleratedModel
from accel.models.loading import load
from accel.serve.requests.served_model import ServedModel, open_served, scheduler_limits
from accel.serve.scheduling.opening import open_scheduler
from tests.conftest import Build
from tests.families import FAMILIES
from tests.serve.servers import LIMITS, Played, PlayedScheduler, Running, byte_tokenizer, running


@pytest.fixture(scope="module")
def t5(build: Build, tiny: Path) -> Iterator[AcceleratedModel]:
    folder = build(tiny, "verify", ("runtime.static=true",))[1]["verify"].folder
    with load(folder, "cpu", static=True, buckets=[8, 16, 32]) as opened:
        yield opened


@pytest.fixture(scope="module")
def causal(gpt2: testing.Subject) -> AcceleratedModel:
    assert gpt2.static is not None
    return gpt2.static


@pytest.fixture(scope="module", params=["t5", "causal"])
def model(request: pytest.FixtureRequest) -> AcceleratedModel:
    opened: AcceleratedModel = request.getfixturevalue(request.param)
    return opened


@pytest.fixture(scope="session")
def llama_folder(build: Build, shared: Path) -> Path:
    """Tiny Llama with random weights and a byte-level tokenizer with a chat template."""
    folder = shared / "serve-llama"
    with FileLock(shared / "serve-llama.lock"):
        if not (folder / "config.json").exists():
            byte_tokenizer().save_pretrained(folder)
            testing.random_model(FAMILIES["llama"] | {"vocab_size": 259}).save_pretrained(folder)
        return build(folder, "merge", ["runtime.static=true"])[1]["merge"].folder


@pytest.fixture(scope="session")
def real(llama_folder: Path, g2p_folder: Path) -> Iterator[Running]:
    """Server over the tiny Llama and the embedded T5."""
    scheduler = partial(open_scheduler, limits=scheduler_limits(LIMITS))
    folders = {"llama": llama_folder, "g2p": g2p_folder}
    with running([open_served(name, folder, None, scheduler) for name, folder in folders.items()]) as server:
        yield server


@pytest.fixture
def play() -> Iterator[Callable[..., Any]]:
    """Function that starts a server over a `PlayedScheduler`, and returns both."""
    opened: list[Any] = []

    def start(api_key: str | None = None, tokenizer: Any = None, **limits: Any) -> tuple[Running, PlayedScheduler]:
        scheduler = PlayedScheduler()
        config = T5Config(vocab_size=259)
        model: Any = Played(config=config, generation_config=GenerationConfig(eos_token_id=2))
        served = ServedModel("played", model, scheduler, tokenizer or byte_tokenizer())
        context = running([served], replace(LIMITS, **limits), api_key)
        opened.append(context)
        return context.__enter__(), scheduler

    yield start
    for context in opened:
        context.__exit__(None, None, None)
