"""Runs the FP32 graphs on random ids and the user's text until what their values hold is known."""

import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from os.path import isabs
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor
from transformers import AutoConfig

from accel import progress
from accel.adapters.types import Architecture, Component
from accel.config.schema import Config, RuntimeConfig
from accel.data import texts
from accel.errors import AccelError
from accel.evaluation.calibration_data import Batch, Call, batches, walk
from accel.evaluation.component_runner import signatures
from accel.graph import files
from accel.graph.precision import observer, plan
from accel.graph.precision.formats import FP16
from accel.pipeline.stage import Stage, takes
from accel.pipeline.store import Artifact
from accel.runtime.session import HostSession, SessionSettings
from accel.stages import prompts
from accel.system.host_memory import release

logger = logging.getLogger(__name__)

STATISTICS = "ranges.json"
ComponentStatistics = dict[str, observer.ValueStatistics]


class ObservedGraph:
    """One role's graph with probes. What every value held widens `ranges`, batch by batch."""

    def __init__(self, source: Path) -> None:
        model = files.load(source)
        plan.clamp_masks(model)
        self.names = observer.insert_observers(model)
        self.rows = observer.by_row(model)
        self.statistics: ComponentStatistics = {name: observer.ValueStatistics() for name in self.names}
        self.graph, self.folder = files.dump(model), source.parent
        del model
        release()

    def open(self, runtime: RuntimeConfig) -> Call:
        """A session over it."""
        session = HostSession(self.graph, lean(runtime, self.folder))

        def call(number: int, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            found = session(inputs)
            columns = [found.pop(name).numpy() for name in observer.OUTPUTS]
            height = len(inputs[session.inputs[0]])
            for name, seen in observer.read_observers(self.names, columns, self.rows, (number, height)).items():
                self.statistics[name].widen(seen)
            return found

        return call


def lean(runtime: RuntimeConfig, weights: Path) -> SessionSettings:
    """Settings of a session that runs a few times, where memory counts and speed doesn't.

    Weights stay in the file in folder `weights` that they are mapped from, and what a node frees is gone.
    """
    keys = {"session.disable_prepacking": "1", "session.model_external_initializers_file_folder_path": str(weights)}
    return SessionSettings.of(runtime, session=keys, arena=False, fuse=False)


def unsettled(
    statistics: Mapping[Component, ComponentStatistics], overflow_margin: float
) -> list[tuple[Component, str]]:
    """The values that another growth like the newest would take into the margin of FP16's limit."""
    found = []
    for component, values in statistics.items():
        for name, held in values.items():
            counts = held.largest * overflow_margin
            if counts <= FP16.largest < counts * held.growth():
                found.append((component, name))
    return found


def observe(
    config: Config,
    architecture: Architecture,
    checkpoint: Path,
    graphs: Path,
    asked: Sequence[texts.Prompt],
    scratch: Path,
) -> tuple[dict[Component, ComponentStatistics], list[Batch], str]:
    """What every value of every role's graph held, the batches it was seen with, and why no more were taken.

    The number of batches doubles until the newer half reaches no further than it should: see `unsettled`.
    """
    audit = config.audit
    description = AutoConfig.from_pretrained(checkpoint)
    specs = signatures(architecture, description)
    supply = batches(config, architecture, description, checkpoint, asked)
    observed = {component: ObservedGraph(graphs / f"{component}.onnx") for component in specs}
    statistics = {component: graph.statistics for component, graph in observed.items()}
    seen: list[Batch] = []
    for count in _rounds(audit.batches, audit.max_batches):
        work = list(islice(supply, count - len(seen)))
        if not work:
            return statistics, seen, f"all {len(seen)} batches there were"
        walk(specs, work, lambda component: observed[component].open(config.runtime), scratch, len(seen))
        seen += work
        for held in (held for values in statistics.values() for held in values.values()):
            held.mark(len(seen))
        rising = unsettled(statistics, audit.overflow_margin)
        if len(seen) >= audit.batches and not rising:
            return statistics, seen, f"settled after {len(seen)} batches"
    names = ", ".join(f"{component} {name}" for component, name in rising[:5])
    logger.warning(
        f"the audit saw audit.max_batches={audit.max_batches} batches, and {len(rising)} values still grow towards "
        f"FP16's limit: {names}{', …' if len(rising) > 5 else ''}. Raise audit.max_batches or audit.overflow_margin"
    )
    return statistics, seen, f"audit.max_batches={audit.max_batches} reached, {len(rising)} values still grow"


def _rounds(first: int, most: int) -> list[int]:
    """Numbers of batches at which to look: half of `first`, `first`, and twice as many each time up to `most`."""
    counts = [max(1, first // 2), first] if first > 1 else [first]
    while counts[-1] * 2 <= most:
        counts.append(counts[-1] * 2)
    return counts


def check_finite(statistics: Mapping[Component, ComponentStatistics], load: Callable[[Component], ir.Model]) -> None:
    """Raises `AccelError` if a model's outputs are NaN or infinite in FP32, and says where that begins."""
    for component, values in statistics.items():
        model = load(component)
        for output in model.graph.outputs:
            held = values.get(output.name or "")
            if held is not None and held.not_finite:
                raise AccelError(
                    f"the {component}'s {output.name} is not finite in FP32 either: {_beginning(output, values)}. "
                    "The checkpoint, or what it is fed, is broken before any precision is chosen"
                )


def _beginning(value: ir.Value, values: ComponentStatistics) -> str:
    """The node where numbers stop being finite, on the way that leads to `value`."""
    while (node := value.producer()) is not None:
        bad = [given for given in node.inputs if given is not None and _broken(given, values)]
        if not bad:
            return f"it begins at the {node.op_type} that makes {value.name}"
        value = bad[0]
    return f"it begins with {'the weight' if value.is_initializer() else 'the input'} {value.name}"


def _broken(value: ir.Value, values: ComponentStatistics) -> bool:
    if value.const_value is not None:
        content = value.const_value.numpy()
        return content.dtype.kind == "f" and not bool(np.isfinite(content).all())
    held = values.get(value.name or "")
    return held is not None and held.not_finite > 0


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Writes `ranges.json`: what every value held, with which batch, and when the audit had seen enough."""
    graphs, checkpoint = inputs["optimize"].folder, inputs["checkpoint"].folder
    asked = texts.read_prompts(inputs["prompts"].folder / prompts.PROMPTS)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        statistics, seen, stopped = observe(config, architecture, checkpoint, graphs, asked, Path(scratch))
    progress.note(f"what values hold: {stopped}")
    check_finite(statistics, lambda component: files.load(graphs / f"{component}.onnx"))
    components = {
        component: {name: asdict(held) for name, held in values.items()} for component, values in statistics.items()
    }
    record = {"stopped": stopped, "batches": [list(batch.rows) for batch in seen], "components": components}
    (out / STATISTICS).write_text(json.dumps(record))
    return {"batches": len(seen), "stopped": stopped}


def read_statistics(folder: Path) -> tuple[dict[Component, ComponentStatistics], list[list[str]]]:
    """Role -> what its values held, and what each row of each batch was, as `run` wrote them."""
    record = json.loads((folder / STATISTICS).read_text())
    components = {
        Component(component): {name: observer.ValueStatistics(**held) for name, held in values.items()}
        for component, values in record["components"].items()
    }
    return components, record["batches"]


def text_files(config: Config) -> tuple[str, ...]:
    """What lies outside the checkpoint's folder."""
    own = config.model.references
    return tuple(path for path in (config.audit.texts, own) if path is not None and (path != own or isabs(path)))


STAGE = Stage(
    name="calibrate",
    run=run,
    inputs=takes("checkpoint", "prompts", "optimize"),
    sections=(
        *(f"audit.{key}" for key in ("batches", "max_batches", "batch_size", "max_length", "seed", "random")),
        *("audit.texts", "audit.column", "audit.overflow_margin", "model.references", "runtime"),
    ),
    packages=("onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu"),
    files=text_files,
)
