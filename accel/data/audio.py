"""Speech inputs: sound files, turned into features by a checkpoint's feature extractor."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from accel.data import pretrained
from accel.errors import AccelError

EXTRACTOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"


def load_extractor(folder: Path) -> Any:
    """Load the feature extractor of a checkpoint.

    Raises:
        AccelError: `folder` has no feature extractor.
    """
    if not any((folder / name).is_file() for name in (EXTRACTOR_FILE, PROCESSOR_FILE)):
        raise AccelError(
            f"{str(folder)!r} holds no {EXTRACTOR_FILE}, which describes how sound is turned into the model's inputs: "
            "copy it from the original checkpoint"
        )
    return pretrained.load_extractor(folder)


def read(source: Path | BinaryIO, rate: int, name: str | None = None) -> np.ndarray[Any, Any]:
    """Read a mono sound file.

    Args:
        source: The file's path, or the file itself, in any format that soundfile reads.
        rate: Sampling rate that the model takes, in Hz.
        name: Name of the file in messages; None: its path.

    Returns:
        Samples from -1 to 1, [samples], float32.

    Raises:
        AccelError: soundfile isn't installed, the file can't be read, is empty, isn't mono or has another rate.
    """
    name = name or str(source)
    with _reading(source, name) as soundfile:
        samples, file_rate = soundfile.read(source, dtype="float32")  # [samples] or [samples, channels]
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    if file_rate != rate or channels != 1:
        plural = "s" if channels > 1 else ""
        path, stem = (source, source.stem) if isinstance(source, Path) else ("FILE", "FILE")
        raise AccelError(
            f"{name} has {channels} channel{plural} at {file_rate} Hz, but the model takes 1 channel at {rate} Hz. "
            f"Convert it: ffmpeg -i {path} -ac 1 -ar {rate} {stem}-{rate}.wav"
        )
    if not len(samples):
        raise AccelError(f"{name} holds no sound: it has 0 samples")
    return np.asarray(samples)


def seconds(source: Path | BinaryIO, name: str | None = None) -> float:
    """Return the length of a sound file, from its header.

    Args:
        source: The file's path, or the file itself, which is left at its beginning.
        name: Name of the file in messages; None: its path.

    Raises:
        AccelError: soundfile isn't installed, or the file can't be read.
    """
    with _reading(source, name or str(source)) as soundfile:
        length = float(soundfile.info(source).duration)
    if not isinstance(source, Path):
        source.seek(0)
    return length


@contextmanager
def _reading(source: Path | BinaryIO, name: str) -> Iterator[Any]:
    """Open a context with the module soundfile, whose errors become an `AccelError` that names the file."""
    try:
        import soundfile
    except ImportError as error:
        raise AccelError("generate.audio needs the package soundfile: pip install 'accel-onnx[audio]'") from error
    if isinstance(source, Path) and not source.is_file():
        raise AccelError(f"can't read {name}: no such file")
    try:
        yield soundfile
    except soundfile.SoundFileError as error:
        reason = str(error) if isinstance(source, Path) else getattr(error, "error_string", "no known format")
        raise AccelError(f"can't read {name} as sound: {reason}") from error


def encode(extractor: Any, sounds: Sequence[np.ndarray[Any, Any]]) -> dict[str, Tensor]:
    """Extract the features of a batch of sounds.

    Sounds are padded to the model's fixed length. If one is longer, all are padded to the longest instead, and the
    model's own `generate` processes them window by window.

    Args:
        extractor: The checkpoint's feature extractor.
        sounds: Samples of each sound, [samples].

    Returns:
        `input_features` [batch, bins, frames] and `attention_mask` [batch, frames].
    """
    options: dict[str, Any] = {}
    if any(len(samples) > extractor.n_samples for samples in sounds):
        options = {"truncation": False, "padding": "longest"}
    features = extractor(
        list(sounds),
        sampling_rate=extractor.sampling_rate,
        return_tensors="pt",
        return_attention_mask=True,
        **options,
    )
    return dict(features)
