"""Speech inputs: sound files, turned into features by a checkpoint's feature extractor."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def read(path: Path, rate: int) -> np.ndarray[Any, Any]:
    """Read a mono sound file.

    Args:
        path: The file, in any format that soundfile reads.
        rate: Sampling rate that the model takes, in Hz.

    Returns:
        Samples from -1 to 1, [samples], float32.

    Raises:
        AccelError: soundfile isn't installed, the file can't be read, is empty, isn't mono or has another rate.
    """
    try:
        import soundfile
    except ImportError as error:
        raise AccelError("generate.audio needs the package soundfile: pip install 'accel-onnx[audio]'") from error
    if not path.is_file():
        raise AccelError(f"can't read {path}: no such file")
    try:
        samples, file_rate = soundfile.read(path, dtype="float32")  # [samples] or [samples, channels]
    except soundfile.SoundFileError as error:
        raise AccelError(f"can't read {path} as sound: {error}") from error
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    if file_rate != rate or channels != 1:
        plural = "s" if channels > 1 else ""
        raise AccelError(
            f"{path} has {channels} channel{plural} at {file_rate} Hz, but the model takes 1 channel at {rate} Hz. "
            f"Convert it: ffmpeg -i {path} -ac 1 -ar {rate} {path.stem}-{rate}.wav"
        )
    if not len(samples):
        raise AccelError(f"{path} holds no sound: it has 0 samples")
    return np.asarray(samples)


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
