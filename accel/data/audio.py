"""Speech as inputs: sound files through a checkpoint's feature extractor."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import AutoFeatureExtractor

from accel.errors import AccelError

DESCRIPTION = "preprocessor_config.json"


def load_extractor(folder: Path) -> Any:
    """The feature extractor in `folder`. Raises `AccelError` if there is none."""
    if not any((folder / name).is_file() for name in (DESCRIPTION, "processor_config.json")):
        raise AccelError(f"{str(folder)!r} holds no {DESCRIPTION}, which says what the model makes of sound")
    return AutoFeatureExtractor.from_pretrained(folder)


def read(path: Path, rate: int) -> np.ndarray[Any, Any]:
    """The samples of a sound file, from -1 to 1. Raises `AccelError` unless it is mono, `rate` samples a second."""
    try:
        import soundfile
    except ImportError as error:
        raise AccelError("generate.audio needs the package soundfile: pip install 'accel-onnx[audio]'") from error
    if not path.is_file():
        raise AccelError(f"can't read {path}: no such file")
    try:
        samples, found = soundfile.read(path, dtype="float32")
    except soundfile.SoundFileError as error:
        raise AccelError(f"can't read {path} as sound: {error}") from error
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    if found != rate or channels != 1:
        raise AccelError(
            f"{path} has {channels} channel{'s' * (channels > 1)} at {found} Hz, the model takes one at {rate} Hz; "
            f"this converts it: ffmpeg -i {path} -ac 1 -ar {rate} {path.stem}-{rate}.wav"
        )
    if not len(samples):
        raise AccelError(f"{path} holds no sound")
    return np.asarray(samples)


def encode(extractor: Any, sounds: Sequence[np.ndarray[Any, Any]]) -> dict[str, Tensor]:
    """Samples -> `input_features` [batch, bins, frames] and their `attention_mask`, of the model's fixed length.

    Where one sound is longer than that, all keep their length, and the model's own `generate` moves along them.
    """
    rate = extractor.sampling_rate
    longer = any(len(samples) > extractor.n_samples for samples in sounds)
    how = {"truncation": False, "padding": "longest"} if longer else {}
    return dict(extractor(list(sounds), sampling_rate=rate, return_tensors="pt", return_attention_mask=True, **how))
