"""Published trained weights, from folders that two environment variables name; skipped without them.

`ACCEL_TEST_LLAMA`: SmolLM2-135M-Instruct, or another small Llama with a chat template. `ACCEL_TEST_WHISPER`:
whisper-tiny.en, or another small Whisper.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSpeechSeq2Seq, AutoProcessor, StaticCache

from accel.adapters import registry
from accel.data import audio, texts
from accel.data.corpus import sample_lines
from accel.models.generation import AcceleratedModel
from accel.models.loading import load, verification_of
from accel.pipeline.runner import Pipeline
from accel.pipeline.store import Artifact
from accel.stages import verify
from tests.conftest import Build
from tests.stages.test_faults import FAULTS, Case, assert_fault_is_found

LLAMA, WHISPER = "ACCEL_TEST_LLAMA", "ACCEL_TEST_WHISPER"
TRAINED = ("verify.unique_tokens=false",)

pytestmark = [pytest.mark.weights, pytest.mark.slow, pytest.mark.xdist_group("trained")]


def folder(variable: str) -> Path:
    """Return the folder that an environment variable names; skip the test without one."""
    path = Path(os.environ.get(variable, ""))
    if not (path / "config.json").is_file():
        pytest.skip(f"{variable} names no folder with a model")
    return path


@pytest.fixture(scope="module")
def llama(build: Build) -> Case:
    config, _ = build(folder(LLAMA), "verify", TRAINED)
    pipeline = Pipeline(config, registry.build(config.architecture))
    return Case(config, {name: pipeline.artifact(name) for name in (*verify.input_stages(config), "verify")})


@pytest.fixture(scope="module")
def models(llama: Case) -> Iterator[tuple[Any, AcceleratedModel]]:
    """PyTorch's model and accel's."""
    eager = AutoModelForCausalLM.from_pretrained(folder(LLAMA), dtype=torch.float32, attn_implementation="eager")
    with load(llama.inputs["verify"].folder, runtime="cpu") as ours:
        yield eager.eval(), ours


def test_trained_llama_passes(llama: Case) -> None:
    """In FP32 all tokens are equal, on generated chats and on passages, and the result has both errors."""
    verification = verification_of(llama.inputs["verify"].folder)
    assert verification is not None
    assert set(verification["identical"].values()) == {1.0}
    assert llama.inputs["prompts"].summary["kinds"] == ["chat", "page"]
    assert all(error["torch_error"] > 0 for error in verification["outputs"].values())


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_in_a_trained_llama_is_found(llama: Case, fault: str, tmp_path: Path) -> None:
    assert_fault_is_found(llama, fault, tmp_path)


def chats(count: int) -> dict[str, torch.Tensor]:
    """Return questions in the chat template, padded on the left, [count, length]."""
    tokenizer = texts.load_tokenizer(folder(LLAMA))
    assert tokenizer is not None
    return texts.encode(tokenizer, sample_lines("questions.txt")[:count], chat=True)


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (1, {"max_new_tokens": 500}),
        (1, {"max_new_tokens": 40, "num_beams": 4}),
        (4, {"max_new_tokens": 40}),
        (4, {"max_new_tokens": 40, "cache_implementation": "static"}),
        (3, {"max_new_tokens": 20, "num_beams": 2, "cache_implementation": "static"}),
    ],
    ids=["greedy", "beams", "padded", "static", "static beams"],
)
def test_chats(models: tuple[Any, AcceleratedModel], rows: int, options: dict[str, Any]) -> None:
    expected, found = (model.generate(**chats(rows), do_sample=False, **options) for model in models)
    assert torch.equal(found, expected)
    assert len(set(found[0].tolist())) > 20


def test_static_cache_from_the_caller(models: tuple[Any, AcceleratedModel]) -> None:
    inputs, results = chats(3), []
    for model in models:
        cache = StaticCache(models[0].config, max_cache_len=inputs["input_ids"].shape[1] + 30)
        results.append(model.generate(**inputs, do_sample=False, max_new_tokens=30, past_key_values=cache))
    assert torch.equal(*results)


@pytest.fixture(scope="module")
def whisper(build: Build) -> Artifact:
    return build(folder(WHISPER), "verify", TRAINED)[1]["verify"]


def test_speech(whisper: Artifact, tmp_path: Path) -> None:
    """The transcript of a spoken sentence is PyTorch's, and most of it is right."""
    if (espeak := shutil.which("espeak-ng")) is None:
        pytest.skip("needs espeak-ng")
    sentence = "please open the window and close the door"
    sound = tmp_path / "speech.wav"
    subprocess.run([espeak, "-w", sound.with_suffix(".raw.wav"), "-s", "140", sentence], check=True)
    subprocess.run(["sox", sound.with_suffix(".raw.wav"), "-r", "16000", "-c", "1", sound], check=True)
    processor = AutoProcessor.from_pretrained(folder(WHISPER))
    features = audio.encode(processor.feature_extractor, [audio.read(sound, 16_000)])
    eager = AutoModelForSpeechSeq2Seq.from_pretrained(folder(WHISPER), dtype=torch.float32).eval()
    with load(whisper.folder, runtime="cpu") as ours:
        expected, found = (
            processor.batch_decode(subject.generate(**features), skip_special_tokens=True) for subject in (eager, ours)
        )
    assert found == expected
    transcribed = set(found[0].lower().replace(".", "").replace(",", "").split())
    assert len(transcribed & set(sentence.split())) >= 5, found
