"""Backends that a benchmark compares: each is a loaded model and a way to call its `generate`."""

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
from accel.config.engines import ONNXRUNTIME
from accel.config.schema import RuntimeConfig
from accel.data.pretrained import load_config
from accel.errors import AccelError, unknown
from accel.models.checkpoints import load_model
from accel.models.generation import AcceleratedModel, Generates
from accel.models.loading import as_model, open_model, prompt_settings
from accel.runtime import layout
from accel.runtime.dynamic_cache import DynamicCacheRuntime, runtime_over
from accel.runtime.io_binding import BoundSession
from accel.runtime.session import SessionSettings, open_session
from accel.system import host_memory

# Models that a benchmark loads, each in a process of its own. Several backends may share one, but none that compiles:
# the compiler's threads, memory and streams must not change the figures of others.
TORCH = "torch"  # PyTorch in the benchmark's precision
TORCH_STATIC = "torch compiled by transformers"
TORCH_MAX = "torch compiled with max-autotune"  # under accel's decoding loops: see `compiled_model`
TORCH_FP32 = "torch in FP32"
PYTORCH = (TORCH, TORCH_STATIC, TORCH_MAX)  # in the benchmark's precision
MERGED = "merged"  # the deployable with a dynamic cache
TWO_FILES = "two files"  # prefill and decode graph in separate ONNX files
STATIC = "static"  # the deployable as the runtime is configured: static cache, CUDA graph


@dataclass(frozen=True)
class Backend:
    """One row of the benchmark's table: a loaded model and a way to call its `generate`.

    Attributes:
        model: The loaded model that `generate` is called on, one of the names above.
        use_cache: Whether `generate` uses a KV cache.
        generate_options: Further options of `generate`, in which this backend differs from others of the same model.
        autocast: Run FP32 weights under `torch.autocast`, which picks the operators that compute in FP16.
        compiled: Its decoder is compiled: by transformers where it supports that, or always with `TORCH_MAX`.
        needs_cuda: Include this backend on CUDA devices only.
        named_on_cpu: On the CPU, include this backend only where `benchmark.backends` names it: compiling needs a C++
            compiler, and takes minutes.
        needs_capture: Include this backend only where the runtime captures CUDA graphs.
    """

    model: str
    use_cache: bool
    generate_options: Mapping[str, Any] = field(default_factory=dict)
    autocast: bool = False
    compiled: bool = False
    needs_cuda: bool = False
    named_on_cpu: bool = False
    needs_capture: bool = False

    def fits(self, runtime: RuntimeConfig) -> bool:
        """Return whether this backend can run on `runtime`."""
        if self.needs_cuda and not runtime.device.startswith("cuda"):
            return False
        return runtime.capture or not self.needs_capture

    def needs_full_warmup(self, num_beams: int) -> bool:
        """Return whether a warm-up must generate as many tokens as the measured generations.

        It must where the first generation of a length compiles or captures what later ones of that length reuse.
        Transformers (5.17 to 5.23) compiles the decoder in greedy search, never in beam search. The static cache's
        decode step is captured once per bucket, and with the selection of tokens in the second generation.
        """
        compiles = self.model == TORCH_MAX or (self.compiled and num_beams == 1)
        return self.needs_capture or compiles

    def options(self, new_tokens: int, num_beams: int) -> dict[str, Any]:
        """Return the options of `generate` for exactly `new_tokens` tokens."""
        return {**fixed_length_options(new_tokens, num_beams, use_cache=self.use_cache), **self.generate_options}

    @contextmanager
    def context(self) -> Iterator[None]:
        """Enter the PyTorch modes that `generate` is called in.

        Compiled models run under `generate`'s own `no_grad` only, all others in inference mode.
        """
        with ExitStack() as stack:
            if not self.compiled:
                stack.enter_context(torch.inference_mode())
            if self.autocast:
                stack.enter_context(torch.autocast("cuda", torch.float16))
            yield


# Names of backends that the reports refer to.
BASELINE = "torch_cache"
OURS = "onnx_merged"
SEPARATE = "onnx_two_files"
CAPTURED = "onnx_captured"

BACKENDS: dict[str, Backend] = {
    "torch_no_cache": Backend(TORCH, use_cache=False),
    BASELINE: Backend(TORCH, use_cache=True),
    "torch_autocast": Backend(TORCH_FP32, use_cache=True, autocast=True, needs_cuda=True),
    "torch_static_compiled": Backend(
        TORCH_STATIC,
        use_cache=True,
        generate_options={"cache_implementation": "static"},
        compiled=True,
        needs_cuda=True,
    ),
    "torch_compiled_max": Backend(TORCH_MAX, use_cache=True, compiled=True, named_on_cpu=True),
    "onnx_no_cache": Backend(MERGED, use_cache=False),
    OURS: Backend(MERGED, use_cache=True),
    SEPARATE: Backend(TWO_FILES, use_cache=True),
    CAPTURED: Backend(STATIC, use_cache=True, needs_cuda=True, needs_capture=True),
}


def deployable_backend(runtime: RuntimeConfig) -> str:
    """Return the name of the backend that runs a deployable as `accel.load` does on `runtime`."""
    return CAPTURED if runtime.capture else OURS


def select_backends(names: Sequence[str], runtime: RuntimeConfig) -> list[str]:
    """Return the backends to compare: `names`, or if it is empty all that fit `runtime` and needn't be named there.

    Args:
        names: The value of `benchmark.backends`.
        runtime: The runtime that the benchmark runs on.

    Raises:
        AccelError: A backend doesn't exist, can't run on `runtime`, or is listed twice.
    """
    fitting = [name for name, backend in BACKENDS.items() if backend.fits(runtime)]
    for name in names:
        if name not in BACKENDS:
            raise unknown("benchmark.backends", name, fitting)
        if name not in fitting:
            needed = "runtime=cuda-graph" if BACKENDS[name].needs_capture else "runtime=cuda"
            raise AccelError(f"benchmark.backends: {name!r} needs {needed}. Choices here: {', '.join(fitting)}")
    if len(set(names)) < len(names):
        raise AccelError(f"benchmark.backends={list(names)} lists a backend twice: list each once")
    on_cpu = not runtime.device.startswith("cuda")
    return list(names) or [name for name in fitting if not (on_cpu and BACKENDS[name].named_on_cpu)]


@dataclass(frozen=True)
class Sources:
    """Files and settings from which any model of a benchmark is loaded, in this process or in another.

    Attributes:
        checkpoint: Folder of the PyTorch model.
        deployable: Folder of the merged decoder.
        graphs: Folder with one ONNX file per component.
        cache: Cache input of the decode graph -> the output that it is taken from.
        runtime: The runtime that the ONNX models open their sessions with; its device is also PyTorch's.
        dtype: Name of the torch dtype of PyTorch's weights, on devices that compute in it.
    """

    checkpoint: str
    deployable: str
    graphs: str
    cache: Mapping[str, str]
    runtime: RuntimeConfig
    dtype: str = "float32"

    def dump(self) -> dict[str, Any]:
        """Return all values as JSON, for `parse`."""
        return asdict(self)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> "Sources":
        """Return the sources that `dump` wrote."""
        return cls(**{**values, "runtime": RuntimeConfig(**values["runtime"])})


@contextmanager
def loaded_model(name: str, sources: Sources) -> Iterator[Generates]:
    """Load a model, and free it at the end. All ONNX models open their sessions with the same settings.

    Args:
        name: `Backend.model`.
        sources: Files and settings of the benchmark.

    Yields:
        A model with transformers' `generate`.
    """
    if name in (TORCH, TORCH_STATIC, TORCH_FP32):
        yield torch_model(sources, torch.float32 if name == TORCH_FP32 else None)
        return
    if name == TORCH_MAX:
        from accel.benchmark.compiled_model import compiled_model  # here, as torch's compiler takes long to import

        opened = compiled_model(torch_model(sources))
    elif name == TWO_FILES:
        opened = open_two_files(sources)
    else:
        runtime = sources.runtime
        if runtime.capture and name != STATIC:  # MERGED is what the captured model is compared with
            runtime = replace(runtime, static=False, capture=False, engine=ONNXRUNTIME)
        opened = open_model(Path(sources.deployable), runtime)
    with opened as model:
        yield model


def torch_model(sources: Sources, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load the checkpoint as users of transformers do, on the runtime's device.

    Transformers chooses the attention implementation and the modules that stay in FP32.

    Args:
        sources: Files and settings of the benchmark.
        dtype: Dtype of the weights. By default `sources.dtype`, but FP32 on the CPU.
    """
    device = torch.device(sources.runtime.device)
    use_sources_dtype = device.type != "cpu" and dtype is None
    weights_dtype = getattr(torch, sources.dtype) if use_sources_dtype else torch.float32
    model = load_model(Path(sources.checkpoint), weights_dtype, None)
    model_on_device: PreTrainedModel = model.to(device)  # type: ignore[arg-type]
    return model_on_device


def kept_in_fp32(model: torch.nn.Module) -> dict[str, int]:
    """Count the modules of an FP16 model whose own weights are FP32, by the last part of the module's name."""
    counts: Counter[str] = Counter()
    for path, module in model.named_modules():
        if any(parameter.dtype == torch.float32 for parameter in module.parameters(recurse=False)):
            counts[path.rsplit(".", 1)[-1]] += 1
    return dict(counts)


def release_memory(device: str) -> None:
    """Return unused memory of closed models to the system; on CUDA also what PyTorch's allocator caches."""
    host_memory.release()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def open_two_files(sources: Sources) -> AcceleratedModel:
    """Open prefill and decode graph from separate files, which share no weights, as other exporters ship them."""
    sessions: dict[Component, BoundSession] = {}
    for component in (Component.ENCODER, Component.PREFILL, Component.DECODE):
        path = Path(sources.graphs) / f"{component}.onnx"
        if path.is_file():
            settings = SessionSettings.of(sources.runtime)
            sessions[component] = open_bound_session(path, settings, sources.runtime.device)
    runtime = DynamicCacheRuntime(
        sessions.get(Component.ENCODER), sessions[Component.PREFILL], sessions[Component.DECODE], sources.cache
    )
    return as_model(runtime, Path(sources.deployable))


def open_bound_session(path: Path, settings: SessionSettings, device: str) -> BoundSession:
    """Open a session for the graph at `path` that takes and returns torch tensors on `device`."""
    return BoundSession(open_session(path, settings), torch.device(device))


def open_profiled(
    folder: Path, runtime: RuntimeConfig, traces: Path
) -> tuple[AcceleratedModel, dict[str, BoundSession]]:
    """Open a deployable with ONNX Runtime's profiler switched on.

    Args:
        folder: The deployable.
        runtime: The runtime that its sessions are opened with.
        traces: Folder that each session writes its trace to when its profiling ends.

    Returns:
        The model, and its sessions: `decoder`, and `encoder` if there is one.
    """
    sessions: dict[str, BoundSession] = {}
    files = layout.first_variant(folder)
    settings, chunk = prompt_settings(runtime, load_config(files.folder))
    for name, path in (("encoder", files.encoder), ("decoder", files.decoder)):
        if path.is_file():
            profiled = replace(settings, profile=str(traces / name))
            sessions[name] = open_bound_session(path, profiled, runtime.device)
    return as_model(runtime_over(sessions["decoder"], sessions.get("encoder"), chunk), folder), sessions
