"""Mixed precision: the graphs with the plan carried out; and what would hide values from the audit, or suits only one
runtime: attention fused, products with a tied embedding.
"""

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
from transformers import AutoConfig

from accel import progress
from accel.adapters.types import Architecture, Role
from accel.config.schema import Config, ConvertConfig
from accel.errors import unknown
from accel.graph import files
from accel.graph.cleanup.eliminate_noop_cast import drop_casts
from accel.graph.decode.one_token import one_token, straighten
from accel.graph.decode.split_to_slice import slice_uneven
from accel.graph.decode.static_cache import Names, NotStatic, static_cache
from accel.graph.fusion.fuse_attention import fuse_attention
from accel.graph.fusion.fuse_gqa import group_queries
from accel.graph.fusion.fuse_rotary import fuse_rotary
from accel.graph.fusion.fuse_transposed_matmul import transposed_products
from accel.graph.precision.convert import convert_half, half_share
from accel.graph.precision.formats import FORMATS
from accel.pipeline.stage import Stage
from accel.pipeline.store import Artifact
from accel.runtime.layout import BUCKET, POSITION
from accel.stages import audit

logger = logging.getLogger(__name__)

NAMES = Names(POSITION, BUCKET)
# In the order in which they run over a step of one token.
ONE_TOKEN_PASSES: dict[str, Callable[[ir.Model], None]] = {
    "fuse_rotary": fuse_rotary,
    "group_queries": group_queries,
    "fuse_attention": lambda step: fuse_attention([step]),  # of a static step, where `fuse_attention` names the role
    "straighten": straighten,
    "slice_uneven": slice_uneven,
}


def check(passes: Mapping[str, bool]) -> None:
    """Raises `AccelError` on a pass over steps of one token that doesn't exist."""
    for name in passes:
        if name not in ONE_TOKEN_PASSES:
            raise unknown("convert.one_token_passes", name, ONE_TOKEN_PASSES)


def for_one_token(step: ir.Model, wanted: Mapping[str, bool]) -> None:
    """In place: `step` for exactly one new token. `wanted`: pass -> whether it runs."""
    one_token(step, NAMES.new)
    for name, transform in ONE_TOKEN_PASSES.items():
        if wanted.get(name, True):
            transform(step)


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Writes `<role>.onnx` for every role; in 16 bits, reports what the mix is made of."""
    source = inputs["optimize"].folder
    half = config.precision.dtype != "float32"
    asked = config.convert
    if not half and not (asked.fuse_attention or asked.transposed_products or asked.static_step):
        for path in source.glob("*.onnx*"):
            shutil.copyfile(path, out / path.name)
        return {}
    fused = {Role(name) for name in asked.fuse_attention}
    plans = audit.read_plans(inputs["audit"].folder) if half else {}
    shares = {}
    for role in progress.track(architecture.roles(), "converting"):
        model = files.load(source / f"{role}.onnx")
        if half:
            convert_half(model, plans[role], FORMATS[config.precision.dtype])
            drop_casts([model])
            shares[str(role)] = half_share(model)
        if asked.transposed_products:
            transposed_products(model)
        wanted = role is Role.STEP and asked.static_step
        static = _static(model, asked, inputs, architecture) if wanted else None
        if role in fused:
            fuse_attention([model])
            progress.note(f"{role}: {files.node_count(model)} nodes with attention fused")
        files.save(model, out / f"{role}.onnx")
        if static is not None:
            files.save_beside(static, out / f"{Role.STATIC_STEP}.onnx", out / f"{role}.onnx")
    return shares


def _static(
    step: ir.Model, convert: ConvertConfig, inputs: Mapping[str, Artifact], architecture: Architecture
) -> ir.Model | None:
    """`step` for one token, over caches of a fixed length; None, and a warning, where the graph allows none."""
    description = AutoConfig.from_pretrained(inputs["checkpoint"].folder)
    static = step.clone()
    wanted = {"fuse_attention": str(Role.STATIC_STEP) in convert.fuse_attention} | convert.one_token_passes
    try:
        static_cache(static, architecture.signature(description, Role.STEP).cache, NAMES)
        for_one_token(static, wanted)
    except NotStatic as reason:
        logger.warning(f"no static step, so its caches grow: {reason}")
        return None
    return static


def _inputs(config: Config) -> tuple[str, ...]:
    plans = () if config.precision.dtype == "float32" else ("audit",)
    return ("checkpoint", "optimize", *plans)


STAGE = Stage(
    name="convert",
    run=run,
    inputs=_inputs,
    sections=("precision.dtype", "convert"),
    packages=("onnx", "onnx-ir"),
)
