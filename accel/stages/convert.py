"""Convert the optimized graphs to mixed precision, and fuse what would hide values from the audit or suits one runtime.

Reads the graphs of `optimize` and, unless all stays in FP32, the plans of `audit`. Writes `<component>.onnx` for every
component, and `static_decode.onnx` where the decode graph allows caches of fixed length. Prefill refers to the weights
of decode, where it did so before and they stayed in FP32.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from accel import progress
from accel.adapters.types import Architecture, Component
from accel.config.schema import Config, ConvertConfig
from accel.data.pretrained import load_config
from accel.errors import unknown
from accel.graph import files
from accel.graph.cleanup.eliminate_noop_add import EliminateNoopAdd
from accel.graph.cleanup.eliminate_noop_cast import EliminateNoopCast
from accel.graph.decode.one_token import OneToken
from accel.graph.decode.per_sequence import NotStaticError
from accel.graph.decode.spare_room import SpareRoom
from accel.graph.decode.static_cache import Names, StaticCache
from accel.graph.fusion.fuse_attention import FuseAttention
from accel.graph.fusion.fuse_causal_attention import FuseCausalAttention
from accel.graph.fusion.fuse_rotary import FuseRotary
from accel.graph.fusion.fuse_silu import FuseSilu
from accel.graph.fusion.fuse_transposed_matmul import FuseTransposedMatmul
from accel.graph.fusion.skip_causal_mask import SkipCausalMask
from accel.graph.fusion.transpose_weights import TransposeWeights
from accel.graph.precision.convert import convert_half, half_share
from accel.graph.precision.formats import FORMATS
from accel.graph.quantization.quantize_products import QuantizedWeights, QuantizeProducts, low_bit_share
from accel.graph.registry import DECODE
from accel.pipeline.stage import Stage
from accel.pipeline.store import Artifact
from accel.runtime.layout import BUCKET, POSITION
from accel.stages import audit, weight_audit

logger = logging.getLogger(__name__)

NAMES = Names(POSITION, BUCKET)


def check(passes: Mapping[str, bool]) -> None:
    """Raise `AccelError` if `passes` names a pass over decode graphs that doesn't exist."""
    for name in passes:
        if name not in DECODE:
            raise unknown("convert.decode_passes", name, DECODE)


def specialize_for_one_token(decode: ir.Model, passes: Mapping[str, bool]) -> None:
    """Rewrite a decode graph in place for exactly one new token.

    Args:
        decode: Decode graph, whose axis `new` becomes 1.
        passes: Name -> whether the pass runs; those not named run.
    """
    OneToken(NAMES.new)(decode)
    EliminateNoopAdd()(decode)  # the first new token is the only one
    for name, graph_pass in DECODE.items():
        if passes.get(name, True):
            graph_pass()(decode)


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Convert every component's graph.

    Returns:
        Which share of each graph is in 16 bits, or which of its products in low bits; empty in FP32.
    """
    source = inputs["optimize"].folder
    low_bits = config.precision.weight_bits is not None
    half = config.precision.dtype != "float32"
    convert = config.convert
    attention_fused = {Component(name) for name in convert.fuse_attention}
    plans = audit.read_plans(inputs["audit"].folder) if half else {}
    quantize = None
    if low_bits:
        formats = weight_audit.read_plan(inputs["audit"].folder).formats()
        quantize = QuantizeProducts(formats, QuantizedWeights())
    models = {component: files.load(source / f"{component}.onnx") for component in architecture.components()}
    transpose_weights = TransposeWeights()
    transpose_weights.prepare(list(models.values()))
    shares: dict[str, dict[str, float]] = {}
    for component in progress.track(list(models), "converting"):
        model = models[component]
        if quantize is not None:
            quantize(model)
            shares[str(component)] = low_bit_share(model)
        if half:  # scales of quantized weights, too
            convert_half(model, plans[component], FORMATS[config.precision.dtype])
            shares[str(component)] = half_share(model) | shares.get(str(component), {})
        FuseSilu()(model)
        EliminateNoopCast()(model)  # in FP32 as well: models cast to the dtype of their weights
        if convert.fuse_transposed_matmul:
            FuseTransposedMatmul()(model)
        if convert.transpose_weights:
            transpose_weights(model)
        static_decode = None
        if component is Component.DECODE and convert.static_decode:
            static_decode = _static_decode(model, convert, inputs, architecture)
        if convert.fuse_rotary:
            FuseRotary()(model)
        if component is Component.DECODE and convert.fuse_causal_attention and not half:
            FuseCausalAttention()(model)
            SpareRoom("past", "attention_mask", "input_ids")(model)
        if component in attention_fused - {Component.DECODE}:  # `merge` fuses it, behind the branch for one token
            FuseAttention()(model)
            if component is Component.PREFILL and Component.ENCODER not in architecture.components():
                SkipCausalMask()(model)  # the decoder's prompt beside an encoder is one token
            progress.note(f"{component}: {files.node_count(model)} nodes with attention fused")
        if component is not Component.PREFILL:
            files.save(model, out / f"{component}.onnx")
        if static_decode is not None:
            files.save_beside(static_decode, out / f"{Component.STATIC_DECODE}.onnx", out / f"{component}.onnx")
    prefill, decode = (out / f"{component}.onnx" for component in (Component.PREFILL, Component.DECODE))
    files.save_sharing(models[Component.PREFILL], prefill, models[Component.DECODE], decode)
    return shares


def _static_decode(
    decode: ir.Model, convert: ConvertConfig, inputs: Mapping[str, Artifact], architecture: Architecture
) -> ir.Model | None:
    """Return a decode graph for one new token over caches of fixed length; None, with a warning, if impossible."""
    model_config = load_config(inputs["checkpoint"].folder)
    cache = architecture.signature(model_config, Component.DECODE).cache
    static_decode = decode.clone()
    passes = {"fuse_attention": str(Component.STATIC_DECODE) in convert.fuse_attention} | convert.decode_passes
    try:
        StaticCache(cache, NAMES)(static_decode)
        if convert.fuse_rotary:  # only now, since angles may depend on each sequence's position
            FuseRotary()(static_decode)
        specialize_for_one_token(static_decode, passes)
    except NotStaticError as reason:
        logger.warning(f"no static decode graph: its caches would not have a fixed length: {reason}")
        return None
    return static_decode


def _inputs(config: Config) -> tuple[str, ...]:
    plans = () if config.precision.exact else ("audit",)
    return ("checkpoint", "optimize", *plans)


STAGE = Stage(
    name="convert",
    run=run,
    inputs=_inputs,
    sections=("precision.dtype", "precision.weight_bits", "convert"),
    packages=("onnx", "onnx-ir"),
)
