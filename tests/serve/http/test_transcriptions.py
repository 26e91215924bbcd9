"""`/v1/audio/transcriptions` over a tiny Whisper with random weights, by OpenAI's own client."""

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import soundfile

from accel.data import audio
from accel.serve.requests.served_model import open_served, scheduler_limits
from accel.serve.scheduling.opening import open_scheduler
from tests.conftest import Build
from tests.integration.test_speech import RATE, checkpoint, tone  # noqa: F401  # a fixture
from tests.serve.servers import LIMITS, Running, running

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("speech")]


@pytest.fixture(scope="module")
def server(build: Build, checkpoint: Path) -> Iterator[Running]:  # noqa: F811
    folder = build(checkpoint, "merge")[1]["merge"].folder
    scheduler = partial(open_scheduler, limits=scheduler_limits(LIMITS))
    with running([open_served("whisper", folder, None, scheduler)]) as server:
        yield server


def wav(samples: np.ndarray[Any, Any], rate: int = RATE, form: str = "WAV") -> tuple[str, bytes]:
    """Return samples as an upload."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=form)
    return f"sound.{form.lower()}", file.getvalue()


def test_text_is_that_of_generate(server: Running) -> None:
    """Two sounds, in both forms of the reply."""
    served = server.models["whisper"]
    served.model.generation_config.no_repeat_ngram_size = 1  # random weights repeat a token
    served.model.generation_config.max_new_tokens = 12
    texts = []
    for sound in (tone(220, 0.3), tone(1000, 0.6)):
        name, content = wav(sound)
        samples = audio.read(io.BytesIO(content), RATE, name)  # as the file rounds them
        ids = served.model.generate(**audio.encode(served.extractor, [samples]))
        expected = served.tokenizer.decode(ids[0], skip_special_tokens=True).strip()
        reply = server.openai.audio.transcriptions.create(model="whisper", file=(name, content))
        assert reply.text == expected
        plain = server.openai.audio.transcriptions.create(model="whisper", file=(name, content), response_format="text")
        assert str(plain).strip() == expected
        texts.append(expected)
    assert texts[0] != texts[1]
    assert min(map(len, texts)) > 3


@pytest.mark.parametrize(
    ("upload", "status", "part"),
    [
        (("sound.wav", b""), 400, "the file"),
        (("sound.wav", b"RIFF\x00\x00\x00\x00WAVEfmt "), 400, "the file"),
        (("sound.wav", b"\x00" * 5000), 400, "the file"),
        (wav(tone(220, 0.5), rate=8000), 400, "8000 Hz"),
        (wav(np.zeros((800, 2), np.float32)), 400, "2 channels"),
        (wav(np.zeros(0, np.float32)), 400, "0 samples"),
        (wav(tone(220, 1.5)), 413, "1.5 s"),
        (wav(np.zeros(RATE * 3600, np.float32), form="FLAC"), 413, "3600.0 s"),  # an hour of silence in few bytes
    ],
)
def test_sounds_that_cannot_be_used(upload: tuple[str, bytes], status: int, part: str, server: Running) -> None:
    with pytest.raises(openai.APIStatusError) as raised:
        server.openai.audio.transcriptions.create(model="whisper", file=upload)
    assert raised.value.status_code == status
    assert part in raised.value.message
    assert "/tmp" not in raised.value.message


def test_other_mistakes(server: Running) -> None:
    """Fields that are missing or wrong, and routes of other models."""
    files = {"file": wav(tone(220, 0.3))}
    for data, part in (
        ({}, "model"),
        ({"model": "whisper", "response_format": "srt"}, "response_format"),
        ({"model": "whisper", "temperature": "7"}, "temperature"),
    ):
        reply = server.http.post("/v1/audio/transcriptions", data=data, files=files)
        assert reply.status_code == 400
        assert part in reply.json()["error"]["message"]
    assert "file" in server.http.post("/v1/audio/transcriptions", data={"model": "whisper"}).json()["error"]["message"]
    with pytest.raises(openai.BadRequestError, match="audio/transcriptions"):
        server.openai.completions.create(model="whisper", prompt="a")
