"""Merge prefill and decode graph into one file that stores each weight once: the unverified bundle.

Reads:
    `<component>.onnx` of `convert`; from `export`, how the model counts positions; the checkpoint's config, tokenizer
    and processor files.

Writes:
    A Hugging Face model folder as `accel.runtime.layout` describes it: the checkpoint's files except its weights, the
    encoder if there is one, and the merged decoder. Where `convert` made a static decode graph, that and the graph that
    computes the cross-attention caches, both over the merged decoder's weights.
"""

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from accel.adapters.types import Architecture, Component
from accel.config.schema import Config, MergeConfig
from accel.data.pretrained import load_config
from accel.errors import AccelError, unknown
from accel.graph import files
from accel.graph.decode.cross_cache import cross_cache
from accel.graph.decode.spare_room import has_spare_room
from accel.graph.fusion.fuse_attention import FuseAttention
from accel.graph.merging.client_inputs import add_default, count_kept_logits, name_cache_lengths
from accel.graph.merging.merge_branches import fork_if, merge_if
from accel.graph.merging.merge_caches import merge_caches
from accel.graph.weights import initializers, shared_bytes
from accel.models.checkpoints import CODE
from accel.pipeline.stage import Stage, takes
from accel.pipeline.store import Artifact
from accel.runtime import layout
from accel.stages import convert

STRATEGIES = ("shared", "two_branch", "three_branch")
LAYOUTS = ("hub",)
ENCODER_LENGTH = "encoder_length"  # length axis of the cross-attention caches, where the encoder's output has only one
# Files copied from the checkpoint: configs, tokenizer and processor, but neither weights nor documentation.
CHECKPOINT_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
WEIGHT_INDEX = "*.index.json"


def check(merge: MergeConfig, fuse_attention: Collection[str]) -> None:
    """Check the merge settings.

    Args:
        merge: Section `merge`.
        fuse_attention: `convert.fuse_attention`, names of components.

    Raises:
        AccelError: A component or merge strategy is unknown, the strategy can't merge graphs with fused attention, or
            the flag is no identifier.
    """
    for name in fuse_attention:
        if name not in list(Component):
            raise unknown("convert.fuse_attention", name, list(Component))
    if merge.strategy not in STRATEGIES:
        raise unknown("merge.strategy", merge.strategy, STRATEGIES)
    fused = {Component.PREFILL, Component.DECODE} & set(fuse_attention)
    if merge.strategy == "shared" and fused:
        raise AccelError(
            f"convert.fuse_attention=[{','.join(sorted(fused))}] fuses keys and values into one node, but "
            "merge.strategy=shared needs them apart: use merge.strategy=two_branch or three_branch"
        )
    if merge.layout not in LAYOUTS:
        raise unknown("merge.layout", merge.layout, LAYOUTS)
    if not merge.flag.isidentifier():
        raise AccelError(f"merge.flag={merge.flag!r} is not an identifier: use a name such as use_cache_branch")


def merge(
    decode: ir.Model,
    prefill: ir.Model,
    config: MergeConfig,
    cache: Mapping[str, str],
    passes: Mapping[str, bool],
    fuse_attention: bool = False,
) -> ir.Model:
    """Merge both graphs by `config.strategy`.

    The model's metadata names the flag and the cache outputs that become the next decode step's cache inputs.

    Args:
        decode: Graph with past caches as inputs.
        prefill: Graph without past caches.
        config: Section `merge`.
        cache: Cache input of `decode` -> the output whose value it takes at the next decode step.
        passes: Pass -> whether it runs, over the one-token branch of `three_branch`.
        fuse_attention: Fuse the attention of the decode graph, except in the one-token branch.

    Raises:
        AccelError: The graphs can't be merged.
    """
    counts_logits = [count_kept_logits(model, layout.KEPT, layout.NUM_KEPT) for model in (decode, prefill)]
    try:
        if config.strategy == "shared":
            merged = merge_caches(decode, prefill, config.flag, cache)
        else:
            single = decode.clone() if config.strategy == "three_branch" else None
            if single is not None:
                convert.specialize_for_one_token(single, {**passes, "fuse_attention": False})
            if fuse_attention:
                FuseAttention()(decode)
            if single is not None:
                decode = fork_if(single, decode, convert.NAMES.new)
            merged = merge_if(decode, prefill, config.flag)
    except ValueError as error:
        raise AccelError(f"merge: {error} (merge.strategy={config.strategy}, merge.flag={config.flag})") from error
    if all(counts_logits):
        add_default(merged, layout.NUM_KEPT, 0)
    name_cache_lengths(merged, cache, ENCODER_LENGTH)
    merged.metadata_props[layout.FLAG] = config.flag
    merged.metadata_props[layout.CACHE] = json.dumps(dict(cache))
    return merged


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Write the unverified bundle. Return the bytes of weights before and after merging, and the node count."""
    source, checkpoint = inputs["convert"].folder, inputs["checkpoint"].folder
    hf_config = load_config(checkpoint)
    has_encoder = Component.ENCODER in architecture.components()
    target = layout.DeployableFiles(out, config.precision.variant, has_encoder)
    target.decoder.parent.mkdir()
    if has_encoder:
        files.save(files.load(source / f"{Component.ENCODER}.onnx"), target.encoder)
    decode = files.load(source / f"{Component.DECODE}.onnx")
    prefill = files.load(source / f"{Component.PREFILL}.onnx")
    shared = shared_bytes(initializers(prefill), initializers(decode))
    decode_bytes, prefill_bytes = files.weight_bytes(decode), files.weight_bytes(prefill)
    cache = architecture.signature(hf_config, Component.DECODE).cache
    static_decode = source / f"{Component.STATIC_DECODE}.onnx"
    static_graphs: dict[Path, ir.Model | None] = {}  # they refer to the merged decoder's weights
    if static_decode.is_file():
        static_graphs[target.static_decode] = files.load(static_decode)
        static_graphs[target.cross_cache] = cross_cache(prefill, decode, cache)
    fuse_decode = str(Component.DECODE) in config.convert.fuse_attention
    merged = merge(decode, prefill, config.merge, cache, config.convert.decode_passes, fuse_decode)
    if inputs["export"].summary["positions_from_mask"]:
        merged.metadata_props[layout.POSITIONS] = layout.POSITIONS_FROM_MASK
    if any(node.op_type == "GroupQueryAttention" for node in merged.graph.all_nodes()):
        merged.metadata_props[layout.SINGLE_ROW_CHUNKS] = "true"
    if has_spare_room(merged.graph, cache):
        merged.metadata_props[layout.IN_PLACE] = "true"
    files.save(merged, target.decoder)
    for path, model in static_graphs.items():
        if model is not None:
            files.save_beside(model, path, target.decoder)
    copy_checkpoint_files(checkpoint, out, with_code=config.model.trust_remote_code)
    layout.declare_external_data(out)
    return {
        "decode_bytes": decode_bytes,
        "prefill_bytes": prefill_bytes,
        "shared_bytes": shared,
        "merged_bytes": files.weight_bytes(merged),
        "nodes": files.node_count(merged),
    }


def copy_checkpoint_files(checkpoint: Path, out: Path, with_code: bool) -> None:
    """Copy config, tokenizer and processor files; the tokenizer's config as older versions of transformers read it.

    Args:
        checkpoint: Folder of the checkpoint.
        out: Folder to copy into.
        with_code: Copy the checkpoint's Python files as well.
    """
    for pattern in (*CHECKPOINT_FILES, *((CODE,) if with_code else ())):
        for path in checkpoint.glob(pattern):
            if not path.match(WEIGHT_INDEX):
                shutil.copyfile(path, out / path.name)
    path = out / "tokenizer_config.json"
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(portable_tokenizer_config(config), indent=2) + "\n", encoding="utf-8")


def portable_tokenizer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tokenizer's config in the terms of transformers 4, which version 5 reads too.

    Version 4 knows no class `TokenizersBackend`, and takes no list as `extra_special_tokens`.
    """
    portable = dict(config)
    if portable.get("tokenizer_class") == "TokenizersBackend":
        portable["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(portable.get("extra_special_tokens"), list):
        portable["additional_special_tokens"] = portable.pop("extra_special_tokens")
    return portable


STAGE = Stage(
    name="merge",
    run=run,
    inputs=takes("checkpoint", "export", "convert"),
    sections=(
        "merge",
        "convert.decode_passes",
        "convert.fuse_attention",
        "model.trust_remote_code",
        "precision.dtype",
        "precision.weight_bits",
    ),
    packages=("onnx", "onnx-ir"),
)
