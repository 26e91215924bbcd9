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
from accel.adapters.types import Architecture, Component
from accel.config.schema import Config, ConvertConfig
from accel.errors import unknown
from accel.graph import files
from accel.graph.cleanup.eliminate_noop_cast import eliminate_noop_cast
from accel.graph.decode.one_token import one_token, transpose_to_reshape
from accel.graph.decode.split_to_slice import split_to_slice
from accel.graph.decode.static_cache import Names, NotStaticError, static_cache
from accel.graph.fusion.fuse_attention import fuse_attention
from accel.graph.fusion.fuse_gqa import fuse_gqa
from accel.graph.fusion.fuse_rotary import fuse_rotary
from accel.graph.fusion.fuse_transposed_matmul import fuse_transposed_matmul
from accel.graph.precision.convert import convert_half, half_share
from accel.graph.precision.formats import FORMATS
from accel.pipeline.stage import Stage
from accel.pipeline.store import Artifact
from accel.runtime.layout import BUCKET, POSITION
from accel.stages import audit

logger = logging.getLogger(__name__)

NAMES = Names(POSITION, BUCKET)
# In the order in which they run over a step of one token.
DECODE_PASSES: dict[str, Callable[[ir.Model], None]] = {
    "fuse_rotary": fuse_rotary,
    "fuse_gqa": fuse_gqa,
    "fuse_attention": lambda decode: fuse_attention(
        [decode]
    ),  # of a static step, where `fuse_attention` names the role
    "transpose_to_reshape": transpose_to_reshape,
    "split_to_slice": split_to_slice,
}


def check(passes: Mapping[str, bool]) -> None:
    """Raises `AccelError` on a pass over steps of one token that doesn't exist."""
    for name in passes:
        if name not in DECODE_PASSES:
            raise unknown("convert.decode_passes", name, DECODE_PASSES)


def for_one_token(decode: ir.Model, wanted: Mapping[str, bool]) -> None:
    """In place: `step` for exactly one new token. `wanted`: pass -> whether it runs."""
    one_token(decode, NAMES.new)
    for name, transform in DECODE_PASSES.items():
        if wanted.get(name, True):
            transform(decode)


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Writes `<role>.onnx` for every role; in 16 bits, reports what the mix is made of."""
    source = inputs["optimize"].folder
    half = config.precision.dtype != "float32"
    asked = config.convert
    if not half and not (asked.fuse_attention or asked.fuse_transposed_matmul or asked.static_decode):
        for path in source.glob("*.onnx*"):
            shutil.copyfile(path, out / path.name)
        return {}
    fused = {Component(name) for name in asked.fuse_attention}
    plans = audit.read_plans(inputs["audit"].folder) if half else {}
    shares = {}
    for component in progress.track(architecture.components(), "converting"):
        model = files.load(source / f"{component}.onnx")
        if half:
            convert_half(model, plans[component], FORMATS[config.precision.dtype])
            eliminate_noop_cast([model])
            shares[str(component)] = half_share(model)
        if asked.fuse_transposed_matmul:
            fuse_transposed_matmul(model)
        wanted = component is Component.DECODE and asked.static_decode
        static = _static(model, asked, inputs, architecture) if wanted else None
        if component in fused:
            fuse_attention([model])
            progress.note(f"{component}: {files.node_count(model)} nodes with attention fused")
        files.save(model, out / f"{component}.onnx")
        if static is not None:
            files.save_beside(static, out / f"{Component.STATIC_DECODE}.onnx", out / f"{component}.onnx")
    return shares


def _static(
    decode: ir.Model, convert: ConvertConfig, inputs: Mapping[str, Artifact], architecture: Architecture
) -> ir.Model | None:
    """`step` for one token, over caches of a fixed length; None, and a warning, where the graph allows none."""
    description = AutoConfig.from_pretrained(inputs["checkpoint"].folder)
    static = decode.clone()
    wanted = {"fuse_attention": str(Component.STATIC_DECODE) in convert.fuse_attention} | convert.decode_passes
    try:
        static_cache(static, architecture.signature(description, Component.DECODE).cache, NAMES)
        for_one_token(static, wanted)
    except NotStaticError as reason:
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
