"""Profile one greedy generation of the deployable with ONNX Runtime's profiler.

Reads:
    The deployable of `verify`.

Writes:
    `profile.json`: time, calls and nodes by operator and provider; `operators.png`: the slowest operators; and
    `<session>.trace.json` for each session, which chrome://tracing and Perfetto open.
"""

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

from accel.adapters.types import Architecture
from accel.benchmark.backends import open_profiled
from accel.benchmark.timer import fixed_length_options
from accel.config.schema import Config
from accel.data.pretrained import load_config
from accel.models.generation import AcceleratedModel
from accel.pipeline.stage import Stage, takes
from accel.pipeline.store import Artifact
from accel.system.environment import machine

PROFILE = "profile.json"
PLOT = "operators.png"
SUBGRAPHS = frozenset({"If", "Loop", "Scan"})  # the profiler's time for these includes the nodes inside
COPIES = ("MemcpyToHost", "MemcpyFromHost")
HOST = "CPUExecutionProvider"
DECODER, PREFILL, DECODE = "decoder", "prefill", "decode"
PRODUCTS = frozenset({"MatMul", "Gemm", "FusedMatMul", "FusedGemm", "MatMulNBits", "MatMulInteger", "TransposeMatMul"})
WARM_UP = 2  # new tokens of a first generation that is not counted
SUFFIX = "_kernel_time"  # of the profiler's events for nodes


@dataclass
class Usage:
    """Distinct nodes, calls and seconds of one operator or one provider, without the nodes in its subgraphs."""

    nodes: int = 0
    calls: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Node:
    """A decoder node on the CPU, or a copy, in a generation on an accelerator.

    Attributes:
        calls: Average number of runs in one call of the decoder.
    """

    name: str
    operator: str
    provider: str
    calls: float


@dataclass
class Profile:
    """Profile of one generation.

    Attributes:
        operators: Operator -> usage, slowest first.
        providers: Execution provider -> usage, slowest first.
        placement: Execution provider -> operator -> number of nodes.
        copies: Number of copies between host and device, by operator.
        off_device: The decoder's nodes that run on the CPU or copy, in prefill and in decode steps, most often called
            first. None where everything runs on the CPU.
        seconds: Sum over all nodes.
        share: Share of matrix products in `seconds`.
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
    """One run of a node.

    Attributes:
        own: Seconds, without those of the nodes in its subgraphs.
        run: Index of the session's run, from 0, warm-up excluded.
    """

    node: str
    operator: str
    provider: str
    own: float
    run: int = 0


def calls(events: Iterable[Mapping[str, Any]], skipped_runs: int) -> Iterator[Call]:
    """Yield the node calls in a trace of ONNX Runtime's profiler.

    The profiler counts the time of subgraphs for the node that holds them as well, so it is subtracted there.

    Args:
        events: The trace's events, in any order, with times in microseconds.
        skipped_runs: The session's first runs, which are left out.
    """
    ordered = sorted(events, key=lambda event: (event["ts"], -event["dur"]))
    runs = [event["ts"] for event in ordered if event["name"] == "model_run"]
    begin = runs[skipped_runs] if skipped_runs < len(runs) else float("inf")
    nodes = [event for event in ordered if event["cat"] == "Node" and event["name"].endswith(SUFFIX)]
    open_nodes: dict[Any, list[int]] = defaultdict(list)  # thread -> nodes whose subgraphs are running
    own = [event["dur"] for event in nodes]  # microseconds
    for index, event in enumerate(nodes):
        stack = open_nodes[event.get("tid")]
        while stack and event["ts"] >= nodes[stack[-1]]["ts"] + nodes[stack[-1]]["dur"]:
            stack.pop()
        if stack:
            own[stack[-1]] -= event["dur"]
        if event["args"]["op_name"] in SUBGRAPHS:
            stack.append(index)
    for event, microseconds in zip(nodes, own, strict=True):
        if event["ts"] >= begin:
            arguments = event["args"]
            name = event["name"].removesuffix(SUFFIX)
            run = bisect_right(runs, event["ts"]) - 1 - skipped_runs
            yield Call(name, arguments["op_name"], arguments["provider"], max(0, microseconds) / 1e6, run)


def off_device(decoder: Iterable[Call]) -> dict[str, list[Node]]:
    """Return the nodes on the CPU and the copies, for the first run of the decoder (prefill) and for the others.

    Args:
        decoder: The node calls of the decoder's session.
    """
    runs: dict[str, set[int]] = {PREFILL: set(), DECODE: set()}
    counts: dict[str, Counter[tuple[str, str, str]]] = {PREFILL: Counter(), DECODE: Counter()}
    for call in decoder:
        path = PREFILL if call.run == 0 else DECODE
        runs[path].add(call.run)
        if call.provider == HOST or call.operator in COPIES:
            counts[path][call.node, call.operator, call.provider] += 1
    nodes: dict[str, list[Node]] = {}
    for path, counter in counts.items():
        nodes[path] = []
        for (name, operator, provider), count in counter.most_common():
            nodes[path].append(Node(name, operator, provider, count / len(runs[path])))
    return nodes


def digest(traces: Mapping[str, Sequence[Call]]) -> Profile:
    """Aggregate the node calls of all sessions.

    Args:
        traces: Session -> its node calls.

    Returns:
        The profile, operators and providers slowest first.
    """
    profile = Profile()
    operators: dict[str, Usage] = defaultdict(Usage)
    providers: dict[str, Usage] = defaultdict(Usage)
    seen: dict[tuple[str, str, str, str], int] = Counter()
    for session, trace in traces.items():
        for call in trace:
            for usage in (operators[call.operator], providers[call.provider]):
                usage.calls += 1
                usage.seconds += call.own
            seen[session, call.node, call.operator, call.provider] += 1
            profile.seconds += call.own
            if call.operator in COPIES:
                profile.copies[call.operator] += 1
    for _, _, operator, provider in seen:
        operators[operator].nodes += 1
        providers[provider].nodes += 1
        placed = profile.placement.setdefault(provider, {})
        placed[operator] = placed.get(operator, 0) + 1
    profile.operators = dict(sorted(operators.items(), key=lambda item: -item[1].seconds))
    profile.providers = dict(sorted(providers.items(), key=lambda item: -item[1].seconds))
    if set(providers) - {HOST}:
        profile.off_device = off_device(traces.get(DECODER, ()))
    products = sum(usage.seconds for name, usage in operators.items() if name in PRODUCTS)
    profile.share = products / profile.seconds if profile.seconds else 0.0
    return profile


@contextmanager
def nvtx_ranges(model: AcceleratedModel) -> Iterator[None]:
    """Mark the runtime's calls as NVTX ranges, which NVIDIA's profilers show; without CUDA, do nothing."""
    if model.device.type != "cuda":
        yield
        return

    def in_range(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*args: Any) -> Any:
            torch.cuda.nvtx.range_push(name)
            try:
                return method(*args)
            finally:
                torch.cuda.nvtx.range_pop()

        return call

    names = ("encode", "prefill", "decode", "decode_and_select")
    for name in names:
        setattr(model.runtime, name, in_range(name, getattr(model.runtime, name)))
    try:
        yield
    finally:
        for name in names:
            delattr(model.runtime, name)  # the class's own method is visible again


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Write `profile.json`, `operators.png` and the traces. Return the content of `profile.json`."""
    settings, folder = config.profile, inputs["verify"].folder
    generator = torch.Generator().manual_seed(settings.seed)
    sample = architecture.sample_inputs(load_config(folder), 1, settings.source_length, generator)
    model, sessions = open_profiled(folder, config.runtime, out)
    with model, nvtx_ranges(model), torch.inference_mode():
        tensors = {name: tensor.to(model.device) for name, tensor in sample.items()}
        for new_tokens in (WARM_UP, settings.new_tokens):
            model.generate(**tensors, **fixed_length_options(new_tokens, 1, use_cache=True))
        skipped = {"encoder": 1, DECODER: WARM_UP}
        traces: dict[str, list[Call]] = {}
        for name, session in sessions.items():
            trace = Path(session.session.end_profiling()).rename(out / f"{name}.trace.json")
            traces[name] = list(calls(json.loads(trace.read_text()), skipped[name]))
    profile = digest(traces)
    summary = {
        "point": asdict(settings),
        "device": machine(config.runtime.device, config.runtime.threads)["device"],
        **asdict(profile),
    }
    if profile.off_device is None:
        del summary["off_device"]
    (out / PROFILE).write_text(json.dumps(summary, indent=1))
    _plot(profile, settings.top, describe(summary), out / PLOT)
    return summary


def _plot(profile: Profile, top: int, title: str, path: Path) -> None:
    """Plot the `top` slowest operators."""
    from accel.reporting import plots  # imports matplotlib, which nothing else needs

    seconds = {name: usage.seconds for name, usage in list(profile.operators.items())[:top]}
    plots.operators(seconds, title, path)


def describe(summary: Mapping[str, Any]) -> str:
    """Return one line on what was profiled, how long it took, and what the times are.

    On CUDA, ONNX Runtime's profiler times kernel launches on the host, not the kernels.
    """
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
