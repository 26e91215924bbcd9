"""Speech recognition: a tiny Whisper with random weights, a feature extractor and a tokenizer of one letter per id."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from filelock import FileLock
from transformers import AutoModelForSpeechSeq2Seq, WhisperFeatureExtractor, WhisperTokenizer, pipeline

from accel.data import audio
from accel.errors import AccelError
from accel.models.loading import load
from accel.pipeline.store import Artifact
from accel.testing import random_model
from tests.conftest import Build
from tests.families import FAMILIES

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("speech")]
RATE = 16_000
OPTIONS = {"max_new_tokens": 12, "no_repeat_ngram_size": 1}


@pytest.fixture(scope="module")
def checkpoint(shared: Path) -> Path:
    """Model, feature extractor (one second, 100 frames), tokenizer, and two sound files, in one folder."""
    folder = shared / "speech"
    with FileLock(shared / "speech.lock"):
        if not (folder / "config.json").exists():
            folder.mkdir(exist_ok=True)
            WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)
            letters = {chr(30 + i): i for i in range(3, 97)} | {f"{chr(i)}!": i for i in range(97, 119)}
            special = {"<|startoftranscript|>": 0, "<pad>": 1, "<|endoftext|>": 2, "<|notimestamps|>": 119}
            WhisperTokenizer(vocab=special | letters, merges=[], pad_token="<pad>").save_pretrained(folder)
            for number, hertz in enumerate((220, 1000)):
                soundfile.write(folder / f"{number}.wav", tone(hertz, 0.3 + 0.3 * number), RATE)
            random_model(FAMILIES["whisper"]).save_pretrained(folder)
    return folder


def tone(hertz: float, seconds: float) -> np.ndarray[Any, Any]:
    """Return a modulated sine, [samples], float32."""
    time = np.arange(int(RATE * seconds)) / RATE
    return (0.4 * np.sin(2 * np.pi * hertz * time) * (1 + np.sin(9 * time))).astype(np.float32)


@pytest.fixture(scope="module")
def stage_artifacts(build: Build, checkpoint: Path) -> dict[str, Artifact]:
    sounds = ",".join(str(checkpoint / f"{number}.wav") for number in range(2))
    options = ["+generate.max_new_tokens=12", "+generate.no_repeat_ngram_size=1"]
    return build(checkpoint, "[verify,generate]", [f"generate.audio=[{sounds}]", *options])[1]


def test_sound_files_become_text(stage_artifacts: dict[str, Artifact], checkpoint: Path) -> None:
    """`generate.audio` gives PyTorch's output for the same features, one text per file."""
    extractor, tokenizer = (
        WhisperFeatureExtractor.from_pretrained(checkpoint),
        WhisperTokenizer.from_pretrained(checkpoint),
    )
    sounds = [soundfile.read(checkpoint / f"{number}.wav", dtype="float32")[0] for number in range(2)]
    features = extractor(sounds, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True)
    eager = AutoModelForSpeechSeq2Seq.from_pretrained(checkpoint).eval()
    expected = tokenizer.batch_decode(eager.generate(**features, **OPTIONS), skip_special_tokens=True)
    written = json.loads((stage_artifacts["generate"].folder / "texts.json").read_text())
    assert written["outputs"] == expected
    assert len(set(expected[0])) > 8
    assert expected[0] != expected[1]


def test_pipeline_of_transformers(stage_artifacts: dict[str, Artifact], checkpoint: Path) -> None:
    """`pipeline("automatic-speech-recognition")` gives the same text over accel's model."""
    parts = {
        "tokenizer": WhisperTokenizer.from_pretrained(stage_artifacts["verify"].folder),
        "feature_extractor": WhisperFeatureExtractor.from_pretrained(stage_artifacts["verify"].folder),
    }
    eager = AutoModelForSpeechSeq2Seq.from_pretrained(checkpoint).eval()
    transcripts = []
    with load(stage_artifacts["verify"].folder, runtime="cpu") as model:
        for subject in (eager, model):
            transcribe = pipeline("automatic-speech-recognition", model=subject, **parts)
            transcripts.append(
                transcribe({"raw": tone(440, 0.8), "sampling_rate": RATE}, generate_kwargs=OPTIONS)["text"]
            )
    assert transcripts[0] == transcripts[1]
    assert len(transcripts[0]) > 8


def test_whispers_own_generate(stage_artifacts: dict[str, Artifact], checkpoint: Path) -> None:
    """Whisper's own additions to `generate` work: features longer than one window, timestamps and segments."""
    features = torch.randn(1, 8, 230, generator=torch.Generator().manual_seed(3))
    options = OPTIONS | {"return_timestamps": True, "attention_mask": torch.ones(1, 230, dtype=torch.int64)}
    found = []
    eager = AutoModelForSpeechSeq2Seq.from_pretrained(checkpoint).eval()
    with load(stage_artifacts["verify"].folder, runtime="cpu") as model:
        for subject in (eager, model):
            subject.generation_config.no_timestamps_token_id = 99
            found.append(subject.generate(features, **options, return_segments=True))
    assert torch.equal(found[0]["sequences"], found[1]["sequences"])
    assert len(found[0]["segments"][0]) > 1


@pytest.mark.parametrize(
    ("samples", "rate", "named"),
    [
        (np.zeros((800, 2), np.float32), RATE, "2 channels at 16000 Hz"),
        (np.zeros(800, np.float32), 44_100, "1 channel at 44100 Hz"),
        (np.zeros(0, np.float32), RATE, "no sound"),
    ],
)
def test_sound_in_an_unsupported_format(tmp_path: Path, samples: Any, rate: int, named: str) -> None:
    """The message gives the format of the file and the one that the model takes."""
    soundfile.write(tmp_path / "x.wav", samples, rate)
    with pytest.raises(AccelError, match=named):
        audio.read(tmp_path / "x.wav", RATE)


def test_file_that_is_no_sound(tmp_path: Path) -> None:
    (tmp_path / "x.wav").write_text("not a sound")
    with pytest.raises(AccelError, match=r"x\.wav as sound"):
        audio.read(tmp_path / "x.wav", RATE)
    with pytest.raises(AccelError, match=r"y\.wav: no such file"):
        audio.read(tmp_path / "y.wav", RATE)
