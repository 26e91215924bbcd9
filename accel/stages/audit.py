"""Runs the FP32 graphs on random ids or the user's text, looks at every value, and plans what stays in FP32."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from accel import console, texts
from accel.adapter import Architecture, Role
from accel.artifacts import Artifact
from accel.chain import Shape, longest, script, signatures
from accel.errors import AccelError
from accel.graph import files, plan, probe
from accel.memory import release
from accel.runtime.feeds import decoder_feeds
from accel.runtime.session import SessionSettings, open_session
from accel.schema import AuditConfig, Config, RuntimeConfig
from accel.stages import Stage, takes

PLAN = "plan.json"
RANGES = "ranges.json"
STEPS = {"random": 4, "text": 32}  # tokens decoded greedily after the first


class ProbedGraph:
    """A graph with probes, run one batch after the other. Only one is open at a time: memory counts here."""

    def __init__(self, source: Path, scratch: Path, runtime: RuntimeConfig) -> None:
        model = files.load(source)
        plan.clamp_masks(model)
        self.names = probe.add_probes(model)
        files.save(model, scratch / source.name)
        del model
        release()
        # Weights stay in the file they are mapped from, and what a node frees is gone.
        small = SessionSettings.of(runtime, session={"session.disable_prepacking": "1"}, arena=False, fuse=False)
        self.session = open_session(scratch / source.name, small)
        self.outputs = [port.name for port in self.session.get_outputs()]
        self.ranges: dict[str, probe.Range] = {}

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Named inputs -> named outputs; what every value held widens `ranges`."""
        wanted = {port.name for port in self.session.get_inputs()}
        values = self.session.run(None, {name: tensor.numpy() for name, tensor in feeds.items() if name in wanted})
        found = dict(zip(self.outputs, values, strict=True))
        for name, seen in probe.read_probes(self.names, (found.pop(output) for output in probe.OUTPUTS)).items():
            self.ranges.setdefault(name, probe.Range()).widen(seen)
        return {name: torch.from_numpy(value) for name, value in found.items()}


@dataclass(frozen=True)
class Batch:
    """One batch to look at: what the encoder is given, if there is one, and the first ids of the decoder."""

    kind: str
    given: Mapping[str, Tensor]
    ids: Tensor  # [batch, prefix]
    mask: Tensor  # [batch, prefix]


def batches(config: AuditConfig, architecture: Architecture, model: PretrainedConfig, folder: Path) -> Iterator[Batch]:
    """Random ids of random lengths, then the texts of `audit.texts`."""
    encodes = Role.ENCODER in architecture.roles()
    generator = torch.Generator().manual_seed(config.seed)
    room = (longest(model) or config.max_length + STEPS["random"]) - STEPS["random"]
    most = min(config.max_length, room)
    for _ in range(config.batches):
        length, prefix = (int(torch.randint(2, max(3, n), (), generator=generator)) for n in (most, most // 4))
        shape = Shape(config.batch_size, length, prefix if encodes else length, 1)
        given = script(architecture, model, shape, generator)
        first = given[Role.PREFILL]
        yield Batch("random", given.get(Role.ENCODER, {}), first["input_ids"], first["attention_mask"])
    if config.texts is not None:
        tokenizer = texts.load_tokenizer(folder)
        if tokenizer is None:
            raise AccelError(f"audit.texts={config.texts}: the checkpoint has no tokenizer to read text with")
        lines = [line for line in texts.read_lines(Path(config.texts)) if line.strip()]
        start = getattr(model, "decoder_start_token_id", None) or 0
        for first_line in range(0, len(lines), config.batch_size):
            given_texts = texts.encode(tokenizer, lines[first_line : first_line + config.batch_size])
            ids, mask = given_texts["input_ids"], given_texts["attention_mask"]
            if encodes:
                ids, mask = torch.full((len(ids), 1), start), torch.ones(len(ids), 1, dtype=torch.int64)
            yield Batch("text", given_texts, ids, mask)


def observe(
    config: Config, architecture: Architecture, model: PretrainedConfig, checkpoint: Path, graphs: Path, scratch: Path
) -> dict[Role, dict[str, probe.Range]]:
    """What every value of every role's graph held. Values pass from role to role through files, not memory."""
    ports = signatures(architecture, model)
    work = list(batches(config.audit, architecture, model, checkpoint))
    ranges: dict[Role, dict[str, probe.Range]] = {}
    for role, signature in ports.items():
        graph = ProbedGraph(graphs / f"{role}.onnx", scratch, config.runtime)
        for number, batch in enumerate(console.track(work, f"auditing the {role}")):
            spool = scratch / f"{number}.safetensors"
            pool = load_file(spool) if spool.is_file() else dict(batch.given)
            feeds = {port.name: pool[port.source] for port in signature.inputs if port.source}
            if role is Role.ENCODER:
                pool |= graph(batch.given)
            elif role is Role.PREFILL:
                pool |= graph({**decoder_feeds(batch.ids, batch.mask), **feeds})
            else:
                _decode(graph, batch, pool["logits"], signature.cache, feeds)
            save_file({name: tensor.contiguous() for name, tensor in pool.items()}, spool)
        ranges[role] = graph.ranges
        (scratch / f"{role}.onnx").unlink()
        (scratch / files.data_name(scratch / f"{role}.onnx")).unlink(missing_ok=True)
        del graph
    return ranges


def _decode(
    graph: ProbedGraph, batch: Batch, logits: Tensor, cache: Mapping[str, str], feeds: dict[str, Tensor]
) -> None:
    """Greedy steps from prefill's logits and caches on."""
    mask = batch.mask
    for _ in range(STEPS[batch.kind]):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        found = graph({**decoder_feeds(logits[:, -1:].argmax(-1), mask), **feeds})
        logits = found["logits"]
        feeds |= {name: found[source] for name, source in cache.items() if source in found}


def check_finite(ranges: Mapping[Role, Mapping[str, probe.Range]]) -> None:
    """Raises `AccelError` if a model's logits are NaN or infinite in FP32."""
    for role, values in ranges.items():
        if (seen := values.get("logits")) is not None and seen.not_finite:
            first = next(name for name, held in values.items() if held.not_finite)
            raise AccelError(f"the {role}'s logits are not finite in FP32 either; the first such value is {first}")


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Writes `plan.json` (each node kept in FP32, with its reason) and `ranges.json` (what every value held)."""
    graphs, checkpoint = inputs["optimize"].folder, inputs["checkpoint"].folder
    description = AutoConfig.from_pretrained(checkpoint)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        ranges = observe(config, architecture, description, checkpoint, graphs, Path(scratch))
    check_finite(ranges)
    models = {role: files.load(graphs / f"{role}.onnx") for role in architecture.roles()}
    plans = {}
    for role, model in models.items():
        probe.infer_types(model)
        plan.clamp_masks(model)
        plans[role] = plan.make_plan(model, ranges[role], config.audit.margin)
    decoders = [role for role in models if role is not Role.ENCODER]
    plan.unite(
        {role: plans[role] for role in decoders},
        {role: models[role] for role in decoders},
        architecture.signature(description, Role.STEP).cache,
    )
    (out / PLAN).write_text(json.dumps({role: found.dump() for role, found in plans.items()}, indent=1))
    (out / RANGES).write_text(
        json.dumps({role: {name: asdict(seen) for name, seen in values.items()} for role, values in ranges.items()})
    )
    return {str(role): _summary(plans[role], models[role]) for role in models}


def _summary(found: plan.Plan, model: Any) -> dict[str, Any]:
    rules: dict[str, int] = {}
    for reason in found.nodes.values():
        rules[reason.rule] = rules.get(reason.rule, 0) + 1
    return {"float_nodes": len(probe.float_values(model.graph)), "kept": len(found.nodes), "rules": rules}


def read_plans(folder: Path) -> dict[str, plan.Plan]:
    """Role -> plan, as `run` wrote them."""
    return {role: plan.Plan.parse(values) for role, values in json.loads((folder / PLAN).read_text()).items()}


def text_files(config: Config) -> tuple[str, ...]:
    return (config.audit.texts,) if config.audit.texts else ()


STAGE = Stage(
    name="audit",
    run=run,
    inputs=takes("checkpoint", "optimize"),
    sections=("audit", "runtime"),
    packages=("onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu"),
    files=text_files,
)
