"""Names in a deployable's folder, which Optimum and Transformers.js look for, and in its decoders' metadata and graphs.

A folder has the checkpoint's config, tokenizer and processor files at the root, the graphs in `onnx/`. Variants of one
model in several dtypes lie side by side: the dtype's suffix ends the names of graphs and of records about them.

    config.json, tokenizer.json, ...
    onnx/encoder_model.onnx, onnx/decoder_model_merged.onnx, or onnx/model.onnx of a decoder-only model
    onnx/model_fp16.onnx, onnx/model_fp16.onnx_data: another variant, and its external data
    verification.json, verification_fp16.json
"""

import json
from dataclasses import dataclass
from pathlib import Path

GRAPHS = "onnx"
# Dtype, or format of the products' weights -> suffix, as Transformers.js names them.
SUFFIXES = {"float32": "", "float16": "_fp16", "bfloat16": "_bf16", "int8": "_int8", "int4": "_q4"}
EXTERNAL_DATA = "_data"  # ends the name of a graph's external data file
CONFIG, README = "config.json", "README.md"
JS_CONFIG = "transformers.js_config"  # key in config.json
OLD_DECODER = "decoder_model_merged.onnx"  # at the root in the layout before `onnx/`

MANIFEST = "manifest.json"

FLAG = "accel.flag"  # metadata key: name of the merged decoder's boolean input that selects the branch
POSITIONS = "accel.positions"  # metadata key: POSITIONS_FROM_MASK, or anything else for every token
POSITIONS_FROM_MASK = "mask"
SINGLE_ROW_CHUNKS = "accel.single_row_chunks"  # metadata key: see `DynamicCacheRuntime`; present or absent
IN_PLACE = "accel.in_place"  # caches may be longer than their content; present ones may share the past ones' memory
CACHE = "accel.cache"  # metadata key: JSON, cache input -> the output that becomes it at the next decode step

KEPT = "logits_to_keep"  # input of components, int64 [kept]: indices of the tokens whose logits are computed
NUM_KEPT = "num_logits_to_keep"  # input of merged decoders instead, int64 scalar: number of last tokens, 0 for all
POSITION = "position"  # input of static_decode, int64 [batch]: tokens in the caches = where the new entry is written
IDS, MASK, POSITION_IDS = "input_ids", "attention_mask", "position_ids"  # inputs of decoders, the first of all
BUCKET = "bucket"  # axis of static_decode: length of its caches, in tokens
WINDOW = "window_"  # begins the axis of caches in static_decode whose layer sees so many keys; they are filled in turn


@dataclass(frozen=True)
class DeployableFiles:
    """Paths of the files of one variant in a deployable's folder. They need not exist.

    Attributes:
        folder: The folder.
        dtype: Dtype of the variant: a key of `SUFFIXES`.
        has_encoder: The model is an encoder-decoder.
    """

    folder: Path
    dtype: str = "float32"
    has_encoder: bool = True

    @property
    def encoder(self) -> Path:
        """Graph of the encoder."""
        return self._graph("encoder_model")

    @property
    def decoder(self) -> Path:
        """Graph of the merged decoder."""
        return self._graph("decoder_model_merged" if self.has_encoder else "model")

    @property
    def static_decode(self) -> Path:
        """Graph that decodes one token over static caches."""
        return self._graph("decoder_static_decode")

    @property
    def cross_cache(self) -> Path:
        """Graph that computes the cross-attention caches from the encoder's output."""
        return self._graph("decoder_cross_cache")

    @property
    def graphs(self) -> list[Path]:
        """Graphs that exist."""
        paths = (self.encoder, self.decoder, self.static_decode, self.cross_cache)
        return [path for path in paths if path.is_file()]

    @property
    def verification(self) -> Path:
        """Verification result, as JSON."""
        return self._record("verification.json")

    @property
    def certificate(self) -> Path:
        """Certificate, as JSON."""
        return self._record("certificate.json")

    @property
    def certificate_page(self) -> Path:
        """Certificate, as an HTML page."""
        return self._record("certificate.html")

    @property
    def manifest(self) -> Path:
        """Manifest: list of the files that the variant consists of. In an artifact its name has no suffix."""
        return self.own_manifest if self.own_manifest.is_file() else self.folder / MANIFEST

    @property
    def own_manifest(self) -> Path:
        """Manifest in a folder that several variants share."""
        return self._record(MANIFEST)

    def _graph(self, stem: str) -> Path:
        """Return the path of a graph."""
        return self.folder / GRAPHS / f"{stem}{SUFFIXES[self.dtype]}.onnx"

    def _record(self, name: str) -> Path:
        """Return the path of a file about the variant, `name` with the suffix of the dtype."""
        stem, _, extension = name.partition(".")
        return self.folder / f"{stem}{SUFFIXES[self.dtype]}.{extension}"


def variants(folder: Path) -> list[DeployableFiles]:
    """Return the variants whose merged decoder is in `folder`, in the order of `SUFFIXES`."""
    candidates = [DeployableFiles(folder, dtype, has_encoder) for dtype in SUFFIXES for has_encoder in (True, False)]
    return [files for files in candidates if files.decoder.is_file()]


def is_deployable(folder: Path) -> bool:
    """Return whether `folder` holds a merged decoder."""
    return bool(variants(folder))


def first_variant(folder: Path) -> DeployableFiles:
    """Return the variant of `folder` with the widest dtype: the only one, in an artifact.

    Raises:
        FileNotFoundError: The folder holds no merged decoder.
    """
    found = variants(folder)
    if not found:
        raise FileNotFoundError(f"{str(folder)!r} holds no merged decoder in its folder {GRAPHS!r}")
    return found[0]


def declare_external_data(folder: Path) -> None:
    """List in config.json which graphs have an external data file, for Transformers.js, which can't see the folder."""
    suffix = EXTERNAL_DATA
    graphs = [path.name.removesuffix(suffix) for path in sorted((folder / GRAPHS).glob(f"*{suffix}"))]
    if graphs:
        path = folder / CONFIG
        config = json.loads(path.read_text(encoding="utf-8"))
        config.setdefault(JS_CONFIG, {})["use_external_data_format"] = dict.fromkeys(graphs, 1)
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
