"""End-to-end runs on a GPU: native counterparts of the CPU's tests, CUDA graphs, streams and device memory."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import T5ForConditionalGeneration

from accel import testing
from accel.errors import DeviceMemoryError, VerificationError
from accel.models.generation import AcceleratedModel
from accel.models.loading import load, open_model, verification_of
from accel.runtime.cuda_graph import CudaGraphCallable
from accel.runtime.dlpack import run_with_cupy, run_with_dlpack
from accel.runtime.token_graph import MAX_TOKEN_GRAPHS, TokenGraph
from accel.serve.scheduling.limits import SchedulerLimits
from accel.serve.scheduling.opening import open_scheduler
from accel.serve.scheduling.row_scheduler import RowScheduler
from accel.testing.row_checks import rows_alone
from tests.conftest import Build
from tests.families import FAMILIES
from tests.integration.test_precision import REFERENCES, breaking  # noqa: F401  (a fixture)
from tests.serve.collector import UNIQUE, alone, submit

pytestmark = pytest.mark.gpu

CUDA = ("runtime=cuda",)
KINDS = ("bart", "whisper", "gpt2", "bloom", "llama", "mixtral")  # one per kind of input, cache, position and layer
SAME = dict.fromkeys(("greedy", "beams", "sampling", "padded"), 1.0)


@pytest.fixture(scope="module")
def folder(build: Build, tiny: Path) -> Path:
    """The tiny T5 in FP32, verified on the GPU."""
    return build(tiny, "verify", (*CUDA, "precision=fp32"))[1]["verify"].folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[AcceleratedModel]:
    with load(folder, runtime="cuda") as opened:
        yield opened


@pytest.fixture(scope="module")
def eager(tiny: Path) -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration.from_pretrained(tiny).eval().cuda()


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 120, (3, 13), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return {"input_ids": ids.cuda(), "attention_mask": mask.cuda()}


def test_fp32_is_pytorchs(folder: Path) -> None:
    """Every output and every decoding method agrees, with both models on the GPU."""
    verification = verification_of(folder)
    assert verification is not None
    assert (verification["runtime"], verification["execution"], verification["identical"]) == ("cuda", "native", SAME)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
        {"do_sample": True, "top_k": 0},
        {"do_sample": True, "num_beams": 3},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=["greedy", "beams", "sampling", "beam-sample", "prompt lookup"],
)
@pytest.mark.parametrize("tensor_exchange", [run_with_dlpack, run_with_cupy])
def test_decoding_methods(
    model: AcceleratedModel, eager: T5ForConditionalGeneration, options: dict[str, object], tensor_exchange: object
) -> None:
    """Tokens are PyTorch's with either tensor exchange."""
    given = inputs()
    if "prompt_lookup_num_tokens" in options:
        given = {name: tensor[:1] for name, tensor in given.items()}
    settings = {"max_new_tokens": 17, "no_repeat_ngram_size": 1, **options}
    model.runtime.decoder.tensor_exchange = model.runtime.encoder.tensor_exchange = tensor_exchange
    found = []
    for subject in (eager, model):
        torch.manual_seed(5)
        found.append(subject.generate(**given, **settings))
    assert len(set(found[0].flatten().tolist())) > 12
    assert torch.equal(*found)


def test_fp16_is_native(build: Build, tiny: Path) -> None:
    """Audit, conversion and verification run on the GPU, natively in FP16."""
    verification = verification_of(build(tiny, "verify", (*CUDA, "precision=fp16"))[1]["verify"].folder)
    assert verification is not None
    assert (verification["precision"], verification["execution"]) == ("float16", "native")
    assert verification["passed"]
    assert verification["identical"]["greedy"] == 1


@pytest.mark.parametrize("plan", ["minimized", "rules"])
def test_precision_plan_gives_the_tokens_of_fp32(build: Build, breaking: Path, plan: str) -> None:  # noqa: F811
    """The T5 that FP16 breaks, computed natively: 200 inputs, greedy and with beams."""
    overrides = (*REFERENCES, *CUDA, "verify.inputs=200", f"precision.plan={plan}")
    summary = build(breaking, "verify", overrides)[1]["verify"].summary
    assert summary["execution"] == "native"
    assert summary["identical"]["greedy"] == summary["identical"]["beams"] == 1.0


def test_blanket_fp16_fails_verification(build: Build, breaking: Path) -> None:  # noqa: F811
    with pytest.raises(VerificationError, match=r"verification of the bundle failed \(float16, native\)"):
        build(breaking, "verify", (*REFERENCES, *CUDA, "precision.plan=blanket"))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_latency_is_measured_beside_pytorchs(build: Build, precision: str) -> None:
    """The embedded model in both 16-bit formats, computed natively, with its tokens, latency and memory."""
    overrides = (*CUDA, f"precision={precision}", "model.references=heldout.tsv", "verify.unique_tokens=false")
    summary = build("accel://t5-g2p", "verify", (*overrides, "verify.latency=true"))[1]["verify"].summary
    assert summary["execution"] == "native"
    assert min(summary["identical"][name] for name in ("greedy", "beams", "padded")) >= 0.75
    assert summary["speed"]["compute_dtype"] == {"fp16": "float16", "bf16": "bfloat16"}[precision]
    assert all(figures["peak_memory"] > 0 for figures in summary["speed"]["backends"].values())


def test_no_copies_between_host_and_device(build: Build, tiny: Path) -> None:
    """The graphs copy nothing between host and device, and compute nothing but lengths on the CPU."""
    summary = build(tiny, "profile", (*CUDA, "precision=fp16"))[1]["profile"].summary
    assert summary["copies"] == {"MemcpyToHost": 0, "MemcpyFromHost": 0}
    for nodes in summary["off_device"].values():
        assert {node["operator"] for node in nodes} <= {"Gather", "Concat", "Add", "Equal"}


def test_length_that_is_copied_to_the_device(build: Build, tiny: Path) -> None:
    """A graph that copies a value to the device in every decode step gives the same tokens."""
    plain = (*CUDA, "precision=fp32", "optimize.passes.shift_ranges=false", "convert.fuse_attention=[]")
    _, artifacts = build(tiny, "[verify,profile]", plain)
    assert artifacts["profile"].summary["copies"]["MemcpyFromHost"] > 0
    verification = verification_of(artifacts["verify"].folder)
    assert verification is not None
    assert verification["identical"] == SAME


def test_out_of_memory_leaves_the_model_usable(build: Build, tiny: Path, folder: Path) -> None:
    """A generation that doesn't fit raises one error, and a later one that fits gives the same tokens as before."""
    config, _ = build(tiny, "verify", (*CUDA, "precision=fp32"))
    config.runtime.provider_options["gpu_mem_limit"] = 64 << 20  # bytes
    settings = {"max_new_tokens": 17, "no_repeat_ngram_size": 1}
    with open_model(folder, config.runtime) as small:
        before = small.generate(**inputs(), **settings)
        wide = {name: tensor.repeat(2000, 1) for name, tensor in inputs().items()}
        with pytest.raises(DeviceMemoryError, match="num_beams"):
            small.generate(**wide, **settings)
        assert torch.equal(small.generate(**inputs(), **settings), before)


def test_generation_frees_its_caches(model: AcceleratedModel) -> None:
    """Repeated generations leave the same amount of device memory free."""
    free_memory = []
    for _ in range(4):
        model.generate(**inputs(), max_new_tokens=30, min_new_tokens=30, num_beams=4)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free_memory.append(torch.cuda.mem_get_info()[0])
    assert free_memory[1:] == free_memory[:1] * 3


def test_the_callers_stream_is_left_alone(model: AcceleratedModel, eager: T5ForConditionalGeneration) -> None:
    """`generate` decodes on its own stream, waits for inputs that the caller's still writes, and syncs the result."""
    given = inputs()
    expected = eager.generate(**given, max_new_tokens=9, no_repeat_ngram_size=1)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(given["input_ids"])
        torch.cuda._sleep(50_000_000)
        late.copy_(given["input_ids"])
        found = model.generate(late, attention_mask=given["attention_mask"], max_new_tokens=9, no_repeat_ngram_size=1)
        assert torch.cuda.current_stream() == stream
        assert torch.equal(found, expected)


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest, shared: Path, artifacts: Path) -> Iterator[testing.Subject]:
    """The tiny model of one family, verified natively on the GPU in FP32 and FP16."""
    folder = shared / "families" / request.param
    folder.mkdir(parents=True, exist_ok=True)
    with testing.prepare(FAMILIES[request.param], folder, artifacts=artifacts, runtime="cuda") as subject:
        yield subject


@pytest.mark.parametrize("check", testing.CHECKS, ids=testing.name)
@pytest.mark.parametrize("family", KINDS, indirect=True, scope="module")
def test_conformance_on_the_gpu(check: testing.Check, family: testing.Subject) -> None:
    """One family of each kind of input, cache and position passes the checks that all families pass on the CPU."""
    check(family)


@pytest.mark.parametrize("family", ["t5", "bart", "gpt2", "gemma2"], indirect=True, scope="module")
def test_requests_of_a_server(family: testing.Subject) -> None:
    """Steps launched ahead, prompts in padded batches, first tokens by a step: greedy tokens of each request alone."""
    assert family.static is not None
    scheduler = open_scheduler(family.static, SchedulerLimits(rows=8, prompt_tokens=40, total_tokens=60))
    assert isinstance(scheduler, RowScheduler)
    assert scheduler.runs_ahead
    assert scheduler._prompts.begins_with_step is family.has_encoder
    scheduler.warm_up()
    device = family.static.device
    work = [(family.ids(1, 2 + seed % 19, seed=seed).to(device), 3 + 7 * seed % 20) for seed in range(40)]
    options: list[dict[str, Any]] = [{"max_new_tokens": new} | (UNIQUE if new % 3 == 0 else {}) for _, new in work]
    expected = [alone(family.static, ids, **each) for (ids, _), each in zip(work, options, strict=True)]
    found = [submit(scheduler, ids.cpu(), **each) for (ids, _), each in zip(work, options, strict=True)]
    assert [each.tokens() for each in found] == expected
    scheduler.close()


@pytest.mark.parametrize("family", ["t5", "umt5", "mistral", "gemma2", "falcon-alibi"], indirect=True, scope="module")
def test_rows_at_different_positions(family: testing.Subject) -> None:
    """Captured, one replaced midway, for what those of `KINDS` don't have: biases by distance, windows, ALiBi."""
    rows_alone(family)
    assert family.static is not None
    with family.static.rows(capacity=3, max_length=24, source_length=16) as rows:  # the same buffers
        assert isinstance(rows.cache._buffers.run_decode, CudaGraphCallable)
        assert rows.cache._buffers.run_decode.captured


@pytest.mark.parametrize("family", [kind for kind in KINDS if kind != "mixtral"], indirect=True, scope="module")
def test_replay_copies_nothing_from_the_host(family: testing.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Host memory that was copied during the capture may hold other values when the graph is replayed."""
    assert family.static is not None
    runtime: Any = family.static.runtime
    monkeypatch.setattr(runtime, "capture_batch_sizes", [2])
    runtime.prepare()
    buffers = runtime.spare_buffers[-1][1]
    assert buffers.run_decode.captured
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        buffers.run()
        torch.cuda.synchronize()
    names = [event.name for event in profiler.events()]
    assert len(names) > 20, names
    assert not [name for name in names if "HtoD" in name]


@pytest.fixture(scope="module")
def captured(build: Build, tiny: Path) -> Iterator[AcceleratedModel]:
    """The tiny T5 with static caches and captured decode steps, verified with them."""
    folder = build(tiny, "verify", ("runtime=cuda-graph", "precision=fp32"))[1]["verify"].folder
    with load(folder, runtime="cuda-graph") as opened:
        yield opened


ON_THE_HOST = {"no_repeat_ngram_size", "repetition_penalty", "prompt_lookup_num_tokens"}


def token_graphs(model: AcceleratedModel) -> list[TokenGraph]:
    """Return the graphs that are kept with spare buffers and that more than one generation used."""
    runtime: Any = model.runtime
    graphs = [graph for _, buffers in runtime.spare_buffers for graph in buffers.token_graphs.values()]
    return [graph for graph in graphs if graph._generations > 1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
        {"do_sample": True, "top_k": 0, "temperature": 1.3, "top_p": 0.9},
        {"do_sample": True, "num_beams": 3},
        {"prompt_lookup_num_tokens": 2},
        {"min_new_tokens": 80, "max_new_tokens": 90},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 0},
        {"no_repeat_ngram_size": 0, "num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
        {"no_repeat_ngram_size": 0, "num_beams": 3, "min_new_tokens": 80, "max_new_tokens": 90},
        {"no_repeat_ngram_size": 0, "num_beams": 3, "do_sample": True},
    ],
    ids=[
        *("greedy", "beams", "sampling", "beam-sample", "prompt lookup", "buckets", "processor"),
        *("greedy, whole tokens", "beams, whole tokens", "beams, buckets", "beam-sample, whole tokens"),
    ],
)
def test_captured_steps_give_the_same_tokens(
    captured: AcceleratedModel, eager: T5ForConditionalGeneration, options: dict[str, object]
) -> None:
    """Generations are PyTorch's: later ones reuse the first one's buffers and graphs, then replay whole tokens."""
    given = inputs()
    if "prompt_lookup_num_tokens" in options:
        given = {name: tensor[:1] for name, tensor in given.items()}
    settings = {"max_new_tokens": 17, "no_repeat_ngram_size": 1, **options}
    if "top_p" in options or "min_new_tokens" in options:
        del settings["no_repeat_ngram_size"]  # so that token selection is captured as well
    found = []
    for subject in (eager, captured, captured, captured):
        torch.manual_seed(5)
        found.append(subject.generate(**given, **settings))
    assert all(torch.equal(found[0], each) for each in found[1:])
    runtime: Any = captured.runtime
    assert all(buffers.run_decode.captured for _, buffers in runtime.spare_buffers)
    if not any(settings.get(name) for name in ON_THE_HOST):
        assert all(graph.token.captured for graph in token_graphs(captured))
        assert token_graphs(captured)
    assert any(buffers.run_cross.captured for _, buffers in runtime.spare_buffers)
    assert any(entry.run.captured for entry in runtime.captured_encoder.graphs.values())


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "top_k": 9, "temperature": 1.3, "top_p": 0.9, "min_p": 0.01}, {"num_beams": 4}],
    ids=["greedy", "sampling", "beams"],
)
def test_one_launch_a_token(captured: AcceleratedModel, options: dict[str, object]) -> None:
    """A longer generation of a method that recurs takes one more launch, and one more copy of a flag, per token.

    Before a graph that draws random numbers, torch writes the generator's seed and offset, by a kernel each.
    """
    counts = []
    for length in (50, 50, 50, 20, 40):
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            captured.generate(**inputs(), max_new_tokens=length, min_new_tokens=length, **options)
            torch.cuda.synchronize()
        counts.append(Counter(event.name for event in profiler.events()))
    short, long = counts[-2:]
    assert long["cudaGraphLaunch"] - short["cudaGraphLaunch"] == 20
    of_generator = 2 * 20 if options.get("do_sample") else 0
    assert long["cudaLaunchKernel"] - short["cudaLaunchKernel"] == of_generator
    from_host = [sum(each[name] for name in each if "HtoD" in name) for each in (short, long)]
    to_host = [sum(each[name] for name in each if "DtoH" in name) for each in (short, long)]
    assert from_host[0] == from_host[1]
    assert to_host[1] - to_host[0] == 20
    assert long["cudaStreamSynchronize"] == short["cudaStreamSynchronize"]


def test_other_lengths_replay_the_same_graphs(captured: AcceleratedModel, eager: T5ForConditionalGeneration) -> None:
    """Least lengths and end ids change between replays; the random numbers are those of the seed of each generation."""
    seen = []
    for number, least in enumerate((5, 5, 9, 1, 14)):
        options = {"max_new_tokens": 14 + number, "min_new_tokens": least, "do_sample": True, "top_k": 30}
        found = []
        for subject in (eager, captured):
            torch.manual_seed(number)
            found.append(subject.generate(**inputs(), **options, eos_token_id=[30 + number, 60]))
        assert torch.equal(*found)
        seen.append(len(token_graphs(captured)))
    assert seen[1:] == seen[1:2] * 4


def test_token_graphs_are_limited(captured: AcceleratedModel) -> None:
    """Methods that don't recur are not captured, and the device memory they take is limited."""
    runtime: Any = captured.runtime
    runtime.spare_buffers.clear()
    used = []
    for number in range(1, 13):
        captured.generate(**inputs(), max_new_tokens=9, do_sample=True, temperature=1 + number / 10)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        used.append(torch.cuda.mem_get_info()[0])
    ((_, buffers),) = runtime.spare_buffers
    assert len(buffers.token_graphs) == MAX_TOKEN_GRAPHS
    assert not any(graph.token.captured for graph in buffers.token_graphs.values())
    assert used[MAX_TOKEN_GRAPHS + 2 :] == used[-1:] * len(used[MAX_TOKEN_GRAPHS + 2 :])


def test_bucket_that_does_not_fit_into_device_memory(
    captured: AcceleratedModel, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning gives the size, and the model remains usable."""
    captured.generate(**inputs(), max_new_tokens=5)
    runtime: Any = captured.runtime
    assert runtime.take_buffers(50_000_000, 64, {}) is None
    assert "a static cache for 50000000 sequences of 64 tokens needs" in caplog.text
    captured.generate(**inputs(), max_new_tokens=5)
