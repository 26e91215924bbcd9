"""The setups a benchmark compares: which model, on which engine, with or without cache."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from accel import memory
from accel.adapter import Role
from accel.generation import AcceleratedModel, Generates
from accel.loading import as_model, open_model, settings
from accel.runtime import layout
from accel.runtime.binding import BoundSession
from accel.runtime.onnx import GrowingRuntime
from accel.runtime.session import SessionSettings, open_session
from accel.schema import RuntimeConfig
from accel.stages.checkpoint import load_model

TORCH, MERGED, TWO_FILES = "torch", "merged", "two files"  # engines


@dataclass(frozen=True)
class Setup:
    """A row of the benchmark."""

    engine: str
    use_cache: bool


BASELINE = "torch+cache"
OURS = "onnx+cache"
SEPARATE = "onnx+cache, two files"
SETUPS: dict[str, Setup] = {
    "torch": Setup(TORCH, False),
    BASELINE: Setup(TORCH, True),
    "onnx": Setup(MERGED, False),
    OURS: Setup(MERGED, True),
    SEPARATE: Setup(TWO_FILES, True),
}


@dataclass(frozen=True)
class Sources:
    """Everything needed to open any engine, in this process or in another: it survives JSON."""

    checkpoint: str  # folder of the PyTorch model
    deployable: str  # folder of the merged decoder
    graphs: str  # folder of one ONNX file per role
    cache: Mapping[str, str]  # cache input of a step -> the output that feeds it
    runtime: RuntimeConfig
    dtype: str = "float32"  # of PyTorch's weights, where the device computes in it

    def dump(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> "Sources":
        return cls(**{**values, "runtime": RuntimeConfig(**values["runtime"])})


@contextmanager
def opened(engine: str, sources: Sources) -> Iterator[Generates]:
    """A model with transformers' `generate`, freed at the end. Every ONNX engine opens its sessions alike."""
    if engine == TORCH:
        yield torch_model(sources)
    else:
        separate = engine == TWO_FILES
        with two_files(sources) if separate else open_model(Path(sources.deployable), sources.runtime) as model:
            yield model
    memory.release()


def torch_model(sources: Sources) -> PreTrainedModel:
    """What people run without accel: attention as transformers chooses it, half precision only on a GPU."""
    model = load_model(Path(sources.checkpoint))
    if getattr(model, "_supports_sdpa", False):
        model.set_attn_implementation("sdpa")
    device = torch.device(sources.runtime.device)
    dtype = torch.float32 if device.type == "cpu" else getattr(torch, sources.dtype)
    moved: PreTrainedModel = model.to(device=device, dtype=dtype)  # type: ignore[call-arg]
    return moved


def two_files(sources: Sources) -> AcceleratedModel:
    """What other exporters ship: prefill and step in files of their own, which share no weights."""
    graphs = Path(sources.graphs)
    encoder, prefill, step = (
        bound(graphs / f"{role}.onnx", settings(sources.runtime), sources.runtime.device)
        for role in (Role.ENCODER, Role.PREFILL, Role.STEP)
    )
    return as_model(GrowingRuntime(encoder, prefill, step, sources.cache), Path(sources.deployable))


def bound(path: Path, how: SessionSettings, device: str) -> BoundSession:
    """A session over the graph at `path`, called with torch tensors on `device`."""
    return BoundSession(open_session(path, how), torch.device(device))


def deployed(folder: Path, runtime: RuntimeConfig, traces: Path) -> tuple[AcceleratedModel, dict[str, BoundSession]]:
    """The model in a deployable's folder with ONNX Runtime's profiler on, and its sessions by role's name.

    `traces` is the folder that the sessions write to once their profiling ends.
    """
    import json

    sessions = {
        name: bound(
            folder / file,
            SessionSettings(
                runtime.provider,
                runtime.provider_options,
                runtime.session,
                runtime.threads,
                profile=str(traces / name),
            ),
            runtime.device,
        )
        for name, file in (("encoder", layout.ENCODER), ("decoder", layout.DECODER))
        if (folder / file).is_file()
    }
    decoder = sessions["decoder"]
    metadata = decoder.session.get_modelmeta().custom_metadata_map
    cache, flag = json.loads(metadata[layout.CACHE]), metadata[layout.FLAG]
    return as_model(GrowingRuntime(sessions.get("encoder"), decoder, decoder, cache, flag), folder), sessions
