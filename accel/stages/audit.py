"""Decides what stays in FP32 and why: by rules on what every value held, then as little of it as trials allow."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import onnx_ir as ir
from transformers import AutoConfig

from accel import progress
from accel.adapters.types import Architecture, Role
from accel.config.schema import Config
from accel.data import texts
from accel.evaluation.calibration_data import batches, walk
from accel.evaluation.component_runner import signatures
from accel.evaluation.sensitivity import Recorder, Trial
from accel.graph import files
from accel.graph.precision import baselines, minimize, observer, plan
from accel.graph.precision.convert import convert_half, half_share
from accel.graph.precision.formats import FORMATS, FP16, Format
from accel.pipeline.stage import Stage, takes
from accel.pipeline.store import Artifact
from accel.stages import prompts
from accel.stages.ranges import Ranges, lean, read_ranges, text_files

PLAN = "plan.json"
TRIED_ON = 4  # batches
NEAREST = 5  # values named in the report
MASKED = 0.05  # as near to the number that masks are clamped to: a mask, and what was added to it
MINIMISED, BY_RANGES = "minimised", "ranges"
RULES: dict[str, str] = {
    MINIMISED: "by what values held, less what trials show to be safe",
    BY_RANGES: "by what values held",
    "operators": "by a list of operators, to compare with",
    "blanket": "nothing that can be lowered, to compare with",
}


def target(config: Config) -> Format:
    """The format that graphs are lowered to; FP16 where they are not: the plan then says what it would take."""
    return FP16 if config.precision.dtype == "float32" else FORMATS[config.precision.dtype]


def load(graphs: Path, role: Role, format: Format) -> ir.Model:
    """A role's FP32 graph as plans are made for it: typed, its masks clamped."""
    model = files.load(graphs / f"{role}.onnx")
    observer.infer_types(model)
    plan.clamp_masks(model, format)
    return model


def first_plans(
    config: Config, models: Mapping[Role, ir.Model], ranges: Mapping[Role, Ranges]
) -> dict[Role, plan.Plan]:
    """What the chosen rule keeps, before anything is tried."""
    format = target(config)
    rules: dict[str, Callable[[Role, ir.Model], plan.Plan]] = {
        MINIMISED: lambda role, model: plan.make_plan(model, ranges[role], config.audit.margin, format),
        BY_RANGES: lambda role, model: plan.make_plan(model, ranges[role], config.audit.margin, format),
        "operators": lambda role, model: baselines.by_operators(model, config.precision.operators, format),
        "blanket": lambda role, model: plan.least_plan(model, format),
    }
    return {role: rules[config.precision.plan](role, model) for role, model in models.items()}


def smaller(
    config: Config,
    architecture: Architecture,
    checkpoint: Path,
    graphs: Path,
    plans: Mapping[Role, plan.Plan],
    ranges: Mapping[Role, Ranges],
    asked: Sequence[texts.Prompt],
    scratch: Path,
) -> dict[Role, plan.Plan]:
    """The plans without what trials show to be safe in 16 bits, every role by itself, fed what FP32 graphs give."""
    format = target(config)
    open_groups = {role: minimize.groups(load(graphs, role, format), found) for role, found in plans.items()}
    if config.audit.trials == 0 or not any(open_groups.values()):
        return dict(plans)
    description = AutoConfig.from_pretrained(checkpoint)
    ports = signatures(architecture, description)
    growing = {port.name for port in ports[Role.STEP].outputs}
    work = list(islice(batches(config, architecture, description, checkpoint, asked), TRIED_ON))
    recorder, settings = Recorder(scratch, [batch.kind for batch in work]), lean(config.runtime, graphs)
    walk(ports, work, lambda role: recorder.open(role, graphs / f"{role}.onnx", settings), scratch)
    found = dict(plans)
    for role, given in progress.track(list(plans.items()), "trials"):
        model, path = load(graphs, role, format), graphs / f"{role}.onnx"
        trial = Trial(role, path, recorder.calls[role], settings, format, config.audit.margin, ranges[role], growing)
        if open_groups[role]:
            found[role] = _minimised(model, given, open_groups[role], trial, config.audit.trials)
    return found


def _minimised(model: ir.Model, given: plan.Plan, groups: list[list[str]], trial: Trial, trials: int) -> plan.Plan:
    known = trial(given)
    if not known.finite:
        return given  # not even the rules' plan computes here: nothing to hold a smaller one to

    def passes(names: list[str]) -> bool:
        return trial(minimize.without(model, given, names), known.changed).within(known)

    return minimize.without(model, given, minimize.droppable(groups, passes, trials))


def agree(
    plans: Mapping[Role, plan.Plan], models: Mapping[Role, ir.Model], architecture: Architecture, checkpoint: Path
) -> None:
    """In place: one type for every weight and cache of the decoders' graphs."""
    decoders = [role for role in models if role is not Role.ENCODER]
    cache = architecture.signature(AutoConfig.from_pretrained(checkpoint), Role.STEP).cache
    plan.unite({role: plans[role] for role in decoders}, {role: models[role] for role in decoders}, cache)


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Writes `plan.json`: for each role the nodes, weights and ports kept in FP32, each with its reason and numbers."""
    graphs, checkpoint = inputs["optimize"].folder, inputs["checkpoint"].folder
    ranges, rows = read_ranges(inputs["ranges"].folder)
    format = target(config)
    models = {role: load(graphs, role, format) for role in architecture.roles()}
    plans = first_plans(config, models, ranges)
    agree(plans, models, architecture, checkpoint)
    sizes = {"by the rule": sizes_of(graphs, plans, format)}
    if config.precision.plan == MINIMISED:
        asked = texts.read_prompts(inputs["prompts"].folder / prompts.PROMPTS)
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            plans = smaller(config, architecture, checkpoint, graphs, plans, ranges, asked, Path(scratch))
        agree(plans, models, architecture, checkpoint)
        sizes["after trials"] = sizes_of(graphs, plans, format)
        for role, model in models.items():
            plans[role].nodes.update(minimize.fewest_casts(model, plans[role]))
        sizes["with the fewest casts"] = sizes_of(graphs, plans, format)
    (out / PLAN).write_text(json.dumps({role: found.dump() for role, found in plans.items()}, indent=1))
    return {
        "format": format.name,
        "plan": config.precision.plan,
        "sizes": sizes,
        "rules": _rules(plans),
        "nearest": nearest(ranges, rows),
    }


def nearest(ranges: Mapping[Role, Ranges], rows: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """The values of the largest magnitude that FP32 holds, masks aside, and the input each was seen with."""
    finite = [
        (held, role, name)
        for role, values in ranges.items()
        for name, held in values.items()
        if not held.not_finite and abs(held.largest / -FP16.mask - 1) > MASKED
    ]
    finite.sort(key=lambda found: -found[0].largest)
    return [
        {"role": role, "value": name, "largest": held.largest, "seen_with": held.seen_with(rows)}
        for held, role, name in finite[:NEAREST]
    ]


def sizes_of(graphs: Path, plans: Mapping[Role, plan.Plan], format: Format) -> dict[str, dict[str, float]]:
    """Role -> what the mix would be made of: see `half_share`."""
    found = {}
    for role, chosen in plans.items():
        model = files.load(graphs / f"{role}.onnx")
        convert_half(model, chosen, format)
        found[str(role)] = half_share(model)
    return found


def _rules(plans: Mapping[Role, plan.Plan]) -> dict[str, dict[str, int]]:
    """Role -> rule -> nodes that it keeps."""
    found: dict[str, dict[str, int]] = {}
    for role, chosen in plans.items():
        counts = found[str(role)] = {}
        for reason in chosen.nodes.values():
            counts[reason.rule] = counts.get(reason.rule, 0) + 1
    return found


def read_plans(folder: Path) -> dict[Role, plan.Plan]:
    """Role -> plan, as `run` wrote them."""
    return {Role(role): plan.Plan.parse(values) for role, values in json.loads((folder / PLAN).read_text()).items()}


STAGE = Stage(
    name="audit",
    run=run,
    inputs=takes("checkpoint", "prompts", "optimize", "ranges"),
    sections=("audit", "precision", "model.references", "runtime"),
    packages=("onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "networkx"),
    files=text_files,
)
