"""Memory of one setup in a process of its own.

Nothing is left over from another setup, and what the imports take is not counted. Sessions are measured without
importing transformers, which takes longer than the measurement.

On CUDA every figure is the device's memory in use, as its driver counts it, after minus before. That is all the process
took: weights, caches, the arenas of PyTorch and of ONNX Runtime, which give nothing back and so still hold their
peak, workspaces, captured graphs and loaded kernels. PyTorch's own counters know nothing of ONNX Runtime, so they can't
compare the two. CUDA's context and PyTorch's cuBLAS, hundreds of megabytes that any program takes, count as imports.
The device's counter sees other processes too, so these must be at rest, and ours run one at a time.
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
from accel.runtime import layout
from accel.runtime.decoder_inputs import decoder_inputs
from accel.runtime.dynamic_cache import DynamicCacheRuntime, DynamicCacheState
from accel.runtime.io_binding import BoundSession
from accel.runtime.session import SessionSettings, open_session
from accel.runtime.static_cache import open_static
from accel.system.host_memory import PeakMemory, release, resident

PEAK, SESSION = "peak", "session"
AT_THE_END = "at the end"  # what sessions hold after all tokens of the setting
DECODE_ALONE, SEPARATE, CAPTURED = "decode alone", "onnx_two_files", "onnx_captured"
PREFILL_FILE, DECODE_FILE = "prefill.onnx", "decode.onnx"
STEPS = 4  # decoder calls after which a session holds what it will hold


@dataclass(frozen=True)
class Task:
    """What one process measures of setup `name`, by `kind`.

    `peak`: the peak over loading and one generation. `session`: what the decoder's sessions hold, by when. `options`:
    those of `generate`.
    """

    kind: str
    name: str
    sources: Mapping[str, Any]
    batch_size: int
    source_length: int
    inputs: str  # file of tensors, [batch_size, source_length, ...]
    options: Mapping[str, Any]


def measure_all(tasks: Sequence[Task], weight_bytes: int) -> list[Any]:
    """What each task's process found. Bytes are what it added to what it held after its imports."""
    with ThreadPoolExecutor(at_once(tasks, weight_bytes)) as pool:
        return list(progress.track(pool.map(_in_fresh_process, tasks), "memory", total=len(tasks)))


def at_once(tasks: Sequence[Task], weight_bytes: int) -> int:
    """Processes that may run together: as many as memory allows; a GPU's counter allows one."""
    if any(_device(task).type == "cuda" for task in tasks):
        return 1
    room = psutil.virtual_memory().available // (8 * weight_bytes + 2**30)
    return int(max(1, min(os.cpu_count() or 1, room)))


def _device(task: Task) -> torch.device:
    return torch.device(task.sources["runtime"]["device"])


def _in_fresh_process(task: Task) -> Any:
    with WorkerProcess(task.name) as process:
        return process.call(_measure, task)


def _measure(task: Task) -> Any:
    """What the process is for. Raises `AccelError` where it fails: other errors may not survive pickling."""
    onnxruntime.set_default_logger_severity(3)
    if threads := task.sources["runtime"]["threads"]:
        torch.set_num_threads(threads)
    try:
        return {PEAK: peak_memory, SESSION: session_memory}[task.kind](task)
    except AccelError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise AccelError(f"the process that measures {task.name!r} failed: {reason}") from None


def held(device: torch.device) -> int:
    """Bytes in use: of a GPU, everything on it; on the CPU, this process's."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        free, total = torch.cuda.mem_get_info(device)
        return int(total - free)
    release()
    return resident()


def session_memory(task: Task) -> dict[str, int]:
    """Bytes held after opening the decoder's sessions, one prefill (where there is one) and a few steps, and after
    `max_new_tokens` of them: the memory that caches passed through stays a session's.
    """
    device = _device(task)
    prepare(device)
    if task.name == CAPTURED:
        return {SESSION: _captured_memory(task, device)}
    before = held(device)
    runtime, prefill, decode = _decoder(task, device)
    rows = task.batch_size * int(task.options["num_beams"])
    lengths = {"batch": rows, "source": task.source_length, "past": 1}
    ids = torch.ones(rows, 1, dtype=torch.int64, device=device)

    def held_after(length: int) -> int:
        context = _ones(prefill, runtime.constants, lengths) | _ones(decode, runtime.constants, lengths)
        if task.name == DECODE_ALONE:
            state = DynamicCacheState(_ones(decode, runtime.self_cache, lengths), context, runtime.axes)
        else:
            _, state = runtime.prefill(decoder_inputs(ids, ids) | context)
        while state.length < length:
            runtime.decode(decoder_inputs(ids, ids.expand(rows, state.length + 1)), state)
        del context, state
        return max(0, held(device) - before)

    return {SESSION: held_after(1 + STEPS), AT_THE_END: held_after(int(task.options["max_new_tokens"]))}


def _captured_memory(task: Task, device: torch.device) -> int:
    """Bytes held by prefill's session and by steps captured in the two smallest buckets, their caches left out."""
    config = RuntimeConfig(**task.sources["runtime"])
    rows, folder = task.batch_size * int(task.options["num_beams"]), Path(task.sources["deployable"])
    before = held(device)
    buckets = sorted(config.buckets)[:2]
    how = SessionSettings.of(config)
    runtime = open_static(
        folder,
        how,
        config.device,
        buckets,
        session=config.static_session,
        environment=config.static_environment,
        capture=True,
        batches=[rows],
        with_encoder=False,
    )
    runtime.prepare(task.source_length)
    lengths = {"batch": rows, "source": task.source_length}
    ids = torch.ones(rows, 1, dtype=torch.int64, device=device)
    _, state = runtime.prefill(
        decoder_inputs(ids, ids) | _ones(runtime.dynamic.decoder, runtime.dynamic.constants, lengths)
    )
    for _ in range(STEPS):
        runtime.decode(decoder_inputs(ids, ids.expand(rows, state.length + 1)), state)
    caches = sum(runtime.bytes(rows, bucket) for bucket in buckets)
    return max(0, held(device) - before - caches)


def _decoder(task: Task, device: torch.device) -> tuple[DynamicCacheRuntime, BoundSession, BoundSession]:
    """A decoder without its encoder, and the sessions of its prefill and its step."""
    how = SessionSettings.of(RuntimeConfig(**task.sources["runtime"]))
    graphs = Path(task.sources["graphs"])
    flag = None
    if task.name == DECODE_ALONE:
        prefill = decode = BoundSession(open_session(graphs / DECODE_FILE, how), device)
    elif task.name == SEPARATE:
        prefill, decode = (
            BoundSession(open_session(graphs / file, how), device) for file in (PREFILL_FILE, DECODE_FILE)
        )
    else:
        prefill = decode = BoundSession(open_session(Path(task.sources["deployable"]) / layout.DECODER, how), device)
        flag = decode.session.get_modelmeta().custom_metadata_map[layout.FLAG]
    return DynamicCacheRuntime(None, prefill, decode, task.sources["cache"], flag), prefill, decode


def _ones(session: BoundSession, names: Collection[str], lengths: Mapping[str, int]) -> dict[str, Tensor]:
    """Ones for the inputs `names` that the session has, their dynamic axes as `lengths` says."""
    return {
        name: torch.ones(
            [dim if isinstance(dim, int) else lengths[dim] for dim in spec.shape],
            dtype=session.dtype(name),
            device=session.device,
        )
        for name, spec in session.inputs.items()
        if name in names
    }


def peak_memory(task: Task) -> int:
    """Bytes by which the peak rose above what the imports hold, over loading and one generation."""
    from accel.benchmark import backends

    sources, backend = backends.Sources.parse(task.sources), backends.BACKENDS[task.name]
    device = _device(task)
    _import_model(Path(sources.checkpoint))
    prepare(device)
    before = held(device)
    with PeakMemory() as used, backends.opened(backend.engine, sources) as model:
        inputs = {name: tensor.to(device) for name, tensor in load_file(task.inputs).items()}
        with backend.context():
            model.generate(**inputs, **task.options)
        after = held(device) if device.type == "cuda" else 0
    return used.added if device.type == "cpu" else after - before


def prepare(device: torch.device) -> None:
    """Let CUDA set itself up: the context, and cuBLAS with its workspace, which the first matrix product makes."""
    if device.type == "cuda":
        for dtype in (torch.float32, torch.float16):
            square = torch.ones(64, 64, dtype=dtype, device=device)
            torch.mm(square, square)


def _import_model(folder: Path) -> None:
    """Transformers imports a model's code when it is first used; here that belongs to the imports."""
    import transformers

    for name in transformers.AutoConfig.from_pretrained(folder).architectures or []:
        getattr(transformers, name, None)
