"""Proves a candidate against PyTorch: outputs, logits along a path, tokens. A deployable is what passed."""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from accel import certificate, console, metrics, speed, texts
from accel.adapter import Architecture, Role
from accel.artifacts import MANIFEST, Artifact
from accel.compare import Difference, difference, visible
from accel.errors import Refused
from accel.generation import AcceleratedModel
from accel.graph import files
from accel.graph.emulate import emulate_half
from accel.graph.formats import FORMATS, Format
from accel.loading import open_model
from accel.runtime import layout
from accel.runtime.feeds import decoder_feeds
from accel.runtime.stream import on_shared_stream
from accel.schema import Config
from accel.stages import Stage, audit, ranges, reference
from accel.stages.checkpoint import reference_files

GATED = ("greedy", "beams", "padded")  # sampling draws another token at the least difference
LEAST = 0.5  # of the sequences, where `verify.min_token_agreement` is null and the graph in 16 bits
# Near a tie, rounding lets a router pick other experts: logits jump there, and at the tokens that attend to it. In 16
# bits this share of a path may; what is wrong everywhere, as a stale cache is, shows in the other half.
REROUTED = 0.5
SHOWN = 20  # differing sequences that a verdict holds


def threshold(dtype: str, layers: int) -> float:
    """The largest difference allowed, relative to an output's largest value.

    Rounding errors of independent operations add up like a random walk, so with the square root of the depth; an
    operation of a layer may lose a few units in the last place, which the factors allow for.
    """
    return float((64 if dtype == "float32" else 16) * FORMATS[dtype].step * max(1, layers) ** 0.5)


def least_agreement(config: Config) -> float:
    """The share of sequences that must be PyTorch's: all in FP32; random weights decide by rounding in 16 bits."""
    given = config.verify.min_token_agreement
    if given is not None:
        return given
    if config.precision.dtype == "float32":
        return 1.0
    return 0.0 if config.model.weights == "random" else LEAST


@dataclass
class Drift:
    """Absolute difference of the logits by token of a path: over the vocabulary and all paths that are this long."""

    mean: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    worst: list[float] = field(default_factory=list)
    scale: float = 0.0  # largest logit of PyTorch's


@dataclass
class Verdict:
    """What `verify` found. Written into the deployable as `verdict.json`."""

    passed: bool = False
    precision: str = "float32"
    arithmetic: str = "native"
    runtime: str = "cpu"
    threshold: float = 0.0
    outputs: dict[str, Difference] = field(default_factory=dict)
    drift: Drift = field(default_factory=Drift)
    inputs: int = 0
    identical: dict[str, float] = field(default_factory=dict)
    first_difference: dict[str, int] = field(default_factory=dict)
    differing: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    references: int = 0
    samples: list[dict[str, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def compare_outputs(
    model: AcceleratedModel, architecture: Architecture, expected: Path, verdict: Verdict, seed: int
) -> bool:
    """Run every role at the reference's shapes through the runtime: both branches, every output.

    Whether outputs have the right shapes and are finite, so that it makes sense to generate.
    """
    sound = True
    step = architecture.signature(model.config, Role.STEP)
    cache, growing = step.cache, {port.name for port in step.outputs}
    hidden: dict[str, Tensor] = {}
    state = None
    for number, role, given in reference.role_calls(architecture, model.config, seed):
        known = _outputs_of(role, load_file(expected / reference.OUTPUTS.format(number)))
        if role is Role.ENCODER:
            found = dict(model.runtime.encode(given))
            hidden = _context(architecture, model, {**given, **known})
        else:
            if role is Role.PREFILL:
                logits, state = model.runtime.prefill({**given, **hidden})
            elif state is not None:
                logits = model.runtime.step(given, state)
            views = state.views() if state is not None else {}
            found = {"logits": logits} | {output: views[name] for name, output in cache.items()}
        for name, value in known.items():
            seen = visible(role, name, given, value, growing)
            sound = _measure(verdict, f"{role}.{name}", found[name], value, seen) and sound
    return sound


def compare_paths(
    model: AcceleratedModel,
    architecture: Architecture,
    inputs: Sequence[Mapping[str, Tensor]],
    expected: Path,
    verdict: Verdict,
    rerouted: float = 0.0,
) -> bool:
    """Walk along what PyTorch said, token by token over growing caches, and compare the logits at every token.

    `rerouted`: the share of a path's tokens, the furthest off, that are left out: see `REROUTED`.

    Nothing waits for a result in between, so that on a GPU what would overtake something else does. Whether all are
    finite.
    """
    sound = True
    apart: list[Tensor] = []
    for number, given in enumerate(inputs[: reference.PATHS]):
        known = load_file(expected / reference.PATH.format(number))
        hidden = _encoded(architecture, model, given)
        ids = known["ids"].to(model.device)  # [1, tokens]
        seen = torch.ones_like(ids)
        calls = [decoder_feeds(ids[:, [i]], seen[:, : i + 1]) for i in range(ids.shape[1])]
        with on_shared_stream(model.device):  # as `generate` does
            logits, state = model.runtime.prefill({**calls[0], **hidden})
            found = torch.cat([logits, *(model.runtime.step(feeds, state) for feeds in calls[1:])], dim=1)
        apart.append((found.cpu().float() - known["logits"]).abs()[0])  # [tokens, vocabulary]
        order = apart[-1].amax(-1).argsort(descending=True)
        counted = torch.ones(1, len(order), 1)
        counted[:, order[: int(rerouted * len(order))]] = 0
        sound = _measure(verdict, "path.logits", found, known["logits"], counted) and sound
        verdict.drift.scale = max(verdict.drift.scale, float(known["logits"].abs().max()))
    for position in range(max(map(len, apart))):
        here = torch.cat([path[position] for path in apart if position < len(path)]).sort().values
        verdict.drift.mean.append(float(here.mean()))
        verdict.drift.p99.append(float(here[int(0.99 * (len(here) - 1))]))
        verdict.drift.worst.append(float(here[-1]))
    return sound


def _outputs_of(role: Role, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{role}."): value for name, value in tensors.items() if name.startswith(f"{role}.")}


def _encoded(architecture: Architecture, model: AcceleratedModel, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's inputs that come from the encoder, for inputs `given`; none without an encoder."""
    if Role.ENCODER not in architecture.roles():
        return {}
    return _context(architecture, model, {**given, **model.runtime.encode(given)})


def _context(architecture: Architecture, model: AcceleratedModel, pool: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's inputs that come from the encoder's inputs and outputs, which are in `pool`."""
    ports = architecture.signature(model.config, Role.PREFILL).inputs
    return {port.name: pool[port.source] for port in ports if port.source}


def _measure(verdict: Verdict, name: str, found: Tensor, expected: Tensor, seen: Tensor | None = None) -> bool:
    """Note how far an output is off. Whether it can be compared at all."""
    if found.shape != expected.shape:
        verdict.failures.append(f"{name} has shape {tuple(found.shape)}, PyTorch gives {tuple(expected.shape)}")
        return False
    apart = difference(found, expected, seen)
    verdict.outputs.setdefault(name, Difference()).widen(apart)
    if not apart.relative <= verdict.threshold:
        verdict.failures.append(
            f"{name} is off by {apart.relative:.1e} of its largest value, allowed {verdict.threshold:.1e}"
        )
    return isfinite(apart.absolute)


def compare_tokens(
    model: AcceleratedModel,
    folder: Path,
    config: Config,
    inputs: Sequence[Mapping[str, Tensor]],
    expected: Any,
    verdict: Verdict,
) -> None:
    """Generate for the reference's inputs under every case, and count the sequences that are the same."""
    compared, verdict.inputs = reference.cases(config), len(inputs)
    tokenizer = texts.load_tokenizer(folder) if expected["texts"] else None

    def readable(ids: Sequence[int]) -> str:
        return (
            " ".join(map(str, ids)) if tokenizer is None else str(tokenizer.decode(list(ids), skip_special_tokens=True))
        )

    for name, options in console.track(list(compared.items()), "tokens"):
        right = expected["tokens"][name]
        try:
            found = reference.decode_case(model, name, options, inputs, config.verify)
        except RuntimeError as error:  # torch refuses to sample from what is not finite
            verdict.failures.append(f"{name}: {str(error).splitlines()[0]}")
            verdict.identical[name] = 0.0
            continue
        verdict.identical[name] = sum(map(list.__eq__, found, right)) / len(right)
        for number, (ours, theirs) in enumerate(zip(found, right, strict=True)):
            if ours == theirs:
                continue
            pairs = enumerate(zip(ours, theirs, strict=False))
            position = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
            verdict.first_difference[f"{name}.{number}"] = position
            if name in GATED and len(verdict.differing) < SHOWN:
                given = expected["texts"][number] if expected["texts"] else f"input {number}"
                said = {"pytorch": readable(theirs), "ours": readable(ours)}
                verdict.differing.append({"case": name, "input": given, "position": position, **said})
        if name == "greedy" and expected["texts"]:
            verdict.samples = [
                {"input": line, "pytorch": readable(theirs), "ours": readable(ours)}
                for line, theirs, ours in zip(expected["texts"], right, found, strict=True)
            ]


def compare_references(
    model: AcceleratedModel, folder: Path, config: Config, expected: list[str], verdict: Verdict
) -> None:
    """The metrics on the references, PyTorch's beside ours."""
    known = reference.references(config, folder)
    tokenizer = texts.load_tokenizer(folder)
    if known is None or not known.accepted or tokenizer is None:
        return
    known = known.first(config.verify.references)
    found = reference.decode_texts(model, tokenizer, known.texts, batch_size=50)
    verdict.references = len(known.texts)
    names = config.verify.metrics
    verdict.metrics = {
        side: metrics.scores(names, outputs, known.accepted)
        for side, outputs in (("pytorch", expected), ("ours", found))
    }


def judge(config: Config, verdict: Verdict) -> None:
    """Add what `verify.min_token_agreement` and `verify.max_metric_loss` refuse to the failures."""
    least = least_agreement(config)
    below = {name: verdict.identical[name] for name in GATED if verdict.identical[name] < least}
    if below:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in verdict.identical.items())
        verdict.failures.append(f"sequences that are PyTorch's: {shares}; at least {least:.1%} must be, sampling aside")
    for name, theirs in verdict.metrics.get("pytorch", {}).items():
        ours = verdict.metrics["ours"][name]
        if metrics.METRICS[name].loss(ours, theirs) > config.verify.max_metric_loss:
            verdict.failures.append(
                f"{name} is {ours:.2f}%, PyTorch's {theirs:.2f}%; at most verify.max_metric_loss="
                f"{config.verify.max_metric_loss} points may be lost"
            )
    if verdict.failures:
        verdict.failures += [
            f"{each['case']}, {each['input'][:60]!r}: token {each['position']} is the first to differ"
            for each in verdict.differing[:3]
        ]


def advice(config: Config) -> str:
    """What to try with a candidate that was refused."""
    if config.precision.dtype == "float32":
        return "FP32 must say what PyTorch says: this is a defect of an adapter or of a graph pass"
    tries = ["audit.texts=FILE with inputs like yours", "a larger audit.margin (more stays in FP32)"]
    if config.precision.plan != "ranges":
        tries.append("precision=fp16-ranges" if config.precision.plan == "minimised" else "precision=fp16")
    tries += [] if config.precision.dtype == "bfloat16" else ["precision=bf16 where the GPU has it"]
    return f"Try {', '.join(tries)}, or precision=fp32"


def routes(folder: Path) -> bool:
    """Whether the decoder in `folder` picks experts by the numbers it computes."""
    return any(node.op_type == "TopK" for node in files.load(folder / layout.DECODER).graph.all_nodes())


def emulated(candidate: Path, folder: Path, format: Format) -> Path:
    """The candidate with its graphs emulated (`accel.graph.emulate`), in `folder`, over the same weights."""
    for path in candidate.iterdir():
        if path.suffix != ".onnx":
            shutil.copyfile(path, folder / path.name)
    for path in candidate.glob("*.onnx"):
        model = files.load(path)
        emulate_half(model, format)
        files.save_graph(model, folder / path.name)
    return folder


def examine(
    folder: Path, config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, verdict: Verdict
) -> None:
    """Fill in the verdict on the model in `folder`."""
    checkpoint, expected = inputs["checkpoint"].folder, inputs["reference"].folder
    with open_model(folder, config.runtime) as model:
        layers = len(architecture.signature(model.config, Role.STEP).outputs) // 2
        verdict.threshold = threshold(config.precision.dtype, layers)
        chosen, _ = reference.fixed_inputs(config, checkpoint, architecture, model.config)
        if not compare_outputs(model, architecture, expected, verdict, config.verify.seed):
            return  # nothing can be decoded
        rerouted = REROUTED if config.precision.dtype != "float32" and routes(folder) else 0.0
        if not compare_paths(model, architecture, chosen, expected, verdict, rerouted):
            return
        tokens = json.loads((expected / reference.TOKENS).read_text())
        compare_tokens(model, checkpoint, config, chosen, tokens, verdict)
        compare_references(model, checkpoint, config, tokens["references"], verdict)
    judge(config, verdict)
    verdict.passed = not verdict.failures


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Writes the candidate's files, `verdict.json` and the certificate. Raises `Refused` if it doesn't pass."""
    candidate, dtype = inputs["merge"].folder, config.precision.dtype
    native = config.runtime.arithmetic.get(dtype) == dtype
    verdict = Verdict(precision=dtype, arithmetic="native" if native else "emulated", runtime=config.runtime.name)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        tested = candidate if native else emulated(candidate, Path(scratch), FORMATS[dtype])
        examine(tested, config, inputs, architecture, verdict)
    if not verdict.passed:
        kept = "\n".join(list(dict.fromkeys(verdict.failures))[:7])
        message = f"verify refuses the candidate ({dtype}, {verdict.arithmetic}):\n{kept}\n{advice(config)}"
        raise Refused(message, summarize(verdict, inputs, None))
    for path in candidate.iterdir():  # copied: onnx refuses weights in a file with more than one hard link
        if path.name != MANIFEST:
            shutil.copyfile(path, out / path.name)
    (out / layout.VERDICT).write_text(json.dumps(asdict(verdict), indent=1))
    measured = speed.beside_torch(out, config, inputs, architecture) if config.verify.latency else None
    explained = {}
    if "audit" in inputs:
        plans, (held, rows) = audit.read_plans(inputs["audit"].folder), ranges.read_ranges(inputs["ranges"].folder)
        explained = certificate.explain(plans, held, rows)
    certificate.write(out, asdict(verdict), measured, explained, config, inputs)
    return summarize(verdict, inputs, measured)


def summarize(verdict: Verdict, inputs: Mapping[str, Artifact], measured: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the manifest and a sweep's table say of a candidate."""
    mixes = inputs["convert"].summary.values()
    return {
        **{key: getattr(verdict, key) for key in ("passed", "arithmetic", "identical", "metrics")},
        "worst_logits": max(verdict.drift.worst, default=None),
        "fp32_nodes": sum(mix["fp32_nodes"] for mix in mixes) if mixes else "all",
        "casts": sum(mix["casts"] for mix in mixes),
        "decoder_bytes": inputs["merge"].summary["merged_bytes"],
        "speed": measured,
    }


def taken(config: Config) -> tuple[str, ...]:
    mixed = config.precision.dtype != "float32"
    return ("checkpoint", "convert", "merge", "reference", *(("ranges", "audit") if mixed else ()))


STAGE = Stage(
    name="verify",
    run=run,
    inputs=taken,
    sections=("model", "precision", "runtime", "verify"),
    packages=("torch", "transformers", "onnxruntime", "onnxruntime-gpu", "sacrebleu"),
    files=reference_files,
    version=4,
)
