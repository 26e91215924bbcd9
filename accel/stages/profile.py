"""Where the time of a generation goes: ONNX Runtime's profiler over the deployable."""

import json
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from accel.adapters.types import Architecture
from accel.benchmark.backends import deployed
from accel.benchmark.timer import fixed_length_options
from accel.config.schema import Config
from accel.models.generation import AcceleratedModel
from accel.pipeline.stage import Stage, takes
from accel.pipeline.store import Artifact
from accel.system.environment import machine

PROFILE = "profile.json"
PLOT = "operators.png"
SUBGRAPHS = frozenset({"If", "Loop", "Scan"})  # their time includes that of the nodes inside
COPIES = ("MemcpyToHost", "MemcpyFromHost")
HOST = "CPUExecutionProvider"
DECODER, PREFILL, DECODE = "decoder", "prefill", "decode"
PRODUCTS = frozenset({"MatMul", "Gemm", "FusedMatMul", "FusedGemm", "MatMulNBits", "MatMulInteger", "TransposeMatMul"})
WARM_UP = 2  # tokens generated before the measured ones
SUFFIX = "_kernel_time"


@dataclass
class Usage:
    """What one operator or one provider took: different nodes, calls, and seconds of its own."""

    nodes: int = 0
    calls: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Node:
    """A node of the decoder off the device, and how often it ran in a call of the decoder, on average."""

    name: str
    operator: str
    provider: str
    calls: float


@dataclass
class Profile:
    """One generation. `copies` counts copies between host and device; `share` is that of matrix products.

    `off_device`: the decoder's nodes that the CPU executes or that copy, in prefill and in steps, the per-token path;
    most often called first. None where everything runs on the CPU.
    """

    operators: dict[str, Usage] = field(default_factory=dict)
    providers: dict[str, Usage] = field(default_factory=dict)
    placement: dict[str, dict[str, int]] = field(default_factory=dict)
    copies: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COPIES, 0))
    off_device: dict[str, list[Node]] | None = None
    seconds: float = 0.0
    share: float = 0.0


@dataclass(frozen=True)
class Call:
    """One node's run. `own`: seconds, without those of the nodes inside it. `run`: which of the session's, from 0."""

    node: str
    operator: str
    provider: str
    own: float
    run: int = 0


def calls(events: Iterable[Mapping[str, Any]], skipped_runs: int) -> Iterator[Call]:
    """The node calls in a trace of ONNX Runtime's profiler, without those of the session's first `skipped_runs` runs.

    A node with subgraphs is reported with the whole of their time, so what ran inside its interval is taken off.
    """
    ordered = sorted(events, key=lambda event: (event["ts"], -event["dur"]))
    runs = [event["ts"] for event in ordered if event["name"] == "model_run"]
    begin = runs[skipped_runs] if skipped_runs < len(runs) else float("inf")
    nodes = [event for event in ordered if event["cat"] == "Node" and event["name"].endswith(SUFFIX)]
    open_nodes: dict[Any, list[int]] = defaultdict(list)  # thread -> the nodes with subgraphs that are at work
    own = [event["dur"] for event in nodes]  # microseconds
    for index, event in enumerate(nodes):
        stack = open_nodes[event.get("tid")]
        while stack and event["ts"] >= nodes[stack[-1]]["ts"] + nodes[stack[-1]]["dur"]:
            stack.pop()
        if stack:
            own[stack[-1]] -= event["dur"]
        if event["args"]["op_name"] in SUBGRAPHS:
            stack.append(index)
    for event, left in zip(nodes, own, strict=True):
        if event["ts"] >= begin:
            arguments = event["args"]
            name = event["name"].removesuffix(SUFFIX)
            run = bisect_right(runs, event["ts"]) - 1 - skipped_runs
            yield Call(name, arguments["op_name"], arguments["provider"], max(0, left) / 1e6, run)


def off_device(decoder: Iterable[Call]) -> dict[str, list[Node]]:
    """The nodes on the CPU and the copies, in the decoder's first run, which is prefill, and in the others."""
    runs: dict[str, set[int]] = {PREFILL: set(), DECODE: set()}
    counts: dict[str, Counter[tuple[str, str, str]]] = {PREFILL: Counter(), DECODE: Counter()}
    for call in decoder:
        path = PREFILL if call.run == 0 else DECODE
        runs[path].add(call.run)
        if call.provider == HOST or call.operator in COPIES:
            counts[path][call.node, call.operator, call.provider] += 1
    return {
        path: [Node(*node, count / len(runs[path])) for node, count in counts[path].most_common()] for path in counts
    }


def digest(traces: Mapping[str, Sequence[Call]]) -> Profile:
    """Sums over the sessions' calls, operators and providers by falling time."""
    found = Profile()
    operators: dict[str, Usage] = defaultdict(Usage)
    providers: dict[str, Usage] = defaultdict(Usage)
    seen: dict[tuple[str, str, str, str], int] = Counter()
    for session, trace in traces.items():
        for call in trace:
            for usage in (operators[call.operator], providers[call.provider]):
                usage.calls += 1
                usage.seconds += call.own
            seen[session, call.node, call.operator, call.provider] += 1
            found.seconds += call.own
            if call.operator in COPIES:
                found.copies[call.operator] += 1
    for _, _, operator, provider in seen:
        operators[operator].nodes += 1
        providers[provider].nodes += 1
        placed = found.placement.setdefault(provider, {})
        placed[operator] = placed.get(operator, 0) + 1
    found.operators = dict(sorted(operators.items(), key=lambda item: -item[1].seconds))
    found.providers = dict(sorted(providers.items(), key=lambda item: -item[1].seconds))
    if set(providers) - {HOST}:
        found.off_device = off_device(traces.get(DECODER, ()))
    products = sum(usage.seconds for name, usage in operators.items() if name in PRODUCTS)
    found.share = products / found.seconds if found.seconds else 0.0
    return found


@contextmanager
def ranges(model: AcceleratedModel) -> Iterator[None]:
    """Mark encode, prefill and step as NVTX ranges, which NVIDIA's profilers show; only where there is CUDA."""
    if model.device.type != "cuda":
        yield
        return

    def marked(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def inside(*args: Any) -> Any:
            torch.cuda.nvtx.range_push(name)
            try:
                return call(*args)
            finally:
                torch.cuda.nvtx.range_pop()

        return inside

    names = ("encode", "prefill", "decode")
    for name in names:
        setattr(model.runtime, name, marked(name, getattr(model.runtime, name)))
    try:
        yield
    finally:
        for name in names:
            delattr(model.runtime, name)


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Writes `profile.json`, `operators.png`, and each session's trace, which chrome://tracing and Perfetto open."""
    settings, folder = config.profile, inputs["verify"].folder
    generator = torch.Generator().manual_seed(settings.seed)
    given = architecture.sample_inputs(AutoConfig.from_pretrained(folder), 1, settings.source_length, generator)
    model, sessions = deployed(folder, config.runtime, out)
    with model, ranges(model), torch.inference_mode():
        tensors = {name: tensor.to(model.device) for name, tensor in given.items()}
        for new_tokens in (WARM_UP, settings.new_tokens):
            model.generate(**tensors, **fixed_length_options(new_tokens, 1, use_cache=True))
        skipped = {"encoder": 1, DECODER: WARM_UP}
        traces: dict[str, list[Call]] = {}
        for name, session in sessions.items():
            trace = Path(session.session.end_profiling()).rename(out / f"{name}.trace.json")
            traces[name] = list(calls(json.loads(trace.read_text()), skipped[name]))
    found = digest(traces)
    summary = {
        "point": asdict(settings),
        "device": machine(config.runtime.device, config.runtime.threads)["device"],
        **asdict(found),
    }
    if found.off_device is None:
        del summary["off_device"]
    (out / PROFILE).write_text(json.dumps(summary, indent=1))
    _plot(found, settings.top, describe(summary), out / PLOT)
    return summary


def _plot(found: Profile, top: int, title: str, path: Path) -> None:
    from accel.reporting import plots  # imports matplotlib, which nothing else needs

    seconds = {name: usage.seconds for name, usage in list(found.operators.items())[:top]}
    plots.operators(seconds, title, path)


def describe(summary: Mapping[str, Any]) -> str:
    """What was profiled, in words. On CUDA, ONNX Runtime's profiler sees the host launch kernels, not them run."""
    point = summary["point"]
    what = "on the host, launching kernels (not the device's time)" if "off_device" in summary else "in nodes"
    return (
        f"{point['new_tokens']} new tokens, greedy, source length {point['source_length']}, {summary['device']}: "
        f"{1000 * summary['seconds']:.1f} ms {what}, {summary['share']:.0%} of it in matrix products"
    )


STAGE = Stage(
    name="profile",
    run=run,
    inputs=takes("verify"),
    sections=("runtime", "profile"),
    packages=("torch", "transformers", "onnxruntime", "onnxruntime-gpu"),
    machine=True,
)
