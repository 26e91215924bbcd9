"""Plan the static decode graph: which fused operations compute a token, and what is left to torch.

Reads:
    The unverified bundle of `merge`, with a static decode graph.

Writes:
    `plan.json`: the operations of one decode step in order, see `accel.engine.planning.plan.Row`, and sums over them.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from accel.adapters.types import Architecture
from accel.config.schema import Config
from accel.errors import AccelError
from accel.pipeline.stage import Stage, takes
from accel.pipeline.store import Artifact
from accel.runtime.layout import BUCKET, KEPT, first_variant
from accel.runtime.ring_cache import ring_length, windows
from accel.runtime.weights import SharedWeights

RESULT = "plan.json"
BATCH = "batch_size"


def check(static_decode: bool) -> None:
    """Check that there will be a graph to plan.

    Args:
        static_decode: `convert.static_decode`.

    Raises:
        AccelError: There won't.
    """
    if not static_decode:
        raise AccelError(
            "stage=plan needs the static decode graph, which convert.static_decode=false leaves out: "
            "set convert.static_decode=true"
        )


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Write `plan.json`, and return its content."""
    from accel.engine.nodes import graph_inputs, read_graph  # here, as other stages need no engine
    from accel.engine.planning.planner import plan

    path = first_variant(inputs["merge"].folder).static_decode
    if not path.is_file():
        raise AccelError(f"{inputs['merge'].folder} holds no static decode graph: set convert.static_decode=true")
    graph = read_graph(path, SharedWeights(torch.device("cpu")).tensors(path))
    fixed = {KEPT: torch.tensor([0])} if KEPT in graph.inputs else {}
    axes = graph_inputs(path)
    found = plan(graph, axes, BATCH, fixed)
    settings = config.plan
    lengths = dict.fromkeys(found.trace.lengths, settings.source_length) | {
        BATCH: settings.batch_size,
        BUCKET: settings.cache_length,
        **{axis: ring_length(window, settings.cache_length) for axis, window in windows(axes).items()},
    }
    rows = found.table(lengths)
    summary = {
        "point": asdict(settings),
        "rows": [asdict(row) for row in rows],
        "operations": sum(row.engine == "fused" for row in rows),
        **found.coverage(),
        "workspace_bytes": found.workspace(lengths).size,
        "misses": dict(found.misses),
    }
    (out / RESULT).write_text(json.dumps(summary, indent=1))
    return summary


STAGE = Stage(name="plan", run=run, inputs=takes("merge"), sections=("plan",), packages=("torch", "onnx", "onnx-ir"))
