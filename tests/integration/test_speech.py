"""Speech recognition: a tiny Whisper with random weights, a feature extractor and a tokenizer of one letter per id."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from filelock import FileLock
from transformers import AutoModelForSpeechSeq2Seq, WhisperFeatureExtractor, WhisperTokenizer, pipeline

from accel.cli import report
from accel.config.schema import Config
from accel.data import audio
from accel.errors import AccelError
from accel.models import loading
from accel.models.generation import AcceleratedModel
from accel.models.loading import load
from accel.pipeline.store import Artifact
from accel.stages import generate
from accel.testing import random_model
from tests.conftest import Build
from tests.families import FAMILIES

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("speech")]
RATE = 16_000
TIMESTAMPS = 100  # the first token that is one
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
            soundfile.write(folder / "long.wav", tone(500, 2.5), RATE)
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
            subject.generation_config.no_timestamps_token_id = TIMESTAMPS - 1
            found.append(subject.generate(features, **options, return_segments=True))
    assert torch.equal(found[0]["sequences"], found[1]["sequences"])
    assert len(found[0]["segments"][0]) > 1


def run_on(build: Build, checkpoint: Path, names: Sequence[str], *more: str) -> tuple[Config, dict[str, Artifact]]:
    """Run the stage on sound files of the checkpoint's folder."""
    sounds = ",".join(str(checkpoint / f"{name}.wav") for name in names)
    options = [f"generate.{name}={value}" for name, value in OPTIONS.items()]
    return build(checkpoint, "[verify,generate]", [f"generate.audio=[{sounds}]", *options, *more])


def outputs_of(artifacts: dict[str, Artifact]) -> list[str]:
    return json.loads((artifacts["generate"].folder / "texts.json").read_text())["outputs"]


def test_a_sound_that_is_too_long(
    build: Build, checkpoint: Path, stage_artifacts: dict[str, Artifact], capsys: pytest.CaptureFixture[str]
) -> None:
    """One message for it; the others have their outputs, in a batch with it or not."""
    config, artifacts = run_on(build, checkpoint, ["0", "long", "1"])
    assert outputs_of(artifacts) == outputs_of(stage_artifacts)
    with pytest.raises(AccelError, match=r"long\.wav, which lasts 2\.5 s: the model takes 1 s at once; set generate"):
        report.finish(config, artifacts)
    assert outputs_of(stage_artifacts)[0] in capsys.readouterr().out


def test_timestamps(build: Build, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate.return_timestamps` gives PyTorch's tokens, timestamps among them."""
    extractor, tokenizer = (
        WhisperFeatureExtractor.from_pretrained(checkpoint),
        WhisperTokenizer.from_pretrained(checkpoint),
    )
    eager = AutoModelForSpeechSeq2Seq.from_pretrained(checkpoint).eval()
    eager.generation_config.no_timestamps_token_id = TIMESTAMPS - 1

    def open_model(*args: Any) -> AcceleratedModel:
        model = loading.open_model(*args)
        model.generation_config.no_timestamps_token_id = TIMESTAMPS - 1
        return model

    monkeypatch.setattr(generate, "open_model", open_model)
    expected = []
    for name in ("0", "1"):
        samples = soundfile.read(checkpoint / f"{name}.wav", dtype="float32")[0]
        ids = eager.generate(**audio.encode(extractor, [samples]), return_timestamps=True, **OPTIONS)
        expected += tokenizer.batch_decode(ids, skip_special_tokens=True, decode_with_timestamps=True)
    _, artifacts = run_on(build, checkpoint, ["0", "1"], "generate.return_timestamps=true")
    assert outputs_of(artifacts) == expected
    assert all(re.search(r"<\|\d\.\d\d\|>", output) for output in expected)


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
