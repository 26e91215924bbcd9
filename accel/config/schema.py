"""The types of the configuration: one dataclass per stage. The values live in `conf/`."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

STAGES = ("export", "optimize", "audit", "convert", "merge", "verify", "generate", "benchmark", "profile")


@dataclass
class ModelConfig:
    """Where the weights come from."""

    name: str = MISSING
    checkpoint: str | None = None
    revision: str | None = None
    weights: str = "pretrained"
    seed: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    references: str | None = None


@dataclass
class PrecisionConfig:
    """`plan` says how the nodes that stay in FP32 are chosen: see `accel.stages.audit.RULES`.

    `operators`: those that stay under `plan=operators`.
    """

    name: str = MISSING
    dtype: str = "float32"
    plan: str = "minimised"
    operators: list[str] = field(default_factory=list)


@dataclass
class RuntimeConfig:
    """Where a deployable runs. `session`: ONNX Runtime's configuration keys; `environment`: variables it reads when a
    session opens; `arithmetic`: the precision of a graph -> what it is computed in there; one that is missing has no
    kernels.

    What suits it best: `branches` (see `MergeConfig`), `fuse_attention`, `transposed_products` and `static` (see
    `ConvertConfig`).

    `buckets`: lengths that a static cache may have, in decoder tokens; it moves to a longer one when it is full.

    `static_session`, `static_environment`: in place of some of `session` and `environment`, for the session of a step
    over static caches.

    `capture`: record a step over static caches as a CUDA graph and replay it. `batches`: the numbers of sequences,
    beams counted, to capture when a model is opened, and no others after that; empty: any, when it comes.
    """

    name: str = MISSING
    provider: str = "CPUExecutionProvider"
    provider_options: dict[str, Any] = field(default_factory=dict)
    session: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"
    threads: int = 0
    arithmetic: dict[str, str] = field(default_factory=lambda: {"float32": "float32"})
    branches: str = "caches"
    fuse_attention: list[str] = field(default_factory=list)
    transposed_products: bool = False
    static: bool = False
    buckets: list[int] = field(default_factory=list)
    static_session: dict[str, str] = field(default_factory=dict)
    static_environment: dict[str, str] = field(default_factory=dict)
    capture: bool = False
    batches: list[int] = field(default_factory=list)


@dataclass
class ExportConfig:
    opset: int = 20
    tolerance: float = 1e-4
    seed: int = 0


@dataclass
class OptimizeConfig:
    passes: dict[str, bool] = field(default_factory=dict)


@dataclass
class AuditConfig:
    random: bool = True
    batches: int = 8
    max_batches: int = 64
    batch_size: int = 2
    max_length: int = 128
    seed: int = 0
    texts: str | None = None
    column: str | None = None
    margin: float = 2.0
    trials: int = 32


@dataclass
class ConvertConfig:
    """`fuse_attention`: roles in whose graphs attention of one precision becomes ONNX Runtime's `MultiHeadAttention`.

    `transposed_products`: products with a weight that is looked up as well, as a tied embedding is, read it as it lies.

    `static_step`: make a step whose caches have a fixed length as well; `one_token_passes`: over that, and over the
    branch of one token that `merge.branches=tokens` makes.
    """

    fuse_attention: list[str] = "${runtime.fuse_attention}"  # type: ignore[assignment]
    transposed_products: bool = "${runtime.transposed_products}"  # type: ignore[assignment]
    static_step: bool = "${runtime.static}"  # type: ignore[assignment]
    one_token_passes: dict[str, bool] = field(default_factory=dict)


@dataclass
class MergeConfig:
    """`branches` says what the `If` holds: `caches` (what only prefill makes), `decoders` (each graph
    whole) or `tokens` (each whole, and a step of one token in a branch of its own).
    """

    flag: str = "enable_cache"
    branches: str = "${runtime.branches}"


@dataclass
class VerifyConfig:
    """`texts` and `targets` stand in for `model.references`; the least and the most that are allowed: see `verify`."""

    texts: str | None = None
    column: str | None = None
    targets: str | None = None
    targets_column: str | None = None
    metrics: list[str] = field(default_factory=lambda: ["exact_match", "word_error_rate"])
    min_token_agreement: float | None = None
    max_metric_loss: float = 1.0
    latency: bool = True
    batch_size: int = 4
    inputs: int = 8
    source_length: int = 24
    max_new_tokens: int = 24
    num_beams: int = 4
    references: int = 200
    unique_tokens: bool | None = None
    seed: int = 0


@dataclass
class BenchmarkConfig:
    source_length: int = 32
    new_tokens: int = 64
    num_beams: int = 1
    batch_size: int = 1
    repeats: int = 5
    patience: float | None = 60.0
    warmup: int = 1
    warmup_tokens: int | None = 16
    setups: list[str] = field(default_factory=list)
    memory: bool = True
    unverified: bool = False
    seed: int = 0


@dataclass
class ProfileConfig:
    source_length: int = 32
    new_tokens: int = 32
    top: int = 10
    seed: int = 0


@dataclass
class Config:
    """The whole configuration, as `--cfg job` prints it."""

    stage: Any = "all"
    artifacts: str = "artifacts"
    model: ModelConfig = field(default_factory=ModelConfig)
    architecture: dict[str, Any] = field(default_factory=dict)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    optimize: OptimizeConfig = field(default_factory=OptimizeConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    generate: dict[str, Any] = field(default_factory=dict)
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
