"""Memory of one backend, measured in a process of its own.

Nothing is left over from another backend, and the memory that imports take is not counted; in the sessions' memory on
the CPU, neither are pages of libraries that are read as their code first runs. Sessions are measured without importing
transformers, which takes longer than the measurement.

On CUDA every figure is the device's memory in use, as its driver counts it, after minus before. It covers all that the
process took: weights, caches, workspaces, captured graphs, loaded kernels, and the arenas of PyTorch and of ONNX
Runtime, which return nothing and therefore still hold their peak. PyTorch's own counters don't see ONNX Runtime, so
they can't compare the two. CUDA's context and PyTorch's cuBLAS, hundreds of megabytes that any program takes, count
as imports. The driver counts other processes too, so these must be idle, and the measuring processes run one at a
time.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor

from accel import progress
from accel.benchmark.process import WorkerProcess
from accel.config.schema import RuntimeConfig
from accel.errors import AccelError
from accel.runtime.buckets import Buckets
from accel.runtime.decoder_inputs import decoder_inputs
from accel.runtime.dynamic_cache import DynamicCacheRuntime, DynamicCacheState
from accel.runtime.io_binding import BoundSession
from accel.runtime.layout import FLAG, first_variant
from accel.runtime.session import SessionSettings, open_session
from accel.runtime.static_cache import open_static
from accel.system.host_memory import peak_resident, release, reset_peak, resident, resident_data
from accel.system.quiet import quiet

# Kinds of measurement, and keys of the results.
PEAK = "peak"
SESSION = "session"
AT_THE_END = "at the end"

# Names of backends, as in `backends`, which this module can't import: it would import transformers.
SEPARATE, CAPTURED = "onnx_two_files", "onnx_captured"
DECODE_ALONE = "decode alone"  # the decode graph by itself, the yardstick of the merged decoder

PREFILL_FILE, DECODE_FILE = "prefill.onnx", "decode.onnx"
DECODE_STEPS = 4  # decoder calls after which a session's memory has settled


@dataclass(frozen=True)
class Task:
    """One measurement, for one process.

    Attributes:
        kind: `PEAK`, the peak over loading and one generation; or `SESSION`, the memory that the decoder's sessions
            hold after a few decode steps and after all.
        name: The backend, or `DECODE_ALONE`.
        sources: What `backends.Sources.dump` returned.
        batch_size: Rows of the inputs.
        source_length: Length of the inputs, in tokens.
        inputs: File of input tensors, [batch_size, source_length, ...]; read for `PEAK` only.
        options: Options of `generate`.
    """

    kind: str
    name: str
    sources: Mapping[str, Any]
    batch_size: int
    source_length: int
    inputs: str
    options: Mapping[str, Any]


def measure_all(tasks: Sequence[Task], weight_bytes: int) -> list[Any]:
    """Run every task in a process of its own.

    Args:
        tasks: The measurements.
        weight_bytes: Bytes of weights that one process loads at most, by which the number of processes is limited.

    Returns:
        Per task, the bytes that its process added to those it held after its imports: an `int` for `PEAK`, a mapping
        for `SESSION` (see `session_memory`).
    """
    with ThreadPoolExecutor(parallel_processes(tasks, weight_bytes)) as pool:
        return list(progress.track(pool.map(_measure_in_worker, tasks), "memory", total=len(tasks)))


def parallel_processes(tasks: Sequence[Task], weight_bytes: int) -> int:
    """Return how many processes may measure at the same time: as many as memory allows, and one on a GPU."""
    if any(_device(task).type == "cuda" for task in tasks):
        return 1  # the driver's counter doesn't tell processes apart
    fitting = psutil.virtual_memory().available // (8 * weight_bytes + 2**30)
    return int(max(1, min(os.cpu_count() or 1, fitting)))


def _device(task: Task) -> torch.device:
    """Return the device that a task measures on."""
    return torch.device(task.sources["runtime"]["device"])


def _measure_in_worker(task: Task) -> Any:
    """Run a task in a new process."""
    with WorkerProcess(task.name) as process:
        return process.call(_measure, task)


def _measure(task: Task) -> Any:
    """Run a task in this process. Raise only `AccelError`: other errors may not survive pickling."""
    onnxruntime.set_default_logger_severity(3)
    if threads := task.sources["runtime"]["threads"]:
        torch.set_num_threads(threads)
    measurements = {PEAK: peak_memory, SESSION: session_memory}
    try:
        return measurements[task.kind](task)
    except AccelError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = lines[-1] if lines else type(error).__name__
        raise AccelError(f"the process that measures {task.name!r} failed: {reason}") from None


def used_memory(device: torch.device) -> int:
    """Return the bytes in use: on CUDA those of the whole device, on the CPU those of this process, less libraries."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        free, total = torch.cuda.mem_get_info(device)
        return int(total - free)
    release()
    return resident_data()


def session_memory(task: Task) -> dict[str, int]:
    """Measure the bytes that the decoder's sessions hold.

    A session keeps the memory that caches passed through, so its memory depends on the number of tokens.

    Returns:
        `SESSION`: bytes after opening, one prefill (where the backend has one) and a few decode steps. `AT_THE_END`:
        bytes after `max_new_tokens` tokens; missing for `CAPTURED`.
    """
    device = _device(task)
    initialize_cuda(device)
    if task.name == CAPTURED:
        return {SESSION: _captured_memory(task, device)}
    before = used_memory(device)
    runtime, prefill, decode = _open_decoder(task, device)
    rows = task.batch_size * int(task.options["num_beams"])
    lengths = {"batch_size": rows, "source": task.source_length, "past": 1}
    ids = torch.ones(rows, 1, dtype=torch.int64, device=device)  # [rows, 1]

    def added_after(length: int) -> int:
        """Decode up to `length` decoder tokens, drop the caches and return the bytes added."""
        context = _ones(prefill, runtime.constants, lengths) | _ones(decode, runtime.constants, lengths)
        if task.name == DECODE_ALONE:
            state = DynamicCacheState(_ones(decode, runtime.self_cache_outputs, lengths), context, runtime.axes)
        else:
            _, state = runtime.prefill(decoder_inputs(ids, ids) | context)
        while state.length < length:
            runtime.decode(decoder_inputs(ids, ids.expand(rows, state.length + 1)), state)
        del context, state
        return max(0, used_memory(device) - before)

    return {
        SESSION: added_after(1 + DECODE_STEPS),
        AT_THE_END: added_after(int(task.options["max_new_tokens"])),
    }


def _captured_memory(task: Task, device: torch.device) -> int:
    """Return the bytes of prefill's session and of decode steps captured for the two smallest buckets, less caches."""
    config = RuntimeConfig(**task.sources["runtime"])
    rows = task.batch_size * int(task.options["num_beams"])
    buckets = Buckets(sorted(config.buckets)[:2])
    before = used_memory(device)
    runtime = open_static(
        first_variant(Path(task.sources["deployable"])),
        SessionSettings.of(config),
        config.device,
        buckets,
        session=config.static_session,
        environment=config.static_environment,
        engine=config.engine,
        tune=config.tune,
        capture=True,
        capture_batch_sizes=[rows],
        with_encoder=False,
    )
    runtime.prepare(task.source_length)
    lengths = {"batch_size": rows, "source": task.source_length}
    ids = torch.ones(rows, 1, dtype=torch.int64, device=device)  # [rows, 1]
    context = _ones(runtime.dynamic.decoder, runtime.dynamic.constants, lengths)
    _, state = runtime.prefill(decoder_inputs(ids, ids) | context)
    del context  # only the sessions are measured
    for _ in range(DECODE_STEPS):
        runtime.decode(decoder_inputs(ids, ids.expand(rows, state.length + 1)), state)
    caches = sum(runtime.cache_bytes(rows, bucket) for bucket in buckets.lengths)
    return max(0, used_memory(device) - before - caches)


def _open_decoder(task: Task, device: torch.device) -> tuple[DynamicCacheRuntime, BoundSession, BoundSession]:
    """Open a decoder without its encoder; return it with the sessions of prefill and decode, which may be the same."""
    settings = SessionSettings.of(RuntimeConfig(**task.sources["runtime"]))
    graphs = Path(task.sources["graphs"])
    flag = None
    if task.name == DECODE_ALONE:
        decode = BoundSession(open_session(graphs / DECODE_FILE, settings), device)
        prefill = decode
    elif task.name == SEPARATE:
        prefill = BoundSession(open_session(graphs / PREFILL_FILE, settings), device)
        decode = BoundSession(open_session(graphs / DECODE_FILE, settings), device)
    else:
        decode = BoundSession(open_session(first_variant(Path(task.sources["deployable"])).decoder, settings), device)
        prefill = decode
        flag = decode.session.get_modelmeta().custom_metadata_map[FLAG]
    return DynamicCacheRuntime(None, prefill, decode, task.sources["cache"], flag), prefill, decode


def _ones(session: BoundSession, names: Collection[str], lengths: Mapping[str, int]) -> dict[str, Tensor]:
    """Return tensors of ones for those of a session's inputs that are among `names`.

    `lengths` gives the length of each dynamic axis, by its name.
    """
    tensors: dict[str, Tensor] = {}
    for name, spec in session.inputs.items():
        if name in names:
            shape = [dim if isinstance(dim, int) else lengths[dim] for dim in spec.shape]
            tensors[name] = torch.ones(shape, dtype=session.dtype(name), device=session.device)
    return tensors


def peak_memory(task: Task) -> int:
    """Measure the bytes by which loading and one generation raise the peak above what the imports take."""
    from accel.benchmark import backends

    quiet()
    sources, backend = backends.Sources.parse(task.sources), backends.BACKENDS[task.name]
    device = _device(task)
    import_model_code(sources.checkpoint)
    memory = AddedMemory(device)
    with backends.loaded_model(backend.model, sources) as model:
        inputs = {name: tensor.to(device) for name, tensor in load_file(task.inputs).items()}
        with backend.context():
            model.generate(**inputs, **task.options)
        return memory.measure()


class AddedMemory:
    """Measurement of the memory that is used from now on, when everything is imported.

    Args:
        device: The CPU, where this process's peak counts, or a CUDA device, where what it holds in the end counts.
    """

    def __init__(self, device: torch.device) -> None:
        initialize_cuda(device)
        self._device = device
        if device.type == "cpu":
            release()
            self._before = resident()  # with libraries, which the kernel's peak counts, too
        else:
            self._before = used_memory(device)
        reset_peak()

    def measure(self) -> int:
        """Return the bytes added so far."""
        now = peak_resident() if self._device.type == "cpu" else used_memory(self._device)
        return max(0, now - self._before)


def initialize_cuda(device: torch.device) -> None:
    """Let CUDA allocate its context, and cuBLAS its workspace, which its first matrix product does."""
    if device.type == "cuda":
        for dtype in (torch.float32, torch.float16):
            square = torch.ones(64, 64, dtype=dtype, device=device)
            torch.mm(square, square)


def import_model_code(folder: str) -> None:
    """Import the code of the model in `folder`, as transformers does on first use, so that it counts as an import."""
    import transformers

    from accel.data.pretrained import load_config

    for name in load_config(Path(folder)).architectures or []:
        getattr(transformers, name, None)
