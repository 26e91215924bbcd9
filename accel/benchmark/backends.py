"""The setups a benchmark compares: which model, on which engine, with or without cache."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from accel.adapters.types import Component
from accel.benchmark.timer import fixed_length_options
from accel.config.schema import RuntimeConfig
from accel.errors import AccelError, unknown
from accel.models.checkpoints import load_model
from accel.models.generation import AcceleratedModel, Generates
from accel.models.loading import as_model, open_model
from accel.runtime import layout
from accel.runtime.dynamic_cache import DynamicCacheRuntime
from accel.runtime.io_binding import BoundSession
from accel.runtime.session import SessionSettings, open_session
from accel.system import host_memory

TORCH, TORCH_FP32, MERGED, TWO_FILES, STATIC = "torch", "torch in FP32", "merged", "two files", "static"  # engines


@dataclass(frozen=True)
class Backend:
    """A row of the benchmark: an engine, which is one model in memory, and how its `generate` is called."""

    engine: str
    use_cache: bool
    further: Mapping[str, Any] = field(default_factory=dict)  # options of `generate` that this setup is about
    autocast: bool = False  # FP32 weights, FP16 operators, as torch.autocast picks them
    compiled: bool = False  # transformers compiles the decoder where it can
    cuda: bool = False  # of use on CUDA only
    captured: bool = False  # of use where the runtime captures only

    def fits(self, runtime: RuntimeConfig) -> bool:
        return (runtime.device.startswith("cuda") or not self.cuda) and (runtime.capture or not self.captured)

    def prepares(self, num_beams: int) -> bool:
        """Whether a first generation of the same length makes ready what others use.

        Transformers (5.17 to 5.23) compiles the decoder in greedy search; its beam search never does. Of ours, a step
        is captured for each bucket.
        """
        return self.captured or (self.compiled and num_beams == 1)

    def options(self, new_tokens: int, num_beams: int) -> dict[str, Any]:
        """Options of `generate` for exactly `new_tokens` tokens."""
        return {**fixed_length_options(new_tokens, num_beams, use_cache=self.use_cache), **self.further}

    @contextmanager
    def context(self) -> Iterator[None]:
        """Where `generate` is called: in inference mode, but what is compiled has only `generate`'s own `no_grad`."""
        with ExitStack() as stack:
            if not self.compiled:
                stack.enter_context(torch.inference_mode())
            if self.autocast:
                stack.enter_context(torch.autocast("cuda", torch.float16))
            yield


BASELINE = "torch_cache"
OURS = "onnx_merged"
SEPARATE = "onnx_two_files"
CAPTURED = "onnx_captured"
BACKENDS: dict[str, Backend] = {
    "torch_no_cache": Backend(TORCH, False),
    BASELINE: Backend(TORCH, True),
    "torch_autocast": Backend(TORCH_FP32, True, autocast=True, cuda=True),
    "torch_static_compiled": Backend(TORCH, True, {"cache_implementation": "static"}, compiled=True, cuda=True),
    "onnx_no_cache": Backend(MERGED, False),
    OURS: Backend(MERGED, True),
    SEPARATE: Backend(TWO_FILES, True),
    CAPTURED: Backend(STATIC, True, cuda=True, captured=True),
}


def ours(runtime: RuntimeConfig) -> str:
    """The setup that `generate` has on `runtime`."""
    return CAPTURED if runtime.capture else OURS


def chosen(names: Sequence[str], runtime: RuntimeConfig) -> list[str]:
    """The setups that `benchmark.backends` asks for; all that fit `runtime` if it is empty.

    Raises `AccelError` on one that doesn't exist, doesn't fit, or is named twice.
    """
    fitting = [name for name, backend in BACKENDS.items() if backend.fits(runtime)]
    for name in names:
        if name not in BACKENDS:
            raise unknown("benchmark.backends", name, fitting)
        if name not in fitting:
            needed = "runtime=cuda-graph" if BACKENDS[name].captured else "runtime=cuda"
            raise AccelError(f"benchmark.backends: {name!r} needs {needed}. Choices here: {', '.join(fitting)}")
    if len(set(names)) < len(names):
        raise AccelError(f"benchmark.backends={list(names)} names a setup twice")
    return list(names) or fitting


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
    if engine in (TORCH, TORCH_FP32):
        yield torch_model(sources, torch.float32 if engine == TORCH_FP32 else None)
    else:
        runtime = sources.runtime
        if runtime.capture and engine != STATIC:  # the setup beside the one that is captured
            runtime = replace(runtime, static=False, capture=False)
        with two_files(sources) if engine == TWO_FILES else open_model(Path(sources.deployable), runtime) as model:
            yield model


def torch_model(sources: Sources, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """What people run without accel: loaded in `dtype` (by default the precision asked for; on the CPU always FP32),
    with the attention and the modules left in FP32 that transformers chooses.
    """
    device = torch.device(sources.runtime.device)
    half = device.type != "cpu" and dtype is None
    model = load_model(Path(sources.checkpoint), getattr(torch, sources.dtype) if half else torch.float32, None)
    moved: PreTrainedModel = model.to(device)  # type: ignore[arg-type]
    return moved


def kept_in_fp32(model: torch.nn.Module) -> dict[str, int]:
    """Of a model in FP16: last part of a module's name -> how many of that name hold FP32 weights."""
    found: Counter[str] = Counter()
    for name, module in model.named_modules():
        found[name.rsplit(".", 1)[-1]] += any(
            parameter.dtype == torch.float32 for parameter in module.parameters(recurse=False)
        )
    return {name: count for name, count in found.items() if count}


def free(device: str) -> None:
    """Give back what closed models leave behind: on CUDA, what PyTorch's allocator keeps."""
    host_memory.release()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def two_files(sources: Sources) -> AcceleratedModel:
    """What other exporters ship: prefill and step in files of their own, which share no weights."""
    sessions = {
        component: bound(path, SessionSettings.of(sources.runtime), sources.runtime.device)
        for component in (Component.ENCODER, Component.PREFILL, Component.DECODE)
        if (path := Path(sources.graphs) / f"{component}.onnx").is_file()
    }
    runtime = DynamicCacheRuntime(
        sessions.get(Component.ENCODER), sessions[Component.PREFILL], sessions[Component.DECODE], sources.cache
    )
    return as_model(runtime, Path(sources.deployable))


def bound(path: Path, how: SessionSettings, device: str) -> BoundSession:
    """A session over the graph at `path`, called with torch tensors on `device`."""
    return BoundSession(open_session(path, how), torch.device(device))


def deployed(folder: Path, runtime: RuntimeConfig, traces: Path) -> tuple[AcceleratedModel, dict[str, BoundSession]]:
    """The model in a deployable's folder with ONNX Runtime's profiler on, and its sessions by role's name.

    `traces` is the folder that the sessions write to once their profiling ends.
    """
    sessions = {
        name: bound(folder / file, SessionSettings.of(runtime, profile=str(traces / name)), runtime.device)
        for name, file in (("encoder", layout.ENCODER), ("decoder", layout.DECODER))
        if (folder / file).is_file()
    }
    decoder = sessions["decoder"]
    metadata = decoder.session.get_modelmeta().custom_metadata_map
    cache, flag = json.loads(metadata[layout.CACHE]), metadata[layout.FLAG]
    return as_model(DynamicCacheRuntime(sessions.get("encoder"), decoder, decoder, cache, flag), folder), sessions
