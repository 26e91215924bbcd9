"""Both decoders in one file, every weight once, in an ordinary Hugging Face folder: the candidate."""

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
from transformers import AutoConfig

from accel.adapters.types import Architecture, Component
from accel.config.schema import Config, MergeConfig
from accel.errors import AccelError, unknown
from accel.graph import files
from accel.graph.decode.cross_cache import cross_cache
from accel.graph.merging.merge_branches import fork_if, merge_if
from accel.graph.merging.merge_caches import merge_caches
from accel.graph.weights import initializers, shared_bytes
from accel.pipeline.stage import Stage, takes
from accel.pipeline.store import Artifact
from accel.runtime import layout
from accel.stages import convert

STRATEGIES = ("shared", "two_branch", "three_branch")
# Of the checkpoint: the description, the tokenizer and the processor. Not its weights, not its documentation.
DESCRIPTION = ("*.json", "*.model", "*.txt", "*.jinja")
WEIGHT_INDEX = "*.index.json"


def check(merge: MergeConfig, fuse_attention: Collection[str]) -> None:
    """Raises `AccelError` on a style that doesn't exist or doesn't go with fused attention, or an empty flag."""
    for name in fuse_attention:
        if name not in list(Component):
            raise unknown("convert.fuse_attention", name, list(Component))
    if merge.strategy not in STRATEGIES:
        raise unknown("merge.strategy", merge.strategy, STRATEGIES)
    fused = {Component.PREFILL, Component.DECODE} & set(fuse_attention)
    if merge.strategy == "shared" and fused:
        raise AccelError(
            f"convert.fuse_attention=[{','.join(sorted(fused))}] puts keys and values into one node, where "
            "merge.strategy=shared looks for them one by one: use merge.strategy=two_branch or three_branch"
        )
    if not merge.flag.isidentifier():
        raise AccelError(f"merge.flag={merge.flag!r} is not a name, such as enable_cache or use_cache_branch")


def merge(
    decode: ir.Model, prefill: ir.Model, config: MergeConfig, cache: Mapping[str, str], passes: Mapping[str, bool]
) -> ir.Model:
    """Both graphs in one, marked with what a runtime must know: the flag, and which output feeds which input.

    `passes`: over a step of one token, where it has a branch of its own.
    """
    try:
        if config.strategy == "shared":
            merged = merge_caches(decode, prefill, config.flag, cache)
        else:
            if config.strategy == "three_branch":
                single = decode.clone()
                convert.for_one_token(single, {**passes, "fuse_attention": False})
                decode = fork_if(single, decode, convert.NAMES.new)
            merged = merge_if(decode, prefill, config.flag)
    except ValueError as error:
        raise AccelError(f"merge: {error} (merge.strategy={config.strategy}, merge.flag={config.flag})") from error
    merged.metadata_props[layout.FLAG] = config.flag
    merged.metadata_props[layout.CACHE] = json.dumps(dict(cache))
    return merged


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Writes `encoder_model.onnx` (if there is an encoder), `decoder_model_merged.onnx`, config and tokenizer files;
    where `convert` made a static step, that and what makes the caches it only reads, over the same weights.
    """
    source, checkpoint = inputs["convert"].folder, inputs["checkpoint"].folder
    description = AutoConfig.from_pretrained(checkpoint)
    components = architecture.components()
    if Component.ENCODER in components:
        files.save(files.load(source / f"{Component.ENCODER}.onnx"), out / layout.ENCODER)
    decode, prefill = (files.load(source / f"{component}.onnx") for component in (Component.DECODE, Component.PREFILL))
    shared = shared_bytes(initializers(prefill), initializers(decode))
    decode_bytes, prefill_bytes = files.weight_bytes(decode), files.weight_bytes(prefill)
    cache = architecture.signature(description, Component.DECODE).cache
    static = source / f"{Component.STATIC_DECODE}.onnx"
    beside = (
        {layout.STATIC_DECODE: files.load(static), layout.CROSS_CACHE: cross_cache(prefill, decode, cache)}
        if static.is_file()
        else {}
    )
    merged = merge(decode, prefill, config.merge, cache, config.convert.decode_passes)
    files.save(merged, out / layout.DECODER)
    for name, model in beside.items():
        if model is not None:
            files.save_beside(model, out / name, out / layout.DECODER)
    for pattern in DESCRIPTION:
        for path in checkpoint.glob(pattern):
            if not path.match(WEIGHT_INDEX):
                shutil.copyfile(path, out / path.name)
    return {
        "decode_bytes": decode_bytes,
        "prefill_bytes": prefill_bytes,
        "shared_bytes": shared,
        "merged_bytes": files.weight_bytes(merged),
        "nodes": files.node_count(merged),
    }


STAGE = Stage(
    name="merge",
    run=run,
    inputs=takes("checkpoint", "convert"),
    sections=("merge", "convert.decode_passes"),
    packages=("onnx", "onnx-ir"),
)
