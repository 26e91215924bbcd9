"""Proves a candidate against PyTorch: outputs, logits along a path, tokens. A deployable is what passed."""

import json
import shutil
import tempfile
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from accel import console, texts
from accel.adapter import Architecture, Role
from accel.artifacts import MANIFEST, Artifact
from accel.errors import AccelError
from accel.generation import AcceleratedModel
from accel.graph import files
from accel.graph.emulate import emulate_half
from accel.loading import open_model
from accel.runtime import layout
from accel.runtime.feeds import decoder_feeds
from accel.runtime.stream import on_shared_stream
from accel.schema import Config
from accel.stages import Stage, reference, takes
from accel.stages.checkpoint import reference_files

STEPS = {"float32": 2.0**-23, "float16": 2.0**-10}  # distance from 1 to the next number of each type


def threshold(dtype: str, layers: int) -> float:
    """The largest difference allowed, relative to an output's largest value.

    Rounding errors of independent operations add up like a random walk, so with the square root of the depth; an
    operation of a layer may lose a few units in the last place, which the factors allow for.
    """
    return float((64 if dtype == "float32" else 16) * STEPS[dtype] * max(1, layers) ** 0.5)


@dataclass
class Difference:
    """One output of one role at one shape: largest absolute difference, and relative to the largest value."""

    absolute: float
    relative: float


@dataclass
class Verdict:
    """What `verify` found. Written into the deployable as `verdict.json`."""

    passed: bool = False
    precision: str = "float32"
    arithmetic: str = "native"
    runtime: str = "cpu"
    threshold: float = 0.0
    outputs: dict[str, Difference] = field(default_factory=dict)
    identical: dict[str, float] = field(default_factory=dict)
    first_difference: dict[str, int] = field(default_factory=dict)
    error_rates: dict[str, dict[str, float]] = field(default_factory=dict)
    references: int = 0
    samples: list[dict[str, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def compare_outputs(
    model: AcceleratedModel, architecture: Architecture, expected: Path, verdict: Verdict, seed: int
) -> None:
    """Run every role at the reference's shapes through the runtime: both branches, every output."""
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
            visible = _visible(role, name, given, value, growing)
            _measure(verdict, f"{role}.{name}", found[name], value, visible)


def compare_paths(
    model: AcceleratedModel,
    architecture: Architecture,
    inputs: Sequence[Mapping[str, Tensor]],
    expected: Path,
    verdict: Verdict,
) -> None:
    """Walk along what PyTorch said, token by token over growing caches, and compare the logits at every token.

    Nothing waits for a result in between, so that on a GPU what would overtake something else does.
    """
    for number, given in enumerate(inputs[: reference.PATHS]):
        known = load_file(expected / reference.PATH.format(number))
        hidden = _encoded(architecture, model, given)
        ids = known["ids"].to(model.device)  # [1, tokens]
        seen = torch.ones_like(ids)
        calls = [decoder_feeds(ids[:, [i]], seen[:, : i + 1]) for i in range(ids.shape[1])]
        with on_shared_stream(model.device):  # as `generate` does
            logits, state = model.runtime.prefill({**calls[0], **hidden})
            found = torch.cat([logits, *(model.runtime.step(feeds, state) for feeds in calls[1:])], dim=1)
        _measure(verdict, "path.logits", found, known["logits"])


def _visible(
    role: Role, name: str, given: Mapping[str, Tensor], value: Tensor, growing: Container[str]
) -> Tensor | None:
    """A mask that broadcasts with `value`, 0 where it belongs to padding: nothing ever looks there.

    What attends to padding alone averages over nothing, which any rounding changes. What is not finite there counts
    all the same, for it would spread.
    """
    mask = given.get("attention_mask")  # [batch, source], or [batch, past + new] of a decoder
    if mask is None:
        return None
    if role is Role.ENCODER:
        return mask.reshape(*mask.shape, *[1] * (value.ndim - 2))  # value: [B, S, ...]
    if name == "logits":
        return mask[:, -value.shape[1] :, None]  # value: [B, N, V]
    return mask[:, None, :, None] if name in growing else None  # value: [B, H, P + T, K]


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


def _measure(verdict: Verdict, name: str, found: Tensor, expected: Tensor, visible: Tensor | None = None) -> None:
    if found.shape != expected.shape:
        verdict.failures.append(f"{name} has shape {tuple(found.shape)}, PyTorch gives {tuple(expected.shape)}")
        return
    found = found.cpu().float()
    if visible is not None:
        found, expected = found * visible, expected * visible
    absolute = float((found - expected).abs().max())
    relative = absolute / max(float(expected.abs().max()), 1e-6)
    worst = verdict.outputs.setdefault(name, Difference(0.0, 0.0))
    worst.absolute, worst.relative = max(worst.absolute, absolute), max(worst.relative, relative)
    if not relative <= verdict.threshold:
        verdict.failures.append(
            f"{name} is off by {relative:.1e} of its largest value, allowed {verdict.threshold:.1e}"
        )


def compare_tokens(
    model: AcceleratedModel,
    folder: Path,
    config: Config,
    inputs: Sequence[Mapping[str, Tensor]],
    expected: Any,
    verdict: Verdict,
) -> None:
    """Generate for the reference's inputs under every case, and count the sequences that are the same."""
    compared = reference.cases(config)
    for name, options in console.track(list(compared.items()), "tokens"):
        found = reference.decode_case(model, name, options, inputs, config.verify)
        right = expected["tokens"][name]
        verdict.identical[name] = sum(map(list.__eq__, found, right)) / len(right)
        for number, (ours, theirs) in enumerate(zip(found, right, strict=True)):
            if ours != theirs:
                position = next(
                    (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
                    min(len(ours), len(theirs)),
                )
                verdict.first_difference[f"{name}.{number}"] = position
        if name == "greedy" and expected["texts"]:
            tokenizer = texts.load_tokenizer(folder)
            if tokenizer is not None:
                decoded = (tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (right, found))
                verdict.samples = [
                    {"input": line, "pytorch": theirs, "ours": ours}
                    for line, theirs, ours in zip(expected["texts"], *decoded, strict=True)
                ]


def compare_references(
    model: AcceleratedModel, folder: Path, config: Config, expected: list[str], verdict: Verdict
) -> None:
    """Error rates on the references, PyTorch's beside ours."""
    tokenizer = texts.load_tokenizer(folder)
    if config.model.references is None or tokenizer is None:
        return
    known = texts.References.read(folder / config.model.references, config.verify.references)
    found = reference.decode_texts(model, tokenizer, known.texts, batch_size=50)
    verdict.references = len(known.texts)
    verdict.error_rates = {"pytorch": known.error_rates(expected), "ours": known.error_rates(found)}


def emulated(candidate: Path, folder: Path) -> Path:
    """The candidate with its graphs emulated (`accel.graph.emulate`), in `folder`, over the same weights."""
    for path in candidate.iterdir():
        if path.suffix != ".onnx":
            shutil.copyfile(path, folder / path.name)
    for path in candidate.glob("*.onnx"):
        model = files.load(path)
        emulate_half(model)
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
        chosen, _ = reference.fixed_inputs(
            checkpoint, config.model.references, architecture, model.config, config.verify
        )
        compare_outputs(model, architecture, expected, verdict, config.verify.seed)
        if not verdict.failures:
            compare_paths(model, architecture, chosen, expected, verdict)
        if verdict.failures:
            return  # numbers this far off may not even be finite, and can't be decoded
        tokens = json.loads((expected / reference.TOKENS).read_text())
        compare_tokens(model, checkpoint, config, chosen, tokens, verdict)
        compare_references(model, checkpoint, config, tokens["references"], verdict)
    if config.precision.dtype == "float32" and min(verdict.identical.values()) < 1:
        cases = ", ".join(f"{name} {share:.0%}" for name, share in verdict.identical.items())
        verdict.failures.append(f"FP32 tokens must be PyTorch's; identical sequences: {cases}")
    verdict.passed = not verdict.failures


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Writes the candidate's files and `verdict.json`. Raises `AccelError` if it is refused."""
    candidate = inputs["merge"].folder
    native = config.precision.dtype == "float32" or config.runtime.half
    verdict = Verdict(
        precision=config.precision.dtype,
        arithmetic="native" if native else "emulated",
        runtime=config.runtime.name,
    )
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        tested = candidate if native else emulated(candidate, Path(scratch))
        examine(tested, config, inputs, architecture, verdict)
    if not verdict.passed:
        kept = "\n".join(verdict.failures[:8])
        raise AccelError(f"verify refuses the candidate ({verdict.precision}, {verdict.arithmetic}):\n{kept}")
    for path in candidate.iterdir():  # copied: onnx refuses weights in a file with more than one hard link
        if path.name != MANIFEST:
            shutil.copyfile(path, out / path.name)
    (out / layout.VERDICT).write_text(json.dumps(asdict(verdict), indent=1))
    return {"identical": verdict.identical, "error_rates": verdict.error_rates, "arithmetic": verdict.arithmetic}


STAGE = Stage(
    name="verify",
    run=run,
    inputs=takes("checkpoint", "merge", "reference"),
    sections=("model", "precision", "runtime", "verify"),
    packages=("torch", "transformers", "onnxruntime", "onnxruntime-gpu"),
    files=reference_files,
    version=3,
)
